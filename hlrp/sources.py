"""URIs of data sources: `scheme:location?option=value&option=value@weight`."""

import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from hlrp.contract import Stream
from hlrp.rlds import MIXTURES, mixture
from hlrp.streams import in_turns, readable


def true_or_false(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


OPTIONS = {  # of each scheme, as they stand behind the "?" of a URI
    "videos": {},
    "lerobot": {"camera": str},
    "world": {"episodes": int, "seed": int, "kinds": str},
    "metaworld": {"episodes": int, "seed": int, "size": int, "noise": float, "camera": str},
    "shards": {"dataset": str, "fps": float, "ignore": str},
    "rlds": {"split": str, "camera": str, "instruction": str, "state": str, "action": str, "fps": float}
    | {"bgr": true_or_false, "root": str},
}


def expand(uris: Sequence[str]) -> tuple[str, ...]:
    """The URIs, with each name of a mixture of Open X-Embodiment (`rlds:octo24?root=DIR`) replaced by its data sets,
    which share its weight."""
    expanded = []
    for text in uris:
        uri, scheme, location, options, weight = parse_uri(text)
        if scheme != "rlds" or location not in MIXTURES:
            expanded.append(text)
            continue
        if stray := sorted(set(options) - {"root"}):
            raise ValueError(f"{uri}: {', '.join(stray)} of a whole mixture; only root fits")
        parts = mixture(location, options.get("root"))
        expanded += [f"{part}@{weight * share:g}" for part, share in parts]
    return tuple(expanded)


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

    options, others = {}, []
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        value = unquote(value)
        if key not in OPTIONS[scheme]:
            if "://" in location:  # where a query may be the address's own
                others.append(part)
                continue
            known = ", ".join(OPTIONS[scheme]) or "none"
            raise ValueError(f"{text}: unknown option {key!r}; options of {scheme}: {known}")
        to_type = OPTIONS[scheme][key]
        try:
            options[key] = to_type(value)
        except ValueError:
            raise ValueError(f"{text}: {key}={value!r}; a value of type {to_type.__name__} fits") from None
    location += "?" * bool(others) + "&".join(others)
    return SourceURI(uri, scheme, location, options, weight)


def open_source(uri: str, skip_broken: bool = False):
    """The source that a URI names. A broken file is an error, or skipped and counted."""
    uri, scheme, location, options, _ = parse_uri(uri)
    if scheme == "videos":
        from hlrp.videos import Videos

        return Videos(location, uri=uri, skip_broken=skip_broken)
    if scheme == "shards":
        from hlrp.shard_data import Shards, ShardStream, is_indexed

        kind = Shards if is_indexed(location) else ShardStream
        fits = {"dataset"} if kind is Shards else {"fps", "ignore"}
        if stray := sorted(set(options) - fits):
            what = "with indexes" if kind is Shards else "without indexes"
            raise ValueError(f"{uri}: shards {what} take no {', '.join(stray)}; {', '.join(sorted(fits))} fits")
        return kind(location, uri, **options, skip_broken=skip_broken)
    if scheme == "rlds":
        from hlrp.rlds import RLDS

        if location in MIXTURES or "root" in options:
            raise ValueError(f"{uri}: a mixture of several sources; one of them fits, such as {expand([uri])[0]}")
        return RLDS(location, **options, uri=uri, skip_broken=skip_broken)
    if scheme == "world":
        from hlrp.world import World

        return World(location, **options)

    from hlrp.lerobot_data import LeRobotData

    if scheme == "metaworld":
        from hlrp.metaworld import cached

        folder = cached(location, **options)
        return LeRobotData(folder, uri=uri, name=f"metaworld-{location}", skip_broken=skip_broken)
    return LeRobotData(location, **options, uri=uri, skip_broken=skip_broken)


def open_sources(uris: Sequence[str], skip_broken: bool, max_broken: int) -> tuple[list, list[float]]:
    """The sources that URIs name, mixtures expanded, under names of their own; and their weights.

    Raises ValueError where more than `max_broken` files or episodes of them are skipped.
    """
    uris = expand(uris)
    sources = named_apart([open_source(uri, skip_broken) for uri in uris])
    num_skipped = sum(source.num_skipped for source in sources)
    if num_skipped > max_broken:
        raise ValueError(
            f"max_broken={max_broken}, but {num_skipped} files or episodes cannot be read; mend the data, or allow more"
        )
    return sources, [parse_uri(uri).weight for uri in uris]


def named_apart(sources: Sequence) -> list:
    """The sources, those of one name renamed by what tells their URIs apart: the folder or the owner
    (`lerobot-pick-bob`), else the options, else a number."""
    for alike in of_one_name(sources):
        places = [place_parts(source.uri) for source in alike]
        for source, (path, options) in zip(alike, places, strict=True):
            others = [other for other, _ in places if other != path]
            depth = next((n for n in range(1, len(path)) if all(o[-n:] != path[-n:] for o in others)), len(path))
            apart = [f"{key}-{value}" for key, value in options if any((key, value) not in own for _, own in places)]
            words = [source.name, *(path[-depth:-1] if others else ()), *apart]
            source.name = re.sub(r"[^\w.-]+", "_", "-".join(words))
    for alike in of_one_name(sources):
        for number, source in enumerate(alike[1:], start=2):
            source.name += f"-{number}"
    return list(sources)


def of_one_name(sources: Sequence) -> list[list]:
    names = [source.name for source in sources]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    return [[source for source in sources if source.name == name] for name in repeated]


def place_parts(uri: str) -> tuple[tuple[str, ...], list[tuple[str, str | int | float]]]:
    """Of a URI the parts of its path, whose last gives a source its name, and its options."""
    _, _, location, options, _ = parse_uri(uri)
    path = Path(location).expanduser()
    if path.exists() or path.parent.is_dir() and path.suffix == ".tar":
        path = path.absolute()
    return (path.parent if path.suffix == ".tar" else path).parts, sorted(options.items())


def instructions(
    sources: Sequence, skip_broken: bool = False, episodes: Sequence[Sequence[int]] | None = None
) -> list[str]:
    """The different instructions of all sources, sorted: a tokenizer from scratch learns from them.

    episodes: of each source, the ones to take instructions from, and then none from a stream (default: all episodes,
    and the first 256 of a stream).
    """
    texts = set()
    for i, source in enumerate(sources):
        if isinstance(source, Stream):
            if episodes is None:
                for _, episode in islice(in_turns(source.num_shards, partial(readable, source)), 256):
                    texts.update(episode.instructions(range(len(episode.frames))))
            continue
        for episode in range(len(source.lengths)) if episodes is None else episodes[i]:
            try:
                texts.update(source.instructions(int(episode), range(source.lengths[episode])))
            except ValueError:  # which the training tells
                if not skip_broken:
                    raise
    return sorted(texts)
