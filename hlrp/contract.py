"""The data contract: what a source, a stream and a sample are; which episodes are learned; and a shuffled order.

A **source** is a class for one format that derives from `Source`. A URI opens it (`hlrp.sources`). The constructor
builds an index and decodes nothing; decoders open at the first read, in the process that reads. Frames are numbered
from 0 in each episode, and `indices` are such numbers, in any order.

    member                        shape and unit          what it is                                       default
    uri                           str                     as the user wrote it, without the weight
    name                          str                     short, for logs and metrics
    fingerprint                   str                     hash of the data, wherever they lie
    lengths                       int64 (episodes,)       frames of each episode
    fps                           float64 (episodes,)     frames per second of each episode [1/s]
    read(episode, indices)        dict                    `frames` uint8 (t, c, h, w) in their own size;
                                                          `task` str, the instruction at the first of them;
                                                          `state` float32 (t, s) if state_dim > 0;
                                                          `point` float32 (t, 2) if known: where in the image
                                                          the thing is that the task names, x right and y down
                                                          from the middle, 1 is half the longer side;
                                                          any other tensor (t, ...) or value of the episode
    instructions(episode, indices) list[str]              the task at each frame                           ""
    camera                        str                     the camera that read() shows                     ""
    action_dim, state_dim         int                     numbers in an action and in a state              0
    actions(episode, indices)     float32 (t, a)          actions taken at these frames, if action_dim > 0
    states(episode, indices)      float32 (t, s)          the `state` of read(), if state_dim > 0
    place(episode)                str                     file of the episode and its place in it          "episode N"
    number(episode)               int                     the episode's number in a sample                 episode
    views                         {camera: Source}        further cameras, with the same episodes          {}
    uneven                        {episode: float64 (t,)} when each frame was taken [s], for episodes      {}
                                                          whose frames are not evenly spaced in time
    latent_space                  dict                    of whom and of which camera cached latent        None
                                                          actions are
    labels(episode, indices)      dict                    cached latent actions: `latent_vectors` float32
                                                          (t, e), `latent_indices` int64 (t, m) if discrete
    idle_scores(span)             dict                    precomputed scores, as `hlrp.idle` defines them  None
    num_skipped                   int                     broken files or episodes that were left out      0
    unread                        str                     columns of the data that read() leaves out       ""
    crop                          bool                    whether frames are cut to their middle square    False
                                                          before they are used, in place of letterboxed

An `EncodedSource` stores each frame on its own, in a format that `hlrp.images` decodes. It has, in place of read():

    encoded(episode, indices)     list[bytes]             the frames, not decoded
    about(episode, indices)       dict                    what read() gives beside `frames` and `task`

A `Stream` is read from one end to the other, because its data allow nothing else (`hlrp.streams`). It has uri, name,
fingerprint, camera, action_dim, state_dim and num_skipped as above, the defaults of views, uneven and latent_space,
and in place of the rest:

    num_shards                    int                     files, or parts of about equal size
    episodes(shard)               Iterator[Episode]       the episodes of a shard, in their order
    fps                           float                   frames per second of its episodes [1/s]
    skip_broken                   bool                    whether a broken episode is left out or an error False

A **sample** is a flat dict of one clip: frames of one episode at given times, counted from its first frame, t = 0.

    key             shape                  what it is
    frames          uint8 (t, c, h, w)     the frame at each time, letterboxed into a square or cut to one (crop)
    images          uint8 (v, c, h, w)     what a policy sees at t = 0, where it is asked for (input_size)
    task            str                    the instruction at t = 0
    dataset         str                    name of the source
    source          int                    number of the source
    episode, index  int                    number of the episode, and of its frame at t = 0
    place           str                    file of the episode
    fps             float                  frames per second [1/s]
    state           float32 (s,)           at t = 0
    point           float32 (2,)           at t = 0
    action          float32 (chunk, a)     from t = 0 on, one for each frame before the last time
    action_is_pad   bool (chunk,)          whether an action lies past the end of the episode
    latent_vectors  float32 (t - 1, e)     cached latent actions, where they are asked for (latent_space)
    latent_indices  int64 (t - 1, m)       and their codes
    latent_is_pad   bool (t - 1,)          whether a latent action ends past the episode, where clips may (min_times)
    ...             (2, ...) or one value  what else read() gives: at t = 0 and at the last time

A batch stacks samples (`hlrp.data.collate`). Human video has no state and no action: zeros take their place, and
action_is_pad is true. A point that is not known is nan.
"""

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from multiprocessing import parent_process
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from torch import Tensor

from hlrp.images import decode_all

logger = logging.getLogger(__name__)
NONE = MappingProxyType({})  # an empty dict that nobody can fill
Indices = Sequence[int] | np.ndarray  # numbers of frames, or of episodes


class SampleSet(Protocol):
    """Samples that have numbers, such as a list of them or a `torch.utils.data.Subset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> dict: ...


class Described(ABC):
    """What sources and streams have in common; the head of this file explains each member."""

    uri: str
    name: str
    fingerprint: str
    camera: str = ""
    action_dim: int = 0
    state_dim: int = 0
    num_skipped: int = 0
    unread: str = ""
    crop: bool = False
    views: Mapping[str, "Source"] = NONE
    uneven: Mapping[int, np.ndarray] = NONE
    latent_space: dict | None = None


class Source(Described):
    """Episodes that are read at random. The head of this file is the contract; derive a format from this class."""

    lengths: np.ndarray
    fps: np.ndarray

    @abstractmethod
    def read(self, episode: int, indices: Indices) -> dict: ...

    def instructions(self, episode: int, indices: Indices) -> list[str]:
        return [""] * len(indices)

    def actions(self, episode: int, indices: Indices) -> Tensor:
        raise NotImplementedError(f"{self.uri}: {type(self).__name__} has action_dim={self.action_dim}, but no actions")

    def states(self, episode: int, indices: Indices) -> Tensor:
        raise NotImplementedError(f"{self.uri}: {type(self).__name__} has state_dim={self.state_dim}, but no states")

    def labels(self, episode: int, indices: Indices) -> dict[str, Tensor]:
        raise NotImplementedError(f"{self.uri}: {type(self).__name__} has a latent_space, but no labels")

    def place(self, episode: int) -> str:
        return f"episode {episode}"

    def number(self, episode: int) -> int:
        return episode

    def idle_scores(self, span: float) -> dict[str, np.ndarray] | None:
        return None


class EncodedSource(Source):
    """A source whose frames are encoded one by one: those of a whole batch are decoded together."""

    @abstractmethod
    def encoded(self, episode: int, indices: Indices) -> list[bytes]: ...

    @abstractmethod
    def about(self, episode: int, indices: Indices) -> dict: ...

    def read(self, episode: int, indices: Indices) -> dict:
        frames = decode_all(self.encoded(episode, indices), lambda i: f"{self.place(episode)}, frame {indices[i]}")
        task = self.instructions(episode, indices)[0]
        return {"frames": frames, "task": task} | self.about(episode, indices)


class Stream(Described):
    """Episodes that pass by in the order of their files. The head of this file is the contract."""

    fps: float
    num_shards: int
    skip_broken: bool = False

    @abstractmethod
    def episodes(self, shard: int) -> Iterator[Any]: ...


class EpisodeRange(NamedTuple):
    """The episodes of a stream whose hash lies in [low, high). No look at the whole stream is needed."""

    seed: int
    low: float
    high: float

    def __contains__(self, episode) -> bool:
        return self.low <= hash_integers(self.seed, 3, episode)[0] / 2**64 < self.high


@lru_cache
def tell_once(message: str) -> None:
    """Warns of it once, in the first of all processes."""
    if parent_process() is None and os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)


class Column(NamedTuple):
    """Some of the numbers of a column."""

    path: str
    range: slice

    def __str__(self) -> str:
        start, stop = ("" if end is None else end for end in (self.range.start, self.range.stop))
        return self.path if self.range == slice(None) else f"{self.path}[{start}:{stop}]"


def parse_columns(uri: str, setting: str, keys: str) -> list[Column]:
    """`KEY,KEY[:7]` as columns, each with a range of its numbers or whole; "" is none."""
    columns = []
    for key in filter(None, keys.split(",")):
        found = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+)?:(-?\d+)?\])?", key)
        if found is None:
            raise ValueError(f"{uri}: {setting}={key}; expected a key, or a range of its numbers such as KEY[:7]")
        columns.append(Column(found[1], slice(*(int(end) if end else None for end in found.groups()[1:]))))
    return columns


@overload
def split_episodes(source: Source, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]: ...
@overload
def split_episodes(source: Stream, val_fraction: float, seed: int) -> tuple[EpisodeRange, EpisodeRange]: ...
def split_episodes(source: Source | Stream, val_fraction: float, seed: int):
    """Whole episodes for training and for validation: disjoint, at least one each. For a stream, two ranges.

    The split follows from the source, the fraction and the seed alone: all stages hold out the same episodes. Each side
    has at least one typical episode, see `is_typical`, if two or more episodes are typical.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}; expected a share between 0 and 1")
    if isinstance(source, Stream):
        return EpisodeRange(seed, val_fraction, 1.0), EpisodeRange(seed, 0.0, val_fraction)
    num_episodes = len(source.lengths)
    if num_episodes < 2:
        raise ValueError(f"{source.uri}: {num_episodes} episode; expected 2 or more, for training and validation")
    num_val = min(max(round(val_fraction * num_episodes), 1), num_episodes - 1)
    shuffled = np.random.default_rng(seed).permutation(num_episodes)
    typical = np.flatnonzero(is_typical(source)[shuffled])
    if len(typical) > 1 and typical[0] >= num_val:
        shuffled[[0, typical[0]]] = shuffled[[typical[0], 0]]
    elif len(typical) > 1 and typical[-1] < num_val:
        shuffled[[-1, typical[-1]]] = shuffled[[typical[-1], -1]]
    return np.sort(shuffled[num_val:]), np.sort(shuffled[:num_val])


def is_typical(source: Source) -> np.ndarray:
    """Whether each episode may have the clips that its source is used for, bool (episodes,): it lasts at least half as
    long as the mean episode, or 10 s, and has at least half the mean frame rate."""
    seconds = (source.lengths - 1) / source.fps
    return (seconds >= min(seconds.mean() / 2, 10.0)) & (source.fps >= source.fps.mean() / 2)


def too_coarse(fps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Whether the frame nearest to each time is off by more than a fifth of that time, bool (episodes, times)."""
    exact = np.outer(fps, times)
    return np.abs(np.rint(exact) - exact) > 0.2 * exact + 1e-9


def labelled_episodes(
    source: Source | Stream,
    episodes: np.ndarray | EpisodeRange,
    demonstrations: int | None,
    label_fraction: float,
    seed: int,
) -> np.ndarray | EpisodeRange:
    """The training episodes whose actions stages 1 and 2 learn: `demonstrations` of each task, the same ones that a
    policy learns, or else the share `label_fraction` of each task (`labelled_share`).

    Raises ValueError for demonstrations of a stream, and for a task that has fewer.
    """
    if demonstrations is None:
        return labelled_share(source, episodes, label_fraction, seed)
    if isinstance(source, Stream) and source.action_dim:
        raise ValueError(
            f"demonstrations={demonstrations}, but {source.uri} is a stream, whose tasks are not known before; give "
            f"--label-fraction, or make a source with python -m hlrp.shards --data '{source.uri}'"
        )
    return choose_demonstrations(source, episodes, demonstrations, seed)


def choose_demonstrations(source: Source | Stream, episodes, per_task: int | None, seed: int) -> np.ndarray:
    """Draws `per_task` of the `episodes` of each task; a smaller number is part of a larger one. None: all of them.

    A source without actions has no demonstrations, and neither has a stream, which cannot be read at random. The task
    of an episode is its first instruction that is not empty. Raises ValueError for a task that has fewer episodes.
    """
    if not source.action_dim or isinstance(source, Stream):
        return np.zeros(0, dtype=np.int64)
    if per_task is None:
        return np.asarray(episodes)
    by_task = shuffled_by_task(source, episodes, seed)
    for task, of_task in by_task.items():
        if len(of_task) < per_task:
            raise ValueError(
                f"demonstrations={per_task}, but {source.uri} has {len(of_task)} training episodes of {task!r}"
            )
    return np.sort([episode for of_task in by_task.values() for episode in of_task[:per_task]])


def labelled_share(
    source: Source | Stream, episodes: np.ndarray | EpisodeRange, share: float, seed: int
) -> np.ndarray | EpisodeRange:
    """Draws this share of the episodes of each task, at least one; a smaller share is part of a larger one.

    All episodes whose task is unique count as one group. For a stream it is a share of the hashes.
    """
    if isinstance(episodes, EpisodeRange):
        return episodes._replace(high=episodes.low + share * (episodes.high - episodes.low))
    if share in (0, 1) or not source.action_dim:
        return np.asarray(episodes)[: round(share * len(episodes))]
    assert not isinstance(source, Stream)  # its episodes are a range
    groups = [*shuffled_by_task(source, episodes, seed).values()]
    unique = [episode for group in groups if len(group) == 1 for episode in group]
    groups = [*(group for group in groups if len(group) > 1), unique]
    return np.sort([episode for group in groups for episode in group[: max(1, round(share * len(group)))]])


def shuffled_by_task(source: Source, episodes: Indices, seed: int) -> dict[str, list[int]]:
    """The episodes of each task, in a random order that follows from the episodes and the seed."""
    by_task: dict[str, list[int]] = {}
    for episode in np.random.default_rng(seed).permutation(episodes).tolist():
        texts = source.instructions(episode, range(source.lengths[episode]))
        by_task.setdefault(next(filter(None, texts), ""), []).append(episode)
    return by_task


def hash_integers(*parts: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits of some integers, uint64; arrays broadcast. Every version of numpy gives the same.

    SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"), chained over the parts.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends `index`; each key is another permutation.

    No state is kept, and no list of all indices: any place of a shuffled range is computed alone. A Feistel network
    permutes the next power of four; what falls outside the range walks on until it is inside (Black & Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains").

    index: int64 (n,) in range(size); key: uint64 (n,); returns int64 (n,).
    """
    half_bits = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    x = index.astype(np.uint64)
    walking = np.ones(len(x), dtype=bool)
    while walking.any():
        left, right = x[walking] >> half_bits, x[walking] & half_mask
        for feistel_round in range(4):
            left, right = right, left ^ (hash_integers(key[walking], feistel_round, right) & half_mask)
        x[walking] = (left << half_bits) | right
        walking = x >= size
    return x.astype(np.int64)
