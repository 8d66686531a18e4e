"""Clips of a stream, which is read from one end to the other; `hlrp.contract` says what a stream is.

The readers (the loader's workers on all ranks) share the shards. Each reader keeps a buffer of encoded episodes and
draws clips from it at random, each clip once an epoch. So the order of the clips also depends on the number of
readers. A resumed run starts at the beginning of a shard, and sees again what was already read of it and of later ones.
"""

import hashlib
import logging
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, islice
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hlrp.clips import Clips, Sizes
from hlrp.contract import EpisodeRange, Indices, Source, hash_integers, permute, too_coarse
from hlrp.images import decode_all

logger = logging.getLogger(__name__)
BUFFER_SIZE = 64 * 2**20  # of encoded frames that a reader draws from [byte]
OPEN_SHARDS = 32  # from which a few episodes are taken in turn
MAX_EPISODES = 1_000_000  # in a shard; sample["episode"] is shard * this + the place in the shard


class LateFrames(Sequence[bytes]):
    """Encoded frames of an episode that are made when they are asked for; nbytes is their size in memory."""

    nbytes: int
    name: str  # for errors

    def decoded(self, indices: Indices) -> Tensor:
        """uint8 (t, c, h, w)"""
        return decode_all([self[i] for i in indices], lambda i: f"{self.name}, frame {indices[i]}")


class VideoFrames(LateFrames):
    """The frames of a video file in memory, at its mean rate as `hlrp.videos.VideoReader.grid` has them. Raises
    ValueError, which begins with `name`, where it cannot be read."""

    def __init__(self, data: bytes, name: str):
        self.data, self.name, self.nbytes = data, name, len(data)
        with self.naming():
            reader = open_in_memory(self, os.getpid())
            self.fps, self.length = reader.index.fps, len(reader.grid)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> bytes:
        from torchvision.io import encode_png

        return encode_png(self.decoded([index])[0].contiguous(), compression_level=1).numpy().tobytes()

    def decoded(self, indices: Indices) -> Tensor:
        with self.naming():
            reader = open_in_memory(self, os.getpid())
            return reader.numbered(reader.grid[np.asarray(indices)])

    @contextmanager
    def naming(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(re.sub(r"/proc/self/fd/\d+", lambda _: self.name, str(error))) from error


@lru_cache(maxsize=4)
def open_in_memory(frames: VideoFrames, process: int):
    """A reader of a file that lies in memory alone, opened once in each process."""
    from hlrp.videos import VideoReader

    with open(os.memfd_create("video"), "wb", closefd=False) as file:
        file.write(frames.data)
        descriptor = file.fileno()
    try:
        reader = VideoReader(f"/proc/self/fd/{descriptor}")
    except ValueError:
        os.close(descriptor)
        raise
    weakref.finalize(reader, os.close, descriptor)  # it may open the file again
    return reader


@dataclass
class Episode:
    """One whole episode whose frames are still encoded. Its methods are those of a source, for this one episode."""

    name: str  # its file and its place there, for errors
    frames: Sequence[bytes]  # in a format that `hlrp.images.decode` reads
    fps: float
    task: str | Sequence[str] = ""  # for the whole episode, or for each frame
    state: np.ndarray | None = None  # float32 (t, s)
    action: np.ndarray | None = None  # float32 (t, a)
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # other arrays (t, ...), one row for each frame
    facts: dict = field(default_factory=dict)  # other JSON values, each for the whole episode

    def __post_init__(self):
        if not self.frames:
            raise ValueError(f"{self.name}: an episode without frames")
        for key, column in (("state", self.state), ("action", self.action), ("task", self.task)):
            if column is not None and not isinstance(column, str) and len(column) != len(self.frames):
                raise ValueError(f"{self.name}: {len(self.frames)} frames, but {key} has {len(column)} rows")

    @property
    def size(self) -> int:
        """Memory of its frames [byte]."""
        return self.frames.nbytes if isinstance(self.frames, LateFrames) else sum(map(len, self.frames))

    def read(self, indices: Indices) -> dict:
        if isinstance(self.frames, LateFrames):
            frames = self.frames.decoded(indices)
        else:
            frames = decode_all([self.frames[i] for i in indices], lambda i: f"{self.name}, frame {indices[i]}")
        read: dict = {"frames": frames, "task": self.instructions(indices)[0]}
        if self.state is not None:
            read["state"] = self.states(indices)
        for name, column in self.columns.items():
            read[name] = torch.from_numpy(column[np.asarray(indices)])
        return read | self.facts

    def instructions(self, indices: Indices) -> list[str]:
        return [self.task if isinstance(self.task, str) else self.task[i] for i in indices]

    def actions(self, indices: Indices) -> Tensor:
        assert self.action is not None
        return torch.from_numpy(self.action[np.asarray(indices)])

    def states(self, indices: Indices) -> Tensor:
        assert self.state is not None
        return torch.from_numpy(self.state[np.asarray(indices)])


class InMemory(Source):
    """Episodes of a stream in memory, as a source."""

    def __init__(self, stream, episodes: Sequence[Episode], numbers: Sequence[int]):
        self.uri, self.name, self.camera = stream.uri, stream.name, stream.camera
        self.fingerprint, self.crop = stream.fingerprint, stream.crop
        self.state_dim, self.action_dim = stream.state_dim, stream.action_dim
        self.episodes, self.episode_numbers = list(episodes), list(numbers)
        self.lengths = np.array([len(episode.frames) for episode in self.episodes])
        self.fps = np.array([episode.fps for episode in self.episodes])

    def read(self, episode: int, indices: Indices) -> dict:
        return self.episodes[episode].read(indices)

    def instructions(self, episode: int, indices: Indices) -> list[str]:
        return self.episodes[episode].instructions(indices)

    def place(self, episode: int) -> str:
        return self.episodes[episode].name

    def number(self, episode: int) -> int:
        return self.episode_numbers[episode]

    def actions(self, episode: int, indices: Indices) -> Tensor:
        return self.episodes[episode].actions(indices)

    def states(self, episode: int, indices: Indices) -> Tensor:
        return self.episodes[episode].states(indices)

    def forget_all_but(self, frames: dict[int, set[int]]) -> None:
        """Frees all frames of each episode but these."""
        for number, episode in enumerate(self.episodes):
            kept = frames.get(number, ())
            episode.frames = [episode.frames[i] if i in kept else b"" for i in range(len(episode.frames))]


class StreamClips:
    """Clips of the episodes of a stream that lie in a range. The settings are those of `hlrp.clips.Clips`."""

    def __init__(
        self,
        source,
        episodes: EpisodeRange,
        times: Sequence[float] = (0.0, 0.5),
        image_size: int = 224,
        source_index: int = 0,
        labelled_episodes: EpisodeRange | Indices | None = None,
        seed: int = 0,
        **settings,
    ):
        """Raises ValueError for settings that need random access: cached latent actions, and a choice of frames."""
        for name in ("latent_space", "frames"):
            if settings.get(name) is not None:
                raise ValueError(
                    f"{source.uri} is a stream, for which {name} cannot be given; "
                    f"make a source with python -m hlrp.shards --data '{source.uri}'"
                )
        self.source, self.episodes, self.source_index, self.seed = source, episodes, source_index, seed
        self.labelled_episodes = episodes if labelled_episodes is None else labelled_episodes
        self.times, self.image_size, self.settings = np.asarray(times, dtype=np.float64), image_size, settings
        self.name = settings.get("name") or source.name
        chunk_size = settings.get("chunk_size") or round(source.fps * times[-1])
        self.has_told = False
        self.skipped: list[str] = []  # what was left out since this was emptied
        self.sizes = Sizes(source.state_dim, source.action_dim, chunk_size if source.action_dim else 0)
        self.read_from(0, reader=0, num_readers=1)

    def read_from(self, start: int, reader: int, num_readers: int) -> None:
        """Starts again at turn `start` of the endless sequence of shards, as one of several readers."""
        self.start, self.reader, self.num_readers = start, reader, num_readers
        self.buffer: list[Waiting] = []
        self.at = start + (reader - start) % num_readers  # the turn that is being read
        self.rng = np.random.default_rng([self.seed, self.source_index, start, reader])
        self.arriving = self.arrive()

    def shard(self, turn: int) -> int:
        """The shard at this turn of the endless sequence. An epoch has every shard once, in an order of its own."""
        epoch, place = divmod(turn, self.source.num_shards)
        key = hash_integers(self.seed, 4, self.source_index, epoch)
        return int(permute(np.array([place]), self.source.num_shards, key)[0])

    def draw(self, count: int) -> list[dict]:
        """The next `count` samples. The number of an episode is its shard * `MAX_EPISODES` + its place there."""
        samples, fruitless = [], None  # since which turn nothing could be read
        while len(samples) < count:
            while not self.buffer or (self.has_room() and self.at - self.turn < self.source.num_shards):
                self.buffer.append(next(self.arriving))
            left = np.cumsum([len(waiting.order) for waiting in self.buffer])
            chosen = int(np.searchsorted(left, self.rng.integers(left[-1]), side="right"))
            waiting = self.buffer[chosen]
            try:
                samples.append(waiting.clips[waiting.order.pop()])
                fruitless = None
            except ValueError as error:
                self.leave_out(str(error), error)
                waiting.order.clear()
                fruitless = waiting.turn if fruitless is None else fruitless
                if waiting.turn - fruitless > 2 * self.source.num_shards:
                    raise ValueError(f"{self.source.uri}: none of its clips can be read: {error}") from error
            if not waiting.order:
                self.buffer[chosen] = self.buffer[-1]
                self.buffer.pop()
        return samples

    def has_room(self) -> bool:
        return sum(waiting.size for waiting in self.buffer) < BUFFER_SIZE

    @property
    def turn(self) -> int:
        """The earliest turn whose clips this reader has not used up."""
        return min((waiting.turn for waiting in self.buffer), default=self.at)

    def arrive(self) -> Iterator["Waiting"]:
        """The episodes of this reader's shards, epoch after epoch."""
        fruitless = set()
        while True:
            shard = self.shard(self.at)
            fruitless.add(shard)
            for number, episode in self.part(shard):
                try:
                    clips = self.clips_of([episode], [number])
                    self.check_chunk(clips)
                except ValueError as error:
                    self.leave_out(f"{episode.name}: {error}", error)
                    continue
                fruitless.clear()
                order = self.rng.permutation(len(clips)).tolist()
                yield Waiting(self.at, clips, order, episode.size)
            if len(fruitless) == self.source.num_shards:
                raise ValueError(self.nothing())
            self.at += self.num_readers

    def leave_out(self, message: str, error: Exception) -> None:
        """Adds the message to `skipped` if the source may skip what is broken; raises ValueError else."""
        if not self.source.skip_broken:
            raise ValueError(message) from error
        self.skipped.append(message)

    def check_chunk(self, clips: Clips) -> None:
        if clips.sizes.chunk > self.sizes.chunk:
            raise ValueError(
                f"{clips.source.fps[0]:g} fps make {clips.sizes.chunk} actions of {self.times[-1]:g} s, the "
                f"{self.source.fps:g} fps of the first episode {self.sizes.chunk}; make a source with hlrp.shards"
            )

    def nothing(self) -> str:
        return (
            f"{self.source.uri}: none of its episodes in {self.episodes} lasts {self.times[-1]:g} s, "
            f"or they have no frames {self.times[1:].tolist()} s apart; set another delta or val_fraction"
        )

    @property
    def fingerprint(self) -> str:
        """A hash of what the clips are."""
        labelled = tuple(self.labelled_episodes)
        what = (self.source.fingerprint, self.episodes, labelled, self.times.tolist(), self.image_size)
        settings = sorted((name, value) for name, value in self.settings.items() if name != "name")
        return hashlib.sha256(repr((what, settings)).encode()).hexdigest()[:16]

    def part(self, shard: int) -> Iterator[tuple[int, Episode]]:
        """The episodes of a shard that lie in the range and are long enough for a clip, with their numbers.

        The first episode whose frames are too far apart is logged. Faults are treated as in `readable`.
        """
        shortest = self.times[(self.settings.get("min_times") or len(self.times)) - 1]
        for number, episode in readable(self.source, shard, self.skipped):
            if number not in self.episodes or len(episode.frames) <= round(episode.fps * shortest):
                continue
            if too_coarse(np.array([episode.fps]), self.times).any():
                if not self.has_told:
                    reason = f"at {episode.fps:g} fps no frames lie {self.times.tolist()} s apart"
                    logger.warning("%s: left out %s, and any like it: %s", self.source.uri, episode.name, reason)
                self.has_told = True
                continue
            yield number, episode

    def clips_of(self, episodes: Sequence[Episode], numbers: Sequence[int]) -> Clips:
        """The clips of these episodes, held in memory."""
        labelled = [i for i, number in enumerate(numbers) if number in self.labelled_episodes]
        common = {"source_index": self.source_index, "labelled_episodes": labelled}
        every = range(len(episodes))
        return Clips(
            InMemory(self.source, episodes, numbers), every, self.times, self.image_size, **common, **self.settings
        )

    def hold(self, num_episodes: int) -> Clips:
        """The clips of some episodes from many shards, in memory, for validation and statistics."""
        numbered = sorted(islice(in_turns(self.source.num_shards, self.part), num_episodes), key=itemgetter(0))
        if not numbered:
            raise ValueError(self.nothing())
        numbers, episodes = zip(*numbered, strict=True)
        return self.clips_of(episodes, numbers)


def in_turns(num_shards: int, part: Callable[[int], Iterator[tuple[int, Episode]]]) -> Iterator[tuple[int, Episode]]:
    """The episodes of a stream, taken in turn from `OPEN_SHARDS` shards spread over all of it. So all tasks are among
    the first episodes, even if the shards are sorted by task."""
    evenly = (np.arange(num_shards) * 0.6180339887498949) % 1  # any stretch of this order is spread over all shards
    waiting = map(part, evenly.argsort().tolist())
    active = deque(islice(waiting, OPEN_SHARDS))
    while active:
        episodes = active.popleft()
        if (pair := next(episodes, None)) is None:
            active.extend(islice(waiting, 1))
        else:
            yield pair
            active.append(episodes)


def readable(source, shard: int, skipped: list[str] | None = None) -> Iterator[tuple[int, Episode]]:
    """The episodes of a shard with their numbers.

    With the source's `skip_broken`, a fault is a message in `skipped`, and the next episode follows if the source finds
    it. Without, it raises ValueError.
    """
    episodes = iter(source.episodes(shard))
    for number in count(shard * MAX_EPISODES):
        try:
            yield number, next(episodes)
        except StopIteration:
            return
        except (ValueError, OSError) as error:
            message = f"{source.uri}, shard {shard}: {error}"
            if not source.skip_broken:
                raise ValueError(message) from error
            if skipped is not None:
                skipped.append(message)


def clips_of(source, episodes, *args, seed: int = 0, **settings) -> Clips | StreamClips:
    """The clips of episodes that `split_episodes` gave, of a source or a stream."""
    if isinstance(episodes, EpisodeRange):
        return StreamClips(source, episodes, *args, seed=seed, **settings)
    return Clips(source, episodes, *args, **settings)


class Waiting(NamedTuple):
    """An episode in the buffer."""

    turn: int  # of its shard, in the endless sequence
    clips: Clips
    order: list[int]  # of the clips that are still to be drawn
    size: int  # [byte]
