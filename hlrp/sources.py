"""URIs of data sources: `scheme:location?option=value&option=value@weight`, and the formats that they name.

A new format is one class (`hlrp.contract.Source`) and one line in `FORMATS`.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from hlrp.contract import Indices, Source, Stream
from hlrp.rlds import MIXTURES, mixture
from hlrp.streams import in_turns, readable


def boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def center(text: str) -> bool:
    if text != "center":
        raise ValueError(text)
    return True


class Format(NamedTuple):
    opener: str  # "module:name" of a class or function, called with (location, uri=, skip_broken=, **options)
    options: Mapping[str, Callable[[str], Any]] = {}  # name in the URI -> type


FORMATS = {
    "videos": Format("hlrp.videos:Videos", {"table": str}),
    "lerobot": Format(
        "hlrp.lerobot_data:LeRobotData", {"camera": str, "state": str, "action": str, "task": str, "revision": str}
    ),
    "hdf5": Format(
        "hlrp.hdf5_data:HDF5Data",
        {"camera": str, "state": str, "action": str, "task": str, "fps": float}
        | {"mask": str, "flip": str, "bgr": boolean},
    ),
    "world": Format("hlrp.world:open_world", {"episodes": int, "seed": int, "kinds": str}),
    "metaworld": Format(
        "hlrp.metaworld:open_metaworld",
        {"episodes": int, "seed": int, "size": int, "noise": float, "camera": str, "distractors": boolean},
    ),
    "shards": Format("hlrp.shard_data:open_shards", {"dataset": str, "fps": float, "ignore": str}),
    "rlds": Format(
        "hlrp.rlds:open_rlds",
        {"split": str, "camera": str, "instruction": str, "state": str, "action": str, "fps": float}
        | {"bgr": boolean, "root": str},
    ),
}
COMMON = {"crop": center}  # options of every format


class SourceURI(NamedTuple):
    uri: str  # without the weight
    scheme: str
    location: str
    options: dict[str, Any]
    weight: float


def parse_uri(text: str) -> SourceURI:
    """Raises ValueError for a scheme, an option, a value or a weight that is unknown, and says what is expected."""
    uri, at, weight_text = text.rpartition("@")
    if not at or "/" in weight_text:  # an "@" inside a path is no weight
        uri, weight_text = text, "1"
    try:
        weight = float(weight_text)
    except ValueError:
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise ValueError(f"{text}: expected a weight above 0, such as @0.5, got {weight_text!r}")

    address, _, query = uri.partition("?")
    scheme, _, location = address.partition(":")
    if scheme not in FORMATS or not location:
        expected = ", ".join(f"{known}:..." for known in FORMATS)
        raise ValueError(f"{text}: not a data source; expected one of {expected}")

    types, options, others = {**FORMATS[scheme].options, **COMMON}, {}, []
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        value = unquote(value)
        if key not in types:
            if "://" in location:  # the query may belong to this address
                others.append(part)
                continue
            raise ValueError(f"{text}: unknown option {key!r}; options of {scheme}: {', '.join(types)}")
        try:
            options[key] = types[key](value)
        except ValueError:
            raise ValueError(f"{text}: expected {key} of type {types[key].__name__}, got {value!r}") from None
    location += "?" * bool(others) + "&".join(others)
    return SourceURI(uri, scheme, location, options, weight)


def expand(uris: Sequence[str]) -> tuple[str, ...]:
    """Replaces the name of a mixture of Open X-Embodiment (`rlds:octo24?root=DIR`) by its data sets, which share its
    weight. Other URIs stay."""
    expanded = []
    for text in uris:
        uri, scheme, location, options, weight = parse_uri(text)
        if scheme != "rlds" or location not in MIXTURES:
            expanded.append(text)
            continue
        if stray := sorted(set(options) - {"root"}):
            raise ValueError(f"{uri}: a whole mixture takes the option root, not {', '.join(stray)}")
        parts = mixture(location, options.get("root"))
        expanded += [f"{part}@{weight * share:g}" for part, share in parts]
    return tuple(expanded)


def open_source(uri: str, skip_broken: bool = False) -> Source | Stream:
    """The source that a URI names. A broken file is an error; with `skip_broken` it is left out and counted."""
    uri, scheme, location, options, _ = parse_uri(uri)
    crop = options.pop("crop", False)
    module, name = FORMATS[scheme].opener.split(":")
    source = getattr(import_module(module), name)(location, uri=uri, skip_broken=skip_broken, **options)
    if crop:
        source.fingerprint = hashlib.sha256(f"{source.fingerprint} cropped".encode()).hexdigest()[:16]
        for camera in (source, *source.views.values()):
            camera.crop = True
    return source


def open_sources(uris: Sequence[str], skip_broken: bool, max_broken: int) -> tuple[list[Source | Stream], list[float]]:
    """The sources that URIs name, and their weights. Mixtures are expanded, and no two sources have the same name.

    Raises ValueError if more than `max_broken` of their files or episodes are left out.
    """
    uris = expand(uris)
    sources = named_apart([open_source(uri, skip_broken) for uri in uris])
    num_skipped = sum(source.num_skipped for source in sources)
    if num_skipped > max_broken:
        raise ValueError(
            f"max_broken={max_broken}, but {num_skipped} files or episodes cannot be read; mend the data, or allow more"
        )
    return sources, [parse_uri(uri).weight for uri in uris]


def num_views(sources: Sequence) -> int:
    """The number of cameras of all sources. Raises ValueError where they differ."""
    counts = {source.uri: 1 + len(source.views) for source in sources}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{uri} with {count}" for uri, count in counts.items())
        raise ValueError(f"data: expected sources with equally many cameras, as chosen by ?camera=A,B, got {told}")
    return next(iter(counts.values()))


def named_apart(sources: Sequence) -> list:
    """Renames sources of the same name by what differs in their URIs: the folder or the owner (`lerobot-pick-bob`),
    or else the options, or else a number."""
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
    """The parts of the path in a URI, the last of which names a source, and its options."""
    _, _, location, options, _ = parse_uri(uri)
    path = Path(location).expanduser()
    is_tar = path.name.endswith((".tar", ".tgz", ".tar.gz"))
    if path.exists() or (path.parent.is_dir() and is_tar):
        path = path.absolute()
    return (path.parent if is_tar else path).parts, sorted(options.items())


def instructions(sources: Sequence, skip_broken: bool = False, episodes: Sequence[Indices] | None = None) -> list[str]:
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
