"""Random order without a state: what stands at any place of a shuffled range, computed alone."""

import numpy as np


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
