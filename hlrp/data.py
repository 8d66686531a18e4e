"""Sources of video, the clips in them, and the endless mixture that training reads.

The data contract
-----------------
A source is one plain class a format, made by `hlrp.sources.open_source` from a URI, which may carry a weight:
`videos:DIR`, `lerobot:REPO_OR_DIR?camera=KEY`, `world:NAME?episodes=N`, `metaworld:TASK,TASK?episodes=N@0.5`.
    uri, name         str: as the user wrote it, without the weight; and short, for logs and metrics
    lengths, fps      int64 and float64 (episodes,): frames, and frames per second, of each episode
    action_dim, state_dim, camera   0, 0 and "" where the source has none
    fingerprint       str: a hash of what the data are, not of where they lie
    read(episode, indices) -> dict of what is at these frame indices, in their order:
        frames uint8 (t, c, h, w) of native size; task str, or ""; state float32 (t, s) where state_dim > 0;
        and whatever else the source knows, as tensors (t, ...) or as one value for the episode
    actions(episode, indices) -> float32 (t, a), taken at these frames; only where action_dim > 0
    latent_space      dict, only where the source has cached latent actions: whose they are, and of which camera
    labels(episode, indices) -> these: latent_vectors float32 (t, e), latent_indices int64 (t, m) where discrete
Constructors index, and decode nothing; decoders open at the first read, in the process that reads.

A sample is a flat dict of one clip, the frames of one episode at stated times in seconds, from t = 0 on:
    frames uint8 (t, c, h, w), fitted to a square; images uint8 (v, c, h, w), the view at t = 0 that a policy sees,
    in its own size, where it is asked for; task, dataset str; source, episode, index int (frame of
    t = 0); fps float; state float32 (s,) at t = 0; action float32 (chunk, a) from t = 0 up to, not including,
    the last time, with action_is_pad bool (chunk,); what else the source knows, at t = 0 and the last time;
    latent_vectors float32 (t - 1, e), latent_indices int64 (t - 1, m), where cached latent actions are asked for.
Human video has no state and no action: in a batch `collate` fills in zeros, and action_is_pad says so.
"""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from hlrp.permutation import hash_integers, permute
from hlrp.transforms import fit

BLOCK_SIZE = 4096  # samples in which the shares of a mixture are exact


def split_episodes(source, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Episode numbers for training and for validation, disjoint, at least one each."""
    num_episodes = len(source.lengths)
    if num_episodes < 2:
        raise ValueError(f"{source.uri}: {num_episodes} episode; training and validation need 2 or more")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}; a share between 0 and 1 fits")
    num_val = min(max(round(val_fraction * num_episodes), 1), num_episodes - 1)
    shuffled = np.random.default_rng(seed).permutation(num_episodes)
    return np.sort(shuffled[num_val:]), np.sort(shuffled[:num_val])


class Sizes(NamedTuple):
    """The sizes that the optional parts of a batch are filled up to; 0 where a part is absent."""

    state: int
    action: int
    chunk: int


class Clips(Dataset):
    """Every clip of some episodes: frames at `times` [s] that all lie inside one episode.

    Seconds become frames by the frame rate of each episode; an episode shorter than a clip contributes none.
    The index holds a few numbers for an episode and none for a clip.
    """

    def __init__(
        self,
        source,
        episodes: Sequence[int],
        times: Sequence[float] = (0.0, 0.5),
        image_size: int = 224,
        source_index: int = 0,
        labelled_episodes: Sequence[int] | None = None,
        input_size: int | None = None,
        latent_space: dict | None = None,
    ):
        """labelled_episodes: those whose actions a sample shows (default: all); elsewhere they are padding.
        input_size: side of the frame at t = 0 as a policy sees it, `images`, where one is asked for [pixel].
        latent_space: of the LAQ whose cached latent actions a sample shows, from all times but the last. What
        follows t = 0 is then known by them, and `frames` holds t = 0 alone."""
        times = np.asarray(times, dtype=np.float64)
        if times[0] != 0 or (np.diff(times) <= 0).any():
            raise ValueError(f"times={times.tolist()} s; increasing times from 0 on fit")
        self.source, self.times, self.image_size, self.source_index = source, times, image_size, source_index
        self.input_size, self.latent_space = input_size, latent_space
        self.episodes = np.asarray(episodes, dtype=np.int64)
        self.labelled_episodes = self.episodes if labelled_episodes is None else np.asarray(labelled_episodes)
        fps = source.fps[self.episodes]
        self.offsets = np.rint(np.outer(fps, times)).astype(np.int64)  # episodes t
        self._check_times(fps)
        if latent_space is not None:
            self._check_labels(fps)
            source.labels(int(self.episodes[0]), [0])  # read now, once for all workers

        lengths = source.lengths[self.episodes]
        num_clips = np.maximum(lengths - self.offsets[:, -1], 0)
        self.ends = np.cumsum(num_clips)
        if num_clips.sum() == 0:
            longest = (lengths / fps).max(initial=0)
            raise ValueError(
                f"{source.uri}: clips last {times[-1]:g} s, but the longest episode only {longest:g} s; "
                "a shorter delta fits"
            )
        chunk_size = int(self.offsets[:, -1].max()) if source.action_dim else 0
        self.sizes = Sizes(source.state_dim, source.action_dim, chunk_size)

    def _check_times(self, fps: np.ndarray) -> None:
        for delta, offset in zip(self.times[1:], self.offsets[:, 1:].T, strict=True):
            error = np.abs(offset / fps - delta)
            worst = error.argmax()
            if error[worst] > 0.2 * delta:
                nearest = max(offset[worst], 1) / fps[worst]
                raise ValueError(
                    f"{self.source.uri}: delta={delta:g} s is {delta * fps[worst]:.2f} frames at the "
                    f"{fps[worst]:g} fps of episode {self.episodes[worst]}; {nearest:.4g} s fits"
                )

    def _check_labels(self, fps: np.ndarray) -> None:
        source, found = self.source, getattr(self.source, "latent_space", None)
        if found is None:
            raise ValueError(f"{source.uri} has no cached latent actions; python -m hlrp.label makes them")
        for name, value in (self.latent_space | {"camera": source.camera}).items():
            if found[name] != value:
                raise ValueError(
                    f"{source.uri}: its latent actions are of {name}={found[name]!r}, but {name}={value!r} is "
                    f"expected; python -m hlrp.label makes others from {found['source']}, which fits without, too"
                )
        delta = found["delta"]
        steps = np.outer(np.rint(fps * delta).astype(np.int64), np.arange(len(self.times)))
        if (self.offsets != steps).any():
            raise ValueError(
                f"{source.uri}: a sample's latent actions are between {self.times.tolist()} s, the cached ones are "
                f"of whole frames, {steps[0, 1] / fps[0]:.4g} s for delta={delta:g} s; "
                f"without cached ones fits: {found['source']}"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Samples at `indices`, in their order; the frames of an episode are decoded together."""
        indices = np.asarray(indices, dtype=np.int64)
        rows = np.searchsorted(self.ends, indices, side="right")
        starts = indices - np.append(0, self.ends)[rows]
        samples = [None] * len(indices)
        for row in np.unique(rows):
            wanted = np.flatnonzero(rows == row)
            for i, sample in zip(wanted, self._read(row, starts[wanted]), strict=True):
                samples[i] = sample
        return samples

    def _read(self, row: int, starts: np.ndarray) -> Iterator[dict]:
        """The samples that start at `starts`, all in one episode."""
        source, episode, offsets = self.source, int(self.episodes[row]), self.offsets[row]
        is_labelled = source.action_dim > 0 and episode in self.labelled_episodes
        chunk = np.arange(offsets[-1])
        shown = offsets if self.latent_space is None else offsets[:1]
        clip_frames = starts[:, None] + shown  # clips t
        unique, position = np.unique(clip_frames, return_inverse=True)  # position: clips t
        try:
            read = source.read(episode, unique)
            if is_labelled:
                actions = source.actions(episode, (starts[:, None] + chunk).ravel())
                actions = actions.view(len(starts), len(chunk), source.action_dim)
            labels = {}
            if self.latent_space is not None:
                labels = source.labels(episode, (starts[:, None] + offsets[:-1]).ravel())
        except ValueError as error:
            raise ValueError(f"{source.uri}, episode {episode}: {error}") from error

        native, task = read.pop("frames"), read.pop("task")
        frames = fit(native, self.image_size)
        state = read.pop("state", None)
        for i, start in enumerate(starts):
            sample = {
                "frames": frames[position[i]],
                "task": task,
                "dataset": source.name,
                "source": self.source_index,
                "episode": episode,
                "index": int(start),
                "fps": float(source.fps[episode]),
            }
            if self.input_size is not None:
                sample["images"] = fit(native[position[i, :1]], self.input_size)
            if source.state_dim:
                sample["state"] = state[position[i, 0]]
            if is_labelled:
                sample["action"] = actions[i]
                sample["action_is_pad"] = torch.zeros(len(chunk), dtype=torch.bool)
            for key, column in labels.items():
                sample[key] = column.unflatten(0, (len(starts), -1))[i]
            for key, value in read.items():
                sample[key] = value[position[i, [0, -1]]] if isinstance(value, Tensor) else value
            yield sample


def action_statistics(clips: Clips) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (a,) of the actions in the labelled episodes; 0 and 1 where there are none."""
    source = clips.source
    episodes = clips.labelled_episodes[:1000] if source.action_dim else []
    if not len(episodes):
        return torch.zeros(source.action_dim), torch.ones(source.action_dim)
    actions = torch.cat([source.actions(int(i), np.arange(source.lengths[i])) for i in episodes])
    return actions.mean(dim=0), actions.std(dim=0).clamp(min=1e-6)


def choose_clips(clips: Clips, max_clips: int, seed: int) -> Subset:
    """At most `max_clips` clips, spread evenly: one drawn from each of that many equal stretches."""
    borders = np.linspace(0, len(clips), min(max_clips, len(clips)) + 1).astype(np.int64)
    return Subset(clips, np.random.default_rng(seed).integers(borders[:-1], borders[1:]).tolist())


class Mixture(Dataset):
    """An endless stream of samples from several `Clips`: sample n = 0, 1, ... follows from (seed, n) alone.

    Blocks of `BLOCK_SIZE` samples hold exact shares of the sources in shuffled order. Within a source, every
    clip comes once an epoch, in an order that is another pseudo-random permutation each epoch. No state is
    kept: workers, ranks and a resumed run need no more than the number of their next sample.
    """

    def __init__(self, clips: Sequence[Clips], weights: Sequence[float] | None = None, seed: int = 0):
        """weights: how often each source is drawn, whatever its size, relative to their sum; else equal."""
        self.clips, self.seed = list(clips), seed
        if not self.clips:
            raise ValueError("data is empty; expected a source such as metaworld:mt10 or videos:DIR")
        weights = np.ones(len(self.clips)) if weights is None else np.asarray(weights, dtype=np.float64)
        names = [c.source.name for c in self.clips]
        if len(set(names)) < len(names):
            raise ValueError(f"sources of one name cannot be told apart in the logs: {', '.join(names)}")

        shares = weights / weights.sum() * BLOCK_SIZE
        counts = np.floor(shares).astype(np.int64)
        largest_remainders = np.argsort(counts - shares, kind="stable")[: BLOCK_SIZE - counts.sum()]
        counts[largest_remainders] += 1
        if counts.min() < 1:
            rare = counts.argmin()
            raise ValueError(
                f"{self.clips[rare].source.uri}@{weights[rare]:g} would never be drawn: "
                f"beside the other weights it takes @{weights.sum() / BLOCK_SIZE:.2g} or more"
            )
        self.counts = tuple(counts.tolist())  # samples of each source in a block
        self.sizes = Sizes(*(max(sizes) for sizes in zip(*(c.sizes for c in self.clips), strict=True)))

        parts = [
            (
                c.source.fingerprint,
                c.episodes.tolist(),
                c.labelled_episodes.tolist(),
                c.times.tolist(),
                c.image_size,
                c.input_size,
                count,
            )
            for c, count in zip(self.clips, self.counts, strict=True)
        ]
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def locate(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Source number, and index of the clip in that source, of the samples with these global numbers."""
        blocks, slots = np.divmod(np.asarray(numbers, dtype=np.int64), BLOCK_SIZE)
        source, turn = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(blocks):
            here = blocks == block
            block_source, block_turn = _shuffled_block(self.seed, int(block), self.counts)
            source[here], turn[here] = block_source[slots[here]], block_turn[slots[here]]

        index = np.empty_like(slots)
        for i in np.unique(source):
            here = source == i
            size = len(self.clips[i])
            epoch, position = np.divmod(turn[here], size)
            index[here] = permute(position, size, hash_integers(self.seed, 1, i, epoch))
        return source, index

    def consumed(self, start: int, stop: int) -> np.ndarray:
        """How many of the samples start, ..., stop - 1 come from each source; int64 (sources,)."""

        def before(n: int) -> np.ndarray:
            block, slot = divmod(n, BLOCK_SIZE)
            rest = _shuffled_block(self.seed, block, self.counts)[0][:slot]
            return block * np.array(self.counts) + np.bincount(rest, minlength=len(self.counts))

        return before(stop) - before(start)

    def __getitem__(self, number: int) -> dict:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict]:
        source, index = self.locate(numbers)
        samples = [None] * len(numbers)
        for i in np.unique(source):
            wanted = np.flatnonzero(source == i)
            for position, sample in zip(wanted, self.clips[i].__getitems__(index[wanted]), strict=True):
                samples[position] = sample
        return samples


@lru_cache(maxsize=8)
def _shuffled_block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample in a block: its source, and how many samples of that source come before it."""
    order = np.argsort(hash_integers(seed, 0, block, np.arange(BLOCK_SIZE)), kind="stable")
    source = np.repeat(np.arange(len(counts)), counts)[order]
    turn = np.empty_like(source)
    for i, count in enumerate(counts):
        turn[source == i] = block * count + np.arange(count)
    return source, turn


def collate(samples: Sequence[dict], sizes: Sizes | None = None) -> dict:
    """Stacks samples; strings become lists, and keys that not all samples have are left out.

    State and action are filled with zeros up to `sizes` (those of the mixture; by default the largest in the
    batch), also in samples that have none. Where an action is filled in, `action_is_pad` is true.
    """
    if sizes is None:
        action_shapes = [s["action"].shape for s in samples if "action" in s]
        sizes = Sizes(
            state=max((len(s["state"]) for s in samples if "state" in s), default=0),
            action=max((action_dim for _, action_dim in action_shapes), default=0),
            chunk=max((chunk_size for chunk_size, _ in action_shapes), default=0),
        )

    batch = {}
    for key, value in samples[0].items():
        if key in ("state", "action", "action_is_pad") or not all(key in s for s in samples):
            continue
        values = [s[key] for s in samples]
        if isinstance(value, Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = values if isinstance(value, str) else torch.tensor(values)
    if sizes.state:
        batch["state"] = _filled(samples, "state", (sizes.state,), 0.0)
    if sizes.action:
        batch["action"] = _filled(samples, "action", (sizes.chunk, sizes.action), 0.0)
        batch["action_is_pad"] = _filled(samples, "action_is_pad", (sizes.chunk,), True)
    return batch


def _filled(samples: Sequence[dict], key: str, shape: tuple[int, ...], value: float | bool) -> Tensor:
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


def ignore_stop_signals(worker: int) -> None:
    """A scheduler's warning goes to all processes of a job: the training process acts on it, its workers go on."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def loader(
    mixture: Mixture,
    batch_size: int,
    start: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Endless batches of one rank, from the global sample number `start` on, whatever the number of workers.

    After `step` optimizer steps, start = step * batch_size * num_ranks * (batches accumulated in a step).
    """
    return DataLoader(
        mixture,
        batch_sampler=BatchNumbers(batch_size, start, rank, num_ranks),
        num_workers=num_workers,
        collate_fn=partial(collate, sizes=mixture.sizes),
        worker_init_fn=ignore_stop_signals,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without its own, it would draw from the global random state
    )
