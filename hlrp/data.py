"""The endless mixture of clips that training reads, its loader, and the clips that validation reads.

`hlrp.contract` says what a source, a sample and a batch are.
"""

import atexit
import hashlib
import itertools
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from math import gcd
from multiprocessing import active_children
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from hlrp.clips import Clips, Sizes, refuse_not_finite
from hlrp.contract import EpisodeRange, Indices, SampleSet, hash_integers, labelled_episodes, permute, split_episodes
from hlrp.images import stacked
from hlrp.metrics import column_statistics, normalisable
from hlrp.streams import InMemory, StreamClips, clips_of

logger = logging.getLogger(__name__)
STRIDE = 7919  # a broken clip gives way to the clip so many places later, which rarely is of the same episode
MAX_STEPS = 1000  # strides without a clip that can be read, until the source is called broken
MAX_EPISODES = 1000  # whose actions make the statistics


def action_statistics(clips) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation float32 (a,) of the actions in the labelled episodes, at most `MAX_EPISODES` of them,
    after `hlrp.metrics.normalisable`. Without actions they are 0 and 1."""
    clips = in_memory(clips, num_episodes=256) if clips.source.action_dim else clips
    source = clips.source
    episodes = np.random.default_rng(0).permutation(clips.labelled_episodes)[:MAX_EPISODES]
    if not source.action_dim or not len(episodes):
        return torch.zeros(source.action_dim), torch.ones(source.action_dim)
    statistics = normalisable(column_statistics(whole_column(source, "actions", np.sort(episodes))))
    return torch.from_numpy(statistics["mean"]).float(), torch.from_numpy(statistics["std"]).float()


def whole_column(source, name: str, episodes: Indices) -> np.ndarray:
    """All `actions` or `states` of these episodes, (frames, d). Raises ValueError if a number is not finite."""
    parts = []
    for episode in map(int, episodes):
        column = source.actions if name == "actions" else source.states
        part = column(episode, np.arange(source.lengths[episode])).numpy()
        refuse_not_finite(f"{source.uri}, episode {episode}: {name.removesuffix('s')}", part)
        parts.append(part)
    return np.concatenate(parts)


def read_clips(clips: Clips, indices: Indices, skip_broken: bool) -> tuple[list[dict], list[str]]:
    """The clips at `indices`, and messages about broken ones: with `skip_broken`, other clips take their places."""
    try:
        return clips.__getitems__(indices), []
    except ValueError:
        if not skip_broken:
            raise
        skipped = []
        return [read_or_next(clips, int(index), skipped) for index in indices], skipped


def read_or_next(clips: Clips, index: int, skipped: list[str]) -> dict:
    """The clip at `index`, or the next one that can be read, in strides through all clips."""
    stride = next(n for n in itertools.count(STRIDE) if gcd(n, len(clips)) == 1)
    for step in range(min(len(clips), MAX_STEPS)):
        try:
            return clips[(index + step * stride) % len(clips)]
        except ValueError as error:
            skipped.append(str(error))
    raise ValueError(f"{clips.source.uri}: none of {step + 1} clips all over it can be read: {skipped[-1]}")


def subset(samples: SampleSet, numbers: Sequence[int]) -> Subset:
    """The samples of these numbers. torch asks for its own `Dataset`, but any set of samples will do."""
    return Subset(cast(Dataset, samples), numbers)


class Chosen(Subset):
    """A choice of clips. With `skip_broken`, another clip takes the place of a broken one, which is logged."""

    dataset: Any  # `Clips`, or what reads as they do

    def __init__(self, clips: Clips, indices: Sequence[int], skip_broken: bool):
        super().__init__(clips, indices)
        self.skip_broken, self.sizes = skip_broken, clips.sizes

    def __getitem__(self, place: int, /) -> dict:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict]:
        samples, skipped = read_clips(self.dataset, [self.indices[i] for i in places], self.skip_broken)
        for message in skipped:
            logger.warning("skipped %s", message)
        return samples


def choose_clips(clips, max_clips: int, seed: int, skip_broken: bool = False) -> Chosen:
    """At most `max_clips` clips, one drawn from each of that many equal stretches. A stream gives eight clips for each
    of its first episodes, whose other frames are freed."""
    everywhere = clips
    clips = in_memory(clips, num_episodes=-(-max_clips // 8))
    borders = np.linspace(0, len(clips), min(max_clips, len(clips)) + 1).astype(np.int64)
    chosen = np.random.default_rng(seed).integers(borders[:-1], borders[1:]).tolist()
    if clips is not everywhere:
        assert isinstance(clips.source, InMemory)
        clips.source.forget_all_but(clips.frames_of(chosen))
    return Chosen(clips, chosen, skip_broken)


def in_memory(clips, num_episodes: int) -> Clips:
    """Returns `clips`; of a stream, loads the first `num_episodes` episodes into memory and returns their clips."""
    return clips if isinstance(clips, Clips) else clips.hold(num_episodes)


class Samples(list[dict]):
    """What a mixture reads for one batch: samples, and what the training has to know about how they were read."""

    def __init__(self, samples: Sequence[dict], skipped: Sequence[str], turns: Sequence[tuple[str, int, int]]):
        """skipped: why clips were left out. turns: name, reader and turn of each stream (`StreamClips.turn`)."""
        super().__init__(samples)
        self.skipped, self.turns = list(skipped), list(turns)


NUM_ASKED = 100  # episodes whose instructions are looked at for a description
BLOCK_SIZE = 16384  # samples in which the shares of a mixture are exact


class Mixture(Dataset):
    """An endless sequence of samples from several `Clips`: sample n = 0, 1, ... follows from (seed, n) alone.

    A block of `BLOCK_SIZE` samples holds exact shares of the sources, and a shorter stretch nearly exact ones. Every
    clip of a source comes once an epoch, in another pseudo-random order each epoch. No state is kept: workers, ranks
    and a resumed run only need the number of their next sample.

    The turns of `StreamClips` follow from (seed, n), too, but their readers decide which clip comes at a turn.

    With `skip_broken`, a clip that cannot be read gives way to one of another epoch, and `Samples.skipped` says why.
    """

    def __init__(
        self,
        clips: Sequence[Clips | StreamClips],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        skip_broken: bool = False,
        temperature: float | None = None,
    ):
        """weights: how often each source is drawn, relative to their sum (default: equally often).
        temperature: multiplies each weight by (number of clips) ** (1 / temperature); 1 weighs sources by size."""
        self.clips, self.seed, self.skip_broken = list(clips), seed, skip_broken
        self.located: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.streams = [c for c in self.clips if isinstance(c, StreamClips)]
        if not self.clips:
            raise ValueError("data is empty; expected a source such as metaworld:mt10 or videos:DIR")
        weight = np.ones(len(self.clips)) if weights is None else np.asarray(weights, dtype=np.float64)
        if temperature is not None:
            weight = weight * self._sizes() ** (1 / temperature)
        names = [c.name for c in self.clips]
        if len(set(names)) < len(names):
            raise ValueError(f"sources of one name cannot be told apart in the logs: {', '.join(names)}")

        shares = weight / weight.sum() * BLOCK_SIZE
        counts = np.floor(shares).astype(np.int64)
        largest_remainders = np.argsort(counts - shares, kind="stable")[: BLOCK_SIZE - counts.sum()]
        counts[largest_remainders] += 1
        if counts.min() < 1:
            rare = counts.argmin()
            raise ValueError(
                f"{self.clips[rare].source.uri}@{weight[rare]:g} would never be drawn: "
                f"expected @{weight.sum() / BLOCK_SIZE:.2g} or more beside the other weights"
            )
        self.counts = tuple(counts.tolist())  # samples of each source in a block
        self.sizes = Sizes(*(max(sizes) for sizes in zip(*(c.sizes for c in self.clips), strict=True)))

        # a run records these parts, and a resumed run must have the same clips and counts; names and places may change
        self.parts = [
            {"name": c.name, "uri": c.source.uri, "content": c.source.fingerprint, "clips": c.fingerprint, "count": n}
            for c, n in zip(self.clips, self.counts, strict=True)
        ]
        identity = [(part["clips"], part["count"]) for part in self.parts]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def _sizes(self) -> np.ndarray:
        if self.streams:
            raise ValueError(
                f"temperature needs to know how many clips there are, but {self.streams[0].source.uri} is a stream; "
                "give weights instead, such as @0.5"
            )
        return np.array([len(c) for c in self.clips if not isinstance(c, StreamClips)], dtype=np.float64)

    def described(self) -> list[str]:
        """What is in it, a line for each part; of many episodes, every so many are asked for their text."""
        lines = []
        for clips, count in zip(self.clips, self.counts, strict=True):
            share = f"{count / BLOCK_SIZE:.0%} of the samples"
            if isinstance(clips, StreamClips):
                lines.append(f"{clips.name}: a stream of {clips.source.num_shards} shards, {share}")
                continue
            source, episodes = clips.source, clips.episodes
            hours = float((source.lengths[episodes] / source.fps[episodes]).sum()) / 3600
            asked = episodes[:: -(-len(episodes) // NUM_ASKED)].tolist()
            silent = sum(not any(source.instructions(episode, [0])) for episode in asked) / len(asked)
            line = f"{clips.name}: {len(episodes)} episodes, {len(clips)} clips, {hours:.2g} h, {share}"
            line += f", {clips.is_labelled.sum()} episodes with actions" if clips.is_labelled.any() else ", no actions"
            lines.append(line + (f", {silent:.0%} without text" if silent else ""))
        return lines

    def read_from(self, turns: dict[str, int], reader: int, num_readers: int) -> None:
        """Makes the streams read as one of several readers, from the turn of their name (`StreamClips.turn`) or 0."""
        for stream in self.streams:
            stream.read_from(turns.get(stream.name, 0), reader, num_readers)

    def locate(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The source and the index of the clip in it for samples with these numbers, int64 (n,) each."""
        blocks, slots = np.divmod(np.asarray(numbers, dtype=np.int64), BLOCK_SIZE)
        source, index = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            block_source, block_index = self._block(block)
            source[here], index[here] = block_source[slots[here]], block_index[slots[here]]
        return source, index

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Like `locate`, for all samples of a block. The index in a stream is -1: its next clip comes."""
        if block not in self.located:
            source, turn = _shuffled_block(self.seed, block, self.counts)
            index = np.full_like(turn, -1)
            for i, clips in enumerate(self.clips):
                if not isinstance(clips, StreamClips):
                    here, size = source == i, len(clips)
                    epoch, position = np.divmod(turn[here], size)
                    index[here] = permute(position, size, hash_integers(self.seed, 1, i, epoch))
            self.located = {block: (source, index)}  # only the last block, for samples are read in their order
        return self.located[block]

    def consumed(self, start: int, stop: int) -> np.ndarray:
        """How many of the samples start, ..., stop - 1 come from each source; int64 (sources,)."""

        def before(n: int) -> np.ndarray:
            block, slot = divmod(n, BLOCK_SIZE)
            rest = _shuffled_block(self.seed, block, self.counts)[0][:slot]
            return block * np.array(self.counts) + np.bincount(rest, minlength=len(self.counts))

        return before(stop) - before(start)

    def shares(self, num_samples: int) -> dict[str, float]:
        """The share of each source in the samples 0, ..., num_samples - 1, as `share/NAME`."""
        consumed = self.consumed(0, num_samples)
        return {f"share/{c.name}": n / consumed.sum() for c, n in zip(self.clips, consumed, strict=True)}

    def __getitem__(self, number: int) -> dict:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> Samples:
        source, index = self.locate(numbers)
        samples, skipped = [{}] * len(numbers), []
        for i in np.unique(source):
            wanted, clips = np.flatnonzero(source == i), self.clips[i]
            if isinstance(clips, StreamClips):
                drawn = clips.draw(len(wanted))
                skipped += clips.skipped
                clips.skipped = []
            else:
                drawn, broken = read_clips(clips, index[wanted], self.skip_broken)
                skipped += broken
            for position, sample in zip(wanted, drawn, strict=True):
                samples[position] = sample
        return Samples(samples, skipped, [(c.name, c.reader, c.turn) for c in self.streams])


@lru_cache(maxsize=8)
def _shuffled_block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each sample in a block: its source, and how many samples of that source come before it."""
    jitter = hash_integers(seed, 0, block, np.arange(BLOCK_SIZE)) / 2**64
    # each source is spread evenly, and each sample moves by less than the distance to the next one of its source
    places = np.concatenate([np.arange(count) / count for count in counts])
    order = np.argsort(places + jitter / np.repeat(counts, counts), kind="stable")
    source = np.repeat(np.arange(len(counts)), counts)[order]
    turn = np.empty_like(source)
    for i, count in enumerate(counts):
        turn[source == i] = block * count + np.arange(count)
    return source, turn


def collate(samples: Sequence[dict], sizes: Sizes | None = None) -> dict:
    """Stacks samples. Texts become a list; a key that a sample lacks, or that has several shapes, is left out.

    State and action are padded with zeros up to `sizes` (default: the largest in the batch), also in samples without
    any; action_is_pad is then true. A missing point is nan. `Samples` add their `skipped` and `turns` to the batch.
    """
    if sizes is None:
        action_shapes = [s["action"].shape for s in samples if "action" in s]
        sizes = Sizes(
            state=max((len(s["state"]) for s in samples if "state" in s), default=0),
            action=max((action_dim for _, action_dim in action_shapes), default=0),
            chunk=max((chunk_size for chunk_size, _ in action_shapes), default=0),
        )

    batch: dict = {"skipped": samples.skipped, "turns": samples.turns} if isinstance(samples, Samples) else {}
    common = set(samples[0]).intersection(*samples[1:]) - {"state", "action", "action_is_pad", "point"}
    for key, value in samples[0].items():
        if key not in common:
            continue
        values = [s[key] for s in samples]
        if not isinstance(value, Tensor):
            batch[key] = torch.tensor(values) if {type(v) for v in values} <= {bool, int, float} else values
        elif all(v.shape == value.shape for v in values):
            batch[key] = stacked(values)
    if sizes.state:
        batch["state"] = _filled(samples, "state", (sizes.state,), 0.0)
    if sizes.action:
        batch["action"] = _filled(samples, "action", (sizes.chunk, sizes.action), 0.0)
        batch["action_is_pad"] = _filled(samples, "action_is_pad", (sizes.chunk,), True)
    if any("point" in s for s in samples):
        batch["point"] = _filled(samples, "point", (2,), math.nan)
    return batch


def _filled(samples: Sequence[dict], key: str, shape: tuple[int, ...], value: float | bool) -> Tensor:
    if all(key in sample and sample[key].shape == shape for sample in samples):
        return torch.stack([sample[key] for sample in samples])
    batch = torch.full((len(samples), *shape), value)
    for row, sample in zip(batch, samples, strict=True):
        if key in sample:
            row[tuple(slice(size) for size in sample[key].shape)] = sample[key]
    return batch


class BatchNumbers:
    """Endless lists of sample numbers: one rank's part of each global batch of num_ranks * batch_size."""

    def __init__(self, batch_size: int, start: int, rank: int, num_ranks: int):
        self.batch_size, self.start, self.rank, self.num_ranks = batch_size, start, rank, num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.num_ranks * self.batch_size


class Loader(DataLoader):
    """A DataLoader whose workers ignore the signals that a scheduler sends to all processes of a job. The training
    process acts on them, and its workers end with it, however it ends. Where there is a CUDA device, batches are in
    pinned memory, from which they are copied while it computes."""

    workers: ClassVar[WeakSet] = WeakSet()

    def __init__(self, dataset: Dataset, *args, worker_init_fn: Callable[[], None] | None = None, **settings):
        own = torch.Generator()  # without it, one would be drawn from the global random state
        init = partial(start_worker, worker_init_fn)
        pinned = torch.cuda.is_available()
        super().__init__(dataset, *args, worker_init_fn=init, generator=own, pin_memory=pinned, **settings)

    def __iter__(self) -> Iterator[dict]:
        others = active_children()
        iterator = super().__iter__()
        self.workers.update(child for child in active_children() if child not in others)
        return iterator


@atexit.register
def kill_workers() -> None:
    """Workers ignore the SIGTERM that multiprocessing sends at exit, and it would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch would report their end as a fault
    for worker in active_children():
        if worker in Loader.workers:
            worker.kill()


def start_worker(init: Callable[[], None] | None, worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # Ctrl-C in a terminal goes to all processes
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init()


def share_streams(turns: dict[str, int], rank: int, num_ranks: int) -> None:
    """Makes this worker a reader of the streams of its mixture."""
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, Mixture)
    info.dataset.read_from(turns, rank * info.num_workers + info.id, num_ranks * info.num_workers)


def loader(
    mixture: Mixture,
    batch_size: int,
    start: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 0,
    turns: dict[str, int] | None = None,
) -> DataLoader:
    """Endless batches for one rank, from the global sample number `start` on. `num_workers` does not change them.

    After `step` optimizer steps, start = step * batch_size * num_ranks * (batches accumulated in a step).
    turns: where each stream goes on, by its name (`StreamClips.turn`).
    """
    turns = turns or {}
    if not num_workers:
        mixture.read_from(turns, rank, num_ranks)
    return Loader(
        mixture,
        batch_sampler=BatchNumbers(batch_size, start, rank, num_ranks),
        num_workers=num_workers,
        collate_fn=partial(collate, sizes=mixture.sizes),
        worker_init_fn=partial(share_streams, turns, rank, num_ranks),
    )


class TrainingData(NamedTuple):
    """What a run of stage 1 or 2 learns from, and other episodes that it is validated on."""

    clips: list[Clips | StreamClips]  # training clips of each source
    mixture: Mixture  # the mixture of these clips
    val: dict[str, Chosen]  # name of a source -> its held-out samples
    fit: dict[str, Chosen]  # name of a source -> training samples of labelled episodes, for probes to fit on


def open_data(
    args, sources: Sequence, weights: Sequence[float], times: Sequence[float], train: dict | None = None, **sizes
) -> TrainingData:
    """Holds out whole episodes of each source and mixes the others.

    args: `val_fraction`, `val_samples`, `demonstrations`, `label_fraction`, `seed`, `skip_broken` and `temperature`.
    times: times of the frames in a sample [s]. sizes: settings of all `Clips`. train: settings of training clips only.
    """
    chosen = partial(choose_clips, seed=args.seed, skip_broken=args.skip_broken)
    learned, val, fit = [], {}, {}
    for i, source in enumerate(sources):
        train_episodes, val_episodes = split_episodes(source, args.val_fraction, args.seed)
        labelled = labelled_episodes(source, train_episodes, args.demonstrations, args.label_fraction, args.seed)
        clips = partial(clips_of, source, times=times, source_index=i, seed=args.seed, **sizes)
        learned.append(clips(train_episodes, labelled_episodes=labelled, **(train or {})))
        val[source.name] = chosen(clips(val_episodes), args.val_samples)
        # the first episodes of a stream may all be without labels
        fitted = train_episodes if isinstance(labelled, EpisodeRange) else labelled
        if isinstance(labelled, EpisodeRange) or len(labelled):
            fit[source.name] = chosen(clips(fitted, labelled_episodes=labelled), 4 * args.val_samples)
    mixture = Mixture(learned, weights, args.seed, args.skip_broken, args.temperature)
    return TrainingData(learned, mixture, val, fit)
