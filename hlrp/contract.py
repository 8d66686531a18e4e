"""Which episodes are trained on, and which are held out: whole episodes, never frames.

Random order without a state: what stands at any place of a shuffled range, computed alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hlrp.clips import is_suited


def hash_integers(*parts: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits of some integers, uint64; arrays broadcast. The same with every version of numpy.

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
    """Where a pseudo-random permutation of range(size) sends `index`; another permutation for each key.

    A Feistel network permutes the next power of four; what falls outside the range walks on until it is
    inside (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").

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


class EpisodeRange(NamedTuple):
    """The episodes of a stream whose hash lies in [low, high): a part of it, known without a look at the whole."""

    seed: int
    low: float
    high: float

    def __contains__(self, episode: int) -> bool:
        return self.low <= hash_integers(self.seed, 3, episode)[0] / 2**64 < self.high


def split_episodes(
    source, val_fraction: float, seed: int, times: Sequence[float] = (0.0,)
) -> tuple[np.ndarray, np.ndarray] | tuple[EpisodeRange, EpisodeRange]:
    """Episode numbers for training and for validation, disjoint, at least one each; of a stream, ranges of them.

    times: of the frames of a clip [s]; where no episode for validation has such clips, one that has takes a place.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}; a share between 0 and 1 fits")
    if is_stream(source):
        return EpisodeRange(seed, val_fraction, 1.0), EpisodeRange(seed, 0.0, val_fraction)
    num_episodes = len(source.lengths)
    if num_episodes < 2:
        raise ValueError(f"{source.uri}: {num_episodes} episode; training and validation need 2 or more")
    num_val = min(max(round(val_fraction * num_episodes), 1), num_episodes - 1)
    shuffled = np.random.default_rng(seed).permutation(num_episodes)
    suited = np.flatnonzero(is_suited(source, shuffled, times))
    if len(suited) > 1 and suited[0] >= num_val:
        shuffled[[0, suited[0]]] = shuffled[[suited[0], 0]]
    return np.sort(shuffled[num_val:]), np.sort(shuffled[:num_val])


def is_stream(source) -> bool:
    """Whether a source is read from one end to the other (`hlrp.streams`)."""
    return hasattr(source, "num_shards")


def instructions_of(source, episode: int) -> list[str]:
    """The task at each frame of an episode; at the first one alone, where a source has one for the whole episode."""
    if hasattr(source, "instructions"):
        return source.instructions(episode, range(source.lengths[episode]))
    return [source.read(episode, [0])["task"]]


def labelled_episodes(
    source, episodes: np.ndarray | EpisodeRange, demonstrations: int | None, label_fraction: float, seed: int
) -> np.ndarray | EpisodeRange:
    """Those of the training episodes whose actions are learned beside latent ones: `demonstrations` of each task, which
    are those of a policy; or else `label_fraction` of them, see `labelled_share`.

    Raises ValueError for demonstrations of a stream, and where a task has fewer.
    """
    if demonstrations is None:
        return labelled_share(source, episodes, label_fraction, seed)
    if is_stream(source) and source.action_dim:
        raise ValueError(
            f"demonstrations={demonstrations}, but {source.uri} is a stream, whose tasks are not known before; give "
            f"--label-fraction, or python -m hlrp.shards --data '{source.uri}' makes a source that has them"
        )
    return choose_demonstrations(source, episodes, demonstrations, seed)


def choose_demonstrations(source, episodes: Sequence[int], per_task: int | None, seed: int) -> np.ndarray:
    """`per_task` of `episodes` of each instruction, drawn at random: fewer are part of more. None: all of them. A
    stream, which cannot be read at random, has none. An episode is of its first instruction that is not empty.

    Raises ValueError where an instruction has fewer.
    """
    if not source.action_dim or is_stream(source):
        return np.zeros(0, dtype=np.int64)
    if per_task is None:
        return np.asarray(episodes)
    by_task = shuffled_by_task(source, episodes, seed)
    for task, found in by_task.items():
        if len(found) < per_task:
            raise ValueError(
                f"demonstrations={per_task}, but {source.uri} has {len(found)} training episodes of {task!r}"
            )
    return np.sort([episode for found in by_task.values() for episode in found[:per_task]])


def labelled_share(source, episodes: np.ndarray | EpisodeRange, share: float, seed: int) -> np.ndarray | EpisodeRange:
    """That share of the episodes of each instruction, drawn at random, at least one. A smaller share is part of a
    larger one. Episodes whose instruction no other one has are one group. Of a stream, a share of the hashes."""
    if isinstance(episodes, EpisodeRange):
        return episodes._replace(high=episodes.low + share * (episodes.high - episodes.low))
    if share in (0, 1) or not source.action_dim:
        return np.asarray(episodes)[: round(share * len(episodes))]
    groups = [*shuffled_by_task(source, episodes, seed).values()]
    groups = [found for found in groups if len(found) > 1] + [[e for found in groups if len(found) == 1 for e in found]]
    return np.sort([episode for found in groups for episode in found[: max(1, round(share * len(found)))]])


def shuffled_by_task(source, episodes: Sequence[int], seed: int) -> dict[str, list[int]]:
    """The episodes of each instruction, in a random order that follows from the episodes and the seed."""
    by_task: dict[str, list[int]] = {}
    for episode in np.random.default_rng(seed).permutation(episodes).tolist():
        task = next(filter(None, instructions_of(source, episode)), "")
        by_task.setdefault(task, []).append(episode)
    return by_task
