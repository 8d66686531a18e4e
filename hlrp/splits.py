"""Which episodes are trained on, and which are held out: whole episodes, never frames."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hlrp.clips import is_suited
from hlrp.permutation import hash_integers


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
