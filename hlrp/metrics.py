"""Figures over a whole validation pass: code usage, R2, PSNR, and the gathering over ranks that they need; and the
statistics by which actions and states are normalised."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code stands at each token position: int64 (m, k), every occurrence counted.

    indices: int64 (b, m). Raises ValueError where an index lies outside the codebook.
    """
    if len(indices) and not 0 <= indices.min() <= indices.max() < codebook_size:
        raise ValueError(f"indices from {indices.min()} to {indices.max()} do not fit codebook_size={codebook_size}")
    num_tokens = indices.shape[1]
    cells = indices + codebook_size * torch.arange(num_tokens, device=indices.device)
    return cells.flatten().bincount(minlength=num_tokens * codebook_size).reshape(num_tokens, codebook_size)


def entropy(counts: Tensor) -> Tensor:
    """Entropy of the last axis of counts [nat]; 0 where nothing was counted."""
    shares = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(dim=-1)


def code_health(indices: Tensor, codebook_size: int) -> dict:
    """Codebook use over a whole pass. indices: int64 (b, m).

    usage: share of the codes seen at any position; perplexity: exp of the entropy of all indices together;
    unique_sequences: distinct rows; entropy: one figure a token position [nat].
    """
    counts = code_counts(indices, codebook_size)
    total = counts.sum(dim=0)
    return {
        "usage": (total > 0).double().mean().item(),
        "perplexity": entropy(total).exp().item(),
        "unique_sequences": len(indices.unique(dim=0)),
        "entropy": entropy(counts).tolist(),
    }


def mutual_information(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Of two labellings int64 (b,): [nat], and as a share of the mean of their entropies."""
    size = int(b.max()) + 1
    table = (a * size + b).bincount(minlength=(int(a.max()) + 1) * size).reshape(-1, size)
    of_a, of_b = entropy(table.sum(dim=1)), entropy(table.sum(dim=0))
    mi = float(of_a + of_b - entropy(table.flatten()))
    return mi, mi / max(float(of_a + of_b) / 2, 1e-12)


def k_means(x: Tensor, num_bins: int, seed: int = 0, num_steps: int = 20) -> Tensor:
    """The nearest of `num_bins` centres (Lloyd's algorithm) of each row (b, d), standardised: int64 (b,)."""
    x = x.double()
    x = (x - x.mean(dim=0)) / torch.where(is_constant(x), 1.0, x.std(dim=0))
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:num_bins]]
    for _ in range(num_steps):
        nearest = torch.cdist(x, centres).argmin(dim=1)
        count = nearest.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return torch.cdist(x, centres).argmin(dim=1)


STILL = 1e-6  # a column whose range is no more than this share of its size never moves: the rest is rounding
STILL_SCALE = 1e-3  # what one unit of a column that never moves stands for, as a share of its size


def column_statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics of the columns of (b, d), in float64 and about their mean, which float32 sums are not."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, [0.01, 0.1, 0.5, 0.9, 0.99], axis=0)
    found = {"min": values.min(axis=0), "max": values.max(axis=0), "mean": values.mean(axis=0)}
    found |= {"std": values.std(axis=0), "count": np.array([len(values)])}
    return found | dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles, strict=True))


def normalisable(statistics: dict) -> dict[str, np.ndarray]:
    """The statistics of a feature as LeRobot has them (d,), such that each of its normalisations can use them.

    A column that never moves has a width: its value becomes 0, what lies beside it a small number, and 0 its value
    again. Mean and standard deviation lie where the extremes and quantiles allow them to, which those of float32 sums
    may not. Quantiles that coincide give way to the extremes.
    """
    found = {name: np.asarray(value, dtype=np.float64) for name, value in statistics.items()}
    if {"min", "max"} <= found.keys():
        low, high = found["min"], found["max"]
    elif {"mean", "std"} <= found.keys():
        low, high = found["mean"] - found["std"], found["mean"] + found["std"]
    else:
        return found
    size = np.maximum(np.abs(low), np.abs(high))
    is_still = high - low <= STILL * np.maximum(size, 1.0)
    middle, width = (low + high) / 2, STILL_SCALE * np.maximum(size, 1.0)
    if "mean" in found:
        found["mean"] = np.where(is_still, middle, found["mean"].clip(low, high))
    for first, last in (("q01", "q99"), ("q10", "q90")):
        if first in found and last in found:
            is_narrow = found[last] - found[first] <= 1e-3 * (high - low)
            found[first] = np.where(is_narrow, low, found[first])
            found[last] = np.where(is_narrow, high, found[last])
    if "std" in found:
        least = 0.0
        if {"mean", "q10", "q90"} <= found.keys():  # a tenth of the values lies beyond each
            below, above = (found["mean"] - found["q10"]).clip(0), (found["q90"] - found["mean"]).clip(0)
            least = np.sqrt(0.1 * (below**2 + above**2))
        found["std"] = np.where(is_still, width, found["std"].clip(least, (high - low) / 2))
    for name, place in (("min", -1), ("q01", -1), ("q10", -1), ("q50", 0), ("q90", 1), ("q99", 1), ("max", 1)):
        if name in found:
            found[name] = np.where(is_still, middle + place * width, found[name])
    return found


def is_constant(values: Tensor, tolerance: float = STILL) -> Tensor:
    """Which columns of (b, d) vary by no more than rounding, whatever their scale: bool (d,)."""
    values = values.double()
    return values.std(dim=0, correction=0) <= tolerance * values.abs().amax(dim=0)


def r2_per_dim(pred: Tensor, target: Tensor) -> Tensor:
    """Coefficient of determination of each column: (b, d), (b, d) -> float64 (d,).

    Against the mean of `target`. A constant column has no variance to explain: 1 where it is met, else 0.
    """
    pred, target = pred.double(), target.double()
    residual = (target - pred).square().sum(dim=0)
    total = (target - target.mean(dim=0)).square().sum(dim=0)
    constant = is_constant(target)
    met = torch.isclose(pred, target, rtol=1e-4, atol=0.0).all(dim=0).double()
    return torch.where(constant, met, 1 - residual / torch.where(constant, 1.0, total))


def explained_variance(values: Tensor, groups: Tensor) -> Tensor:
    """The share of the variance of each column of (b, d) between groups int64 (b,): float64 (d,).

    Adjusted for the number of groups (epsilon squared, Kelley 1935): 0 on average where groups say nothing. A column
    that does not vary has nothing to explain: 0, as where every sample is a group of its own.
    """
    values = values.double()
    names, place, counts = groups.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(names), values.shape[1], dtype=values.dtype).index_add_(0, place, values)
    within = (values - (means / counts[:, None])[place]).square().sum(dim=0)
    total = (values - values.mean(dim=0)).square().sum(dim=0)
    freedom = len(values) - len(names)
    if freedom < 1:
        return torch.zeros_like(total)
    explained = 1 - (within / freedom) / (total / (len(values) - 1)).clamp(min=1e-300)
    return torch.where(is_constant(values), 0.0, explained)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a success rate (Wilson 1927, J. Am. Stat. Assoc. 22); z: 1.96 covers 95 %."""
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    spread = z * ((rate * (1 - rate) + z**2 / (4 * trials)) / trials) ** 0.5
    return (centre - spread) / (1 + z**2 / trials), (centre + spread) / (1 + z**2 / trials)


def psnr(pred: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [0, 1]: (b, c, h, w) twice -> (b,) [dB], at most 100."""
    error = (pred.float() - target.float()).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()


def gather(tensor: Tensor) -> Tensor:
    """The ranks' tensors one after another along the first axis, on every rank; lengths may differ.

    A collective of torch.distributed: all ranks call it.
    """
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)

    padded = tensor.new_zeros(int(max(lengths)), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
