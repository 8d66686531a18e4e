"""Streams: sources that are read from one end to the other, and whose episodes pass by once an epoch.

A streaming source has, in place of lengths and of read(episode, ...) (see `hlrp.contract`):
    num_shards                              int: files, or parts of about equal size
    episodes(shard) -> Iterator[Episode]    in the order in which they lie in it
    fps                                     float: of its episodes

Readers (the loader's workers, on all ranks) share its shards out. Each keeps a buffer of episodes, still encoded, and
draws clips from it at random, each clip once an epoch. So the order follows from the number of readers, too, and a
resumed run goes on at the beginning of a shard: what was read of it and of later ones is seen again.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hlrp.clips import Clips, Sizes
from hlrp.contract import EpisodeRange, Source, hash_integers, permute, too_coarse
from hlrp.images import decode_all

logger = logging.getLogger(__name__)
BUFFER_SIZE = 64 * 2**20  # of encoded frames that a reader draws from [byte]
OPEN_SHARDS = 32  # from which a few episodes are taken in turn
MAX_EPISODES = 1_000_000  # in a shard; sample["episode"] is shard * this + the place in the shard


class LateFrames(Sequence[bytes]):
    """Encoded frames of an episode that are made when they are asked for; nbytes is their size in memory."""

    nbytes: int


@dataclass
class Episode:
    """One whole episode, its frames still encoded; read, actions, states as a source has them, without its number."""

    name: str  # the file that it comes from, and its place there: what an error says
    frames: Sequence[bytes]  # as `hlrp.images.decode` knows them
    fps: float
    task: str | Sequence[str] = ""  # one for the episode, or of each frame
    state: np.ndarray | None = None  # float32 (t, s)
    action: np.ndarray | None = None  # float32 (t, a)
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # of whatever else is known of each frame, (t, ...)
    facts: dict = field(default_factory=dict)  # whatever else is known: one JSON value for the episode each

    def __post_init__(self):
        if not self.frames:
            raise ValueError(f"{self.name}: an episode without frames")
        for key, column in (("state", self.state), ("action", self.action), ("task", self.task)):
            if column is not None and not isinstance(column, str) and len(column) != len(self.frames):
                raise ValueError(f"{self.name}: {len(self.frames)} frames, but {key} has {len(column)} rows")

    @property
    def size(self) -> int:
        """Of its frames [byte]."""
        return self.frames.nbytes if isinstance(self.frames, LateFrames) else sum(map(len, self.frames))

    def read(self, indices: Sequence[int]) -> dict:
        frames = decode_all([self.frames[i] for i in indices], lambda i: f"{self.name}, frame {indices[i]}")
        read: dict = {"frames": frames}
        if self.state is not None:
            read["state"] = self.states(indices)
        for name, column in self.columns.items():
            read[name] = torch.from_numpy(column[np.asarray(indices)])
        return read | self.facts

    def instructions(self, indices: Sequence[int]) -> list[str]:
        return [self.task if isinstance(self.task, str) else self.task[i] for i in indices]

    def actions(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.action[np.asarray(indices)])

    def states(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.state[np.asarray(indices)])


class Held(Source):
    """Some episodes of a stream in memory: a source as any other."""

    def __init__(self, stream, episodes: Sequence[Episode], numbers: Sequence[int]):
        self.uri, self.name, self.camera, self.fingerprint = (
            stream.uri,
            stream.name,
            stream.camera,
            stream.fingerprint,
        )
        self.state_dim, self.action_dim = stream.state_dim, stream.action_dim
        self.episodes, self.episode_numbers = list(episodes), list(numbers)
        self.lengths = np.array([len(episode.frames) for episode in self.episodes])
        self.fps = np.array([episode.fps for episode in self.episodes])

    def read(self, episode: int, indices: Sequence[int]) -> dict:
        return self.episodes[episode].read(indices)

    def instructions(self, episode: int, indices: Sequence[int]) -> list[str]:
        return self.episodes[episode].instructions(indices)

    def place(self, episode: int) -> str:
        return self.episodes[episode].name

    def number(self, episode: int) -> int:
        return self.episode_numbers[episode]

    def actions(self, episode: int, indices: Sequence[int]) -> Tensor:
        return self.episodes[episode].actions(indices)

    def states(self, episode: int, indices: Sequence[int]) -> Tensor:
        return self.episodes[episode].states(indices)

    def forget_all_but(self, frames: dict[int, set[int]]) -> None:
        """Frees the frames of each episode that are not among these."""
        for number, episode in enumerate(self.episodes):
            kept = frames.get(number, ())
            episode.frames = [episode.frames[i] if i in kept else b"" for i in range(len(episode.frames))]


class StreamClips:
    """Clips of those episodes of a stream that lie in a range; the settings are those of `hlrp.clips.Clips`."""

    def __init__(
        self,
        source,
        episodes: EpisodeRange,
        times: Sequence[float] = (0.0, 0.5),
        image_size: int = 224,
        source_index: int = 0,
        labelled_episodes: EpisodeRange | Sequence[int] | None = None,
        seed: int = 0,
        **settings,
    ):
        """Raises ValueError where a setting needs random access: cached latent actions, idle frames left out."""
        for name in ("latent_space", "frames"):
            if settings.get(name) is not None:
                raise ValueError(
                    f"{source.uri} is a stream, for which {name} cannot be given; "
                    f"python -m hlrp.shards --data '{source.uri}' makes a source that fits"
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
        """Reads, as one of several, from the start of that shard of the endless sequence of epochs."""
        self.start, self.reader, self.num_readers = start, reader, num_readers
        self.buffer: list[Waiting] = []
        self.at = start + (reader - start) % num_readers  # the shard that is being read
        self.rng = np.random.default_rng([self.seed, self.source_index, start, reader])
        self.arriving = self.arrive()

    def shard(self, turn: int) -> int:
        """The shard at a place of the endless sequence: all of them once an epoch, each in an order of its own."""
        epoch, place = divmod(turn, self.source.num_shards)
        key = hash_integers(self.seed, 4, self.source_index, epoch)
        return int(permute(np.array([place]), self.source.num_shards, key)[0])

    def draw(self, count: int) -> list[dict]:
        """The next samples, as those of `Clips`, but with the episode numbered by its shard and its place in it."""
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
        """The earliest shard of the endless sequence that this reader has not used up."""
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
        """Tells it in `skipped`, with the source's `skip_broken`; else raises ValueError."""
        if not self.source.skip_broken:
            raise ValueError(message) from error
        self.skipped.append(message)

    def check_chunk(self, clips: Clips) -> None:
        if clips.sizes.chunk > self.sizes.chunk:
            raise ValueError(
                f"{clips.source.fps[0]:g} fps make {clips.sizes.chunk} actions of {self.times[-1]:g} s, the "
                f"{self.source.fps:g} fps of the first episode {self.sizes.chunk}; hlrp.shards makes a source that fits"
            )

    def nothing(self) -> str:
        return (
            f"{self.source.uri}: none of its episodes in {self.episodes} lasts {self.times[-1]:g} s, "
            f"or they have no frames {self.times[1:].tolist()} s apart; another delta or another val_fraction fits"
        )

    @property
    def fingerprint(self) -> str:
        """A hash of what the clips are."""
        labelled = tuple(self.labelled_episodes)
        what = (self.source.fingerprint, self.episodes, labelled, self.times.tolist(), self.image_size)
        settings = sorted((name, value) for name, value in self.settings.items() if name != "name")
        return hashlib.sha256(repr((what, settings)).encode()).hexdigest()[:16]

    def part(self, shard: int) -> Iterator[tuple[int, Episode]]:
        """The episodes of a shard that belong here and are long enough for a clip, with their numbers. It warns of the
        first whose frames are too far apart.

        With the source's `skip_broken`, faults are told in `skipped`, and it goes on behind them where the source can.
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
            Held(self.source, episodes, numbers), every, self.times, self.image_size, **common, **self.settings
        )

    def hold(self, num_episodes: int) -> Clips:
        """The clips of some episodes of many shards, held in memory: what validation and statistics are taken from."""
        numbered = sorted(islice(in_turns(self.source.num_shards, self.part), num_episodes), key=itemgetter(0))
        if not numbered:
            raise ValueError(self.nothing())
        numbers, episodes = zip(*numbered, strict=True)
        return self.clips_of(episodes, numbers)


def in_turns(num_shards: int, part: Callable[[int], Iterator[tuple[int, Episode]]]) -> Iterator[tuple[int, Episode]]:
    """The episodes of a stream, one at a time of each of up to `OPEN_SHARDS` shards all over it: of tasks that lie one
    after another, each is among the first."""
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
    """The episodes of a shard with their numbers. Faults are told in `skipped` with the source's `skip_broken`, and it
    goes on behind them where the source can; else they raise ValueError."""
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
    """The clips of some episodes of any source, as `split_episodes` gives them."""
    if isinstance(episodes, EpisodeRange):
        return StreamClips(source, episodes, *args, seed=seed, **settings)
    return Clips(source, episodes, *args, **settings)


class Waiting(NamedTuple):
    """An episode in the buffer."""

    turn: int  # of its shard, in the endless sequence
    clips: Clips
    order: list[int]  # of the clips that are still to be drawn
    size: int  # [byte]
