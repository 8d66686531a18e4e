"""Shards: TAR files of episodes, `shards:DIR`, `shards:DIR/000000.tar` or `shards:DIR/{000000..000127}.tar`.

With an index beside each TAR (`hlrp.shard_index`) they are a source, whose episodes are read at random. Without
indexes, or from a URL, they are a stream.
"""

import hashlib
import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand
from torch import Tensor

from hlrp.checkpoints import contents_hash
from hlrp.contract import EncodedSource, Indices, Stream
from hlrp.shard_index import ABSENT, STATISTICS, SUFFIX, Index, Row, merge_statistics, read_index
from hlrp.streams import Episode
from hlrp.tars import Sample, as_column, read_samples, tasks_of, to_array, to_object

logger = logging.getLogger(__name__)
PLAN = "shards.json"  # the plan of a folder that hlrp.shards writes
ENDINGS = (".tar", ".tgz", ".tar.gz")  # a compressed one is streamed
LABELS = ("latent_vectors", "latent_indices")
NOT_READ = ("action", "timestamp", *LABELS)  # arrays that read() does not give


def is_url(location: str | Path) -> bool:
    return re.match(r"[a-z0-9+]+:", str(location)) is not None


def find_tars(location: str | Path) -> list[str]:
    """The TARs that a folder holds, or that a path or a URL with braces names."""
    path = Path(location).expanduser()
    if not is_url(location) and path.is_dir():
        tars = sorted(str(tar) for tar in path.iterdir() if tar.name.endswith(ENDINGS))
        if not tars:
            raise ValueError(f"shards:{location}: no .tar in this folder; python -m hlrp.shards writes some")
        return tars
    try:
        return list(braceexpand(str(location)))
    except ValueError as error:  # of braces that are not closed
        raise ValueError(f"shards:{location}: {error}; expected a pattern such as {{000000..000127}}.tar") from error


def is_indexed(location: str | Path) -> bool:
    """Whether there is an index beside any of these TARs."""
    if is_url(location):
        return False
    return any(Path(tar).expanduser().with_suffix(SUFFIX).is_file() for tar in find_tars(location))


class Members(NamedTuple):
    """The members of an episode that are no frames."""

    place: str  # where the episode is, for errors
    data: dict[str, bytes]  # kind of a member -> its bytes


class Shards(EncodedSource):
    """Episodes in TARs with indexes, as a source (`hlrp.contract`).

    dataset: which data set to read, if the folder has several.
    Every read checks the checksum of the data. Raises ValueError for files that are missing, damaged, or cut off. With
    `skip_broken`, shards whose index or size is wrong are left out, logged and counted in `num_skipped`.
    """

    def __init__(
        self, location: str | Path, uri: str | None = None, dataset: str | None = None, skip_broken: bool = False
    ):
        self.uri = uri or f"shards:{location}"
        tars = [Path(tar).expanduser() for tar in find_tars(location)]
        self.name = f"shards-{tars[0].absolute().parent.name}" + (f"-{dataset}" if dataset else "")
        indexes, errors = open_indexes(tars)
        errors += missing_shards(Path(location).expanduser(), tars)
        if errors and (not skip_broken or not indexes):
            raise ValueError(f"{self.uri}: {errors[0]}")
        for error in errors:
            logger.warning("skipped %s, %s", self.uri, error)
        self.num_skipped = len(errors)

        datasets = sorted({index.facts.get("dataset") or "" for index in indexes})
        if dataset is not None and dataset not in datasets:
            raise ValueError(f"{self.uri}: dataset={dataset}; expected one of {', '.join(datasets)}")
        self.shards = [index for index in indexes if dataset in (None, index.facts.get("dataset") or "")]
        check_alike(self.uri, self.shards)
        facts = self.shards[0].facts
        self.columns: dict[str, list[int]] = facts["columns"]
        self.read_columns = [name for name in self.columns if name not in NOT_READ]
        self.state_dim, self.action_dim = (
            int(np.prod(self.columns[name])) if name in self.columns else 0 for name in ("state", "action")
        )
        self.camera, self.latent_space = facts.get("camera") or "", facts.get("latent_space")
        self.lengths = np.concatenate([index.lengths for index in self.shards])
        self.fps = np.concatenate([index.fps for index in self.shards])
        self.first_rows = np.cumsum(self.lengths) - self.lengths
        num_episodes = [len(index.lengths) for index in self.shards]
        self.first_episodes = (np.cumsum(num_episodes) - num_episodes).tolist()  # of each shard
        self._last: tuple[int, Members] = -1, Members("", {})
        digests = b"".join(index.digest for index in self.shards)
        self.fingerprint = hashlib.sha256(digests).hexdigest()[:16]

    def encoded(self, episode: int, indices: Indices) -> list[bytes]:
        """The frames as the TAR stores them."""
        shard, row = self._locate(episode)
        length = int(self.lengths[episode])
        indices = np.asarray(indices).tolist()
        low, high = min(indices), max(indices)
        if low < 0 or high >= length:
            raise ValueError(f"{self.place(episode)}: expected frames below {length}, got {low} to {high}")
        first = int(self.first_rows[episode] - self.first_rows[episode - row])
        rows = shard.rows("frames", first + low, first + high + 1)
        rows = [rows[index - low] for index in indices]
        data = shard.read(rows, lambda row: f"frame {indices[rows.index(row)]} of episode {episode}")
        return [data[row] for row in rows]

    def about(self, episode: int, indices: Indices) -> dict:
        """What read() gives beside the frames and the task."""
        place, members = self._members(episode)
        header = to_object(members["json"], f"{place}, json") if "json" in members else {}
        columns = {name: self._rows(episode, name, indices) for name in self.read_columns}
        return columns | header.get("facts", {})  # checked when the index was made

    def instructions(self, episode: int, indices: Indices) -> list[str]:
        place, members = self._members(episode)
        header = to_object(members["json"], f"{place}, json") if "json" in members else {}
        return tasks_of(header, members.get("txt", b""), f"{place}, txt", indices)

    def actions(self, episode: int, indices: Indices) -> Tensor:
        return self._rows(episode, "action", indices)

    def states(self, episode: int, indices: Indices) -> Tensor:
        return self._rows(episode, "state", indices)

    def labels(self, episode: int, indices: Indices) -> dict[str, Tensor]:
        return {name: self._rows(episode, name, indices) for name in LABELS if name in self.columns}

    def statistics(self, name: str) -> dict[str, np.ndarray]:
        """Statistics of "state" or "action" over all frames: count, mean, std, min, max, q01, q99; float64 (n,)."""
        return merge_statistics([{key: index.table(f"{name}.{key}") for key in STATISTICS} for index in self.shards])

    def idle_scores(self, span: float) -> dict[str, np.ndarray] | None:
        """What `hlrp.idle.episode_scores` gives for all frames, in their order; None if a shard lacks this span."""
        if any(index.facts.get("idle_span") != span for index in self.shards):
            return None
        names = [name for name in self.shards[0].tables if name.startswith("idle.")]
        return {
            name.removeprefix("idle."): np.concatenate([index.table(name) for index in self.shards]) for name in names
        }

    def place(self, episode: int) -> str:
        shard, row = self._locate(episode)
        return f"{shard.tar}, episode {row} in it"

    def _locate(self, episode: int) -> tuple[Index, int]:
        """The shard that an episode is in, and its number in that shard."""
        number = bisect_right(self.first_episodes, episode) - 1
        return self.shards[number], int(episode) - self.first_episodes[number]

    def _members(self, episode: int) -> Members:
        """The members of an episode that are no frames; those of the last episode are kept."""
        if self._last[0] != episode:
            shard, row = self._locate(episode)
            rows: list[Row] = shard.rows("members", row, row + 1)
            kinds = {row: kind for row, kind in zip(rows, shard.facts["kinds"], strict=True) if row != ABSENT}
            data = shard.read(list(kinds), lambda row: f"{kinds[row]} of episode {episode}")
            members = {kind: data[row] for row, kind in kinds.items()}
            self._last = episode, Members(self.place(episode), members)
        return self._last[1]

    def _rows(self, episode: int, name: str, indices: Indices) -> Tensor:
        place, members = self._members(episode)
        array = as_column(name, to_array(members[f"{name}.npy"], f"{place}, {name}.npy"), place)
        return torch.from_numpy(array.take(indices, axis=0))


def open_shards(location: str, uri: str, skip_broken: bool, **options) -> "Shards | ShardStream":
    """Shards with indexes as a source, others as a stream. Raises ValueError for an option of the other kind."""
    kind, known = (Shards, ("dataset",)) if is_indexed(location) else (ShardStream, ("fps", "ignore"))
    if stray := sorted(set(options) - set(known)):
        what = "with indexes" if kind is Shards else "without indexes"
        raise ValueError(f"{uri}: shards {what} take {', '.join(known)}, not {', '.join(stray)}")
    return kind(location, uri, **options, skip_broken=skip_broken)


def open_indexes(tars: Sequence[Path]) -> tuple[list[Index], list[str]]:
    """The indexes beside TARs, and what is wrong with those that have none or a broken one."""

    def index_or_error(tar: Path) -> Index | str:
        path = tar.with_suffix(SUFFIX)
        if not path.is_file():
            advice = f"python -m hlrp.shards --index --output-dir {tar.parent} makes it"
            return f"{tar}: no {path.name} beside it; {advice}" if tar.is_file() else f"{tar}: no such file"
        try:
            return read_index(path)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=8) as threads:  # they wait for the disk at the same time
        results = list(threads.map(index_or_error, tars))
    return [i for i in results if isinstance(i, Index)], [error for error in results if isinstance(error, str)]


def missing_shards(folder: Path, tars: Sequence[Path]) -> list[str]:
    """A message for each shard that the folder's plan has and the folder has not; none without a plan."""
    if not (folder / PLAN).is_file():
        return []
    planned = [folder / f"{number:06d}.tar" for number in range(len(read_plan(folder)["shards"]))]
    advice = "the same python -m hlrp.shards once more writes it"
    return [f"{tar} is not there yet; {advice}" for tar in planned if tar not in set(tars)]


def read_plan(folder: Path) -> dict:
    try:
        return json.loads((folder / PLAN).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / PLAN}: not readable as JSON: {error}") from error


def check_alike(uri: str, shards: Sequence[Index]) -> None:
    """Raises ValueError, naming the data sets, if shards differ in arrays, camera or latent actions of an episode."""
    kinds: dict[str, str] = {}
    for index in shards:
        facts = index.facts
        what = json.dumps([facts["columns"], facts.get("camera"), facts.get("latent_space")])
        dataset = facts.get("dataset") or index.tar.name
        kinds.setdefault(what, f"{dataset} (arrays {facts['columns']}, camera {facts.get('camera') or 'unnamed'})")
    if len(kinds) > 1:
        raise ValueError(f"{uri}: data sets that differ: {', '.join(kinds.values())}; ?dataset=NAME picks one")


class ShardStream(Stream):
    """Episodes in TARs without indexes, also from pipe:, http(s):, s3:, gs: URLs, as a stream (`hlrp.streams`).

    fps: frame rate of episodes that have none in their JSON, and no time stamps. ignore: extensions of members to leave
    out, separated by commas.
    Raises ValueError, naming file and member, for a member that is broken, cut off, a pickle, or unknown.
    """

    def __init__(
        self,
        location: str | Path,
        uri: str | None = None,
        fps: float | None = None,
        ignore: str = "",
        skip_broken: bool = False,
    ):
        self.uri, self.urls, self.skip_broken = uri or f"shards:{location}", find_tars(location), skip_broken
        self.default_fps, self.ignore = fps, tuple(filter(None, ignore.split(",")))
        self.num_shards = len(self.urls)
        self.name = f"shards-{Path(self.urls[0]).absolute().parent.name}"
        first = self._first()
        episode = to_episode(first, fps)
        self.fps, self.camera = episode.fps, first.header.get("camera") or ""
        self.state_dim, self.action_dim = map(width, (episode.state, episode.action))
        files = [Path(url).expanduser() for url in self.urls if not is_url(url)]
        beginning = [member.data for member in first.members.values()]  # all that is known of a URL
        digest = hashlib.sha256(b"".join(beginning)).hexdigest()
        what = repr(([Path(url).name for url in self.urls], contents_hash(files), digest, self.fps, self.ignore))
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()[:16]

    def episodes(self, shard: int) -> Iterator[Episode]:
        """Raises ValueError at an unreadable episode; next() then gives the one behind it, if the TAR is whole."""
        return map(self._episode, self._samples(shard))

    def _episode(self, sample: Sample) -> Episode:
        episode = to_episode(sample, self.default_fps)
        for name, column in (("state", episode.state), ("action", episode.action)):
            if width(column) != getattr(self, f"{name}_dim"):
                raise ValueError(
                    f"{episode.name}: expected a {name} of {getattr(self, f'{name}_dim')} numbers as in the first "
                    f"episode, got {width(column)}"
                )
        if (camera := sample.header.get("camera") or "") != self.camera:
            raise ValueError(f"{episode.name}: expected camera {self.camera!r} as in the first episode, got {camera!r}")
        return episode

    def _first(self) -> Sample:
        """The first sample; with `skip_broken`, the first one of the first TAR that can be read."""
        for shard in range(self.num_shards):
            try:
                return next(self._samples(shard))
            except ValueError:  # the training reports it
                if not self.skip_broken or shard + 1 == self.num_shards:
                    raise
        raise ValueError(f"{self.uri}: it has no TAR")

    def _samples(self, shard: int) -> Iterator[Sample]:
        url = self.urls[shard]
        file = open_url(url)
        yield from read_samples(file, url, self.ignore, mode="r|*")
        try:
            file.close()
        except OSError as error:  # the command of a pipe failed
            raise ValueError(f"{url}: {error}") from error


def width(column: np.ndarray | None) -> int:
    return 0 if column is None else column.shape[1]


def open_url(url: str) -> Any:
    """Opens a path or a URL by webdataset. Raises ValueError that names it."""
    from webdataset.gopen import gopen

    try:
        return gopen(url if is_url(url) else str(Path(url).expanduser()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{url}: cannot be opened: {error}") from error


def to_episode(sample: Sample, fps: float | None) -> Episode:
    return Episode(
        f"{sample.path}: {sample.key}",
        [member.data for member in sample.frames()] if sample.video is None else sample.video,
        sample.fps(fps),
        sample.task,
        sample.columns.get("state"),
        sample.columns.get("action"),
        {name: column for name, column in sample.columns.items() if name not in ("state", *NOT_READ)},
        sample.header.get("facts", {}),
    )
