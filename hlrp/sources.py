"""URIs of data sources: `scheme:location?option=value&option=value@weight`."""

from itertools import chain, islice
from typing import NamedTuple
from urllib.parse import parse_qsl

from hlrp.clips import is_stream

OPTIONS = {  # of each scheme, as they stand behind the "?" of a URI
    "videos": {},
    "lerobot": {"camera": str},
    "world": {"episodes": int, "seed": int},
    "metaworld": {"episodes": int, "seed": int, "size": int, "noise": float, "camera": str},
}


class SourceURI(NamedTuple):
    uri: str  # without the weight
    scheme: str
    location: str
    options: dict[str, str | int | float]
    weight: float


def parse_uri(text: str) -> SourceURI:
    """`scheme:location?option=value&option=value@weight`; raises ValueError naming what would fit."""
    uri, at, weight_text = text.rpartition("@")
    if not at or "/" in weight_text:  # an "@" inside a path is no weight
        uri, weight_text = text, "1"
    try:
        weight = float(weight_text)
    except ValueError:
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise ValueError(f"{text}: the weight is {weight_text!r}; a positive number fits, such as @0.5")

    address, _, query = uri.partition("?")
    scheme, _, location = address.partition(":")
    if scheme not in OPTIONS or not location:
        fits = ", ".join(f"{known}:..." for known in OPTIONS)
        raise ValueError(f"{text}: not a data source; one of {fits} fits")

    options = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in OPTIONS[scheme]:
            known = ", ".join(OPTIONS[scheme]) or "none"
            raise ValueError(f"{text}: unknown option {key!r}; options of {scheme}: {known}")
        to_type = OPTIONS[scheme][key]
        try:
            options[key] = to_type(value)
        except ValueError:
            raise ValueError(f"{text}: {key}={value!r}; a value of type {to_type.__name__} fits") from None
    return SourceURI(uri, scheme, location, options, weight)


def open_source(uri: str, skip_broken: bool = False):
    """The source that a URI names. A broken file is an error, or skipped and counted."""
    uri, scheme, location, options, _ = parse_uri(uri)
    if scheme == "videos":
        from hlrp.videos import Videos

        return Videos(location, uri=uri, skip_broken=skip_broken)
    if scheme == "world":
        from hlrp.world import World

        return World(location, **options)

    from hlrp.lerobot_data import LeRobotData

    if scheme == "metaworld":
        from hlrp.metaworld import cached

        folder = cached(location, **options)
        return LeRobotData(folder, uri=uri, name=f"metaworld-{location}", skip_broken=skip_broken)
    return LeRobotData(location, **options, uri=uri, skip_broken=skip_broken)


def instructions(sources) -> list[str]:
    """The instructions of some episodes of each source, which a tokenizer from scratch learns from."""
    found = set()
    for source in sources:
        if is_stream(source):
            some = islice(chain.from_iterable(map(source.episodes, range(source.num_shards))), 256)
            found |= {episode.task for episode in some}
            continue
        episodes = range(0, len(source.lengths), max(1, len(source.lengths) // 256))
        found |= {source.read(episode, [0])["task"] for episode in episodes}
    return sorted(found)
