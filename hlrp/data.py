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
    states(episode, indices) -> float32 (t, s), as read() has them, without a frame decoded; only where state_dim > 0
    views, look(camera, episode, indices) -> uint8 (t, c, h, w)    further cameras and their frames, only where a source
                      has some
    latent_space      dict, only where the source has cached latent actions: whose they are, and of which camera
    labels(episode, indices) -> these: latent_vectors float32 (t, e), latent_indices int64 (t, m) where discrete
Constructors index, and decode nothing; decoders open at the first read, in the process that reads.

A sample is a flat dict of one clip, the frames of one episode at stated times in seconds, from t = 0 on:
    frames uint8 (t, c, h, w), fitted to a square; images uint8 (v, c, h, w), the view at t = 0 that a policy sees,
    in its own size, where it is asked for; task, dataset str; source, episode, index int (frame of
    t = 0); fps float; state float32 (s,) at t = 0; action float32 (chunk, a) from t = 0 up to, not including,
    the last time, with action_is_pad bool (chunk,); what else the source knows, at t = 0 and the last time;
    latent_vectors float32 (t - 1, e), latent_indices int64 (t - 1, m), where cached latent actions are asked for;
    latent_is_pad bool (t - 1,) where clips may reach past their episode.
Human video has no state and no action: in a batch `collate` fills in zeros, and action_is_pad says so.
"""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hlrp.clips import Clips, Sizes
from hlrp.permutation import hash_integers, permute

BLOCK_SIZE = 4096  # samples in which the shares of a mixture are exact


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
        names = [c.name for c in self.clips]
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
                c.min_times,
                c.chunk_size,
                c.num_images,
                None if c.starts is None else [starts.tolist() for starts in c.starts],
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
