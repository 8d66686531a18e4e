"""Figures over a whole validation pass (code usage, R2, PSNR), statistics that normalise actions, and probes.

A probe reads actions from latent actions: ridge regression or a small network, fitted and scored on different episodes.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs at each token position: int64 (m, k).

    indices: int64 (b, m). Raises ValueError for an index outside the codebook.
    """
    if len(indices) and not 0 <= indices.min() <= indices.max() < codebook_size:
        raise ValueError(
            f"indices from {indices.min()} to {indices.max()}; expected 0 to codebook_size - 1 = {codebook_size - 1}"
        )
    num_tokens = indices.shape[1]
    cells = indices + codebook_size * torch.arange(num_tokens, device=indices.device)
    return cells.flatten().bincount(minlength=num_tokens * codebook_size).reshape(num_tokens, codebook_size)


def entropy(counts: Tensor) -> Tensor:
    """Entropy of the last axis of counts [nat]; 0 if nothing was counted."""
    shares = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(dim=-1)


def code_health(indices: Tensor, codebook_size: int) -> dict:
    """Codebook use over a whole pass. indices: int64 (b, m).

    usage: share of the codes that occur at any position; perplexity: exp of the entropy of all indices together;
    unique_sequences: number of different rows; entropy: one figure for each token position [nat].
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
    """Mutual information of two labellings int64 (b,) [nat], and its share of the mean of their entropies."""
    size = int(b.max()) + 1
    table = (a * size + b).bincount(minlength=(int(a.max()) + 1) * size).reshape(-1, size)
    of_a, of_b = entropy(table.sum(dim=1)), entropy(table.sum(dim=0))
    mi = float(of_a + of_b - entropy(table.flatten()))
    return mi, mi / max(float(of_a + of_b) / 2, 1e-12)


def k_means(x: Tensor, num_bins: int, seed: int = 0, num_steps: int = 20) -> Tensor:
    """Clusters the standardised rows of (b, d) by Lloyd's algorithm: the number of each row's cluster, int64 (b,)."""
    x = x.double()
    x = (x - x.mean(dim=0)) / torch.where(is_constant(x), 1.0, x.std(dim=0))
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:num_bins]]
    for _ in range(num_steps):
        nearest = torch.cdist(x, centres).argmin(dim=1)
        count = nearest.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return torch.cdist(x, centres).argmin(dim=1)


STILL = 1e-6  # a column never moves if its range is at most this share of its size, which is rounding
STILL_SCALE = 1e-3  # the standard deviation given to a column that never moves, as a share of its size


def column_statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics of the columns of (b, d), in float64, since float32 sums of squares are too coarse."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, [0.01, 0.1, 0.5, 0.9, 0.99], axis=0)
    statistics = {"min": values.min(axis=0), "max": values.max(axis=0), "mean": values.mean(axis=0)}
    statistics |= {"std": values.std(axis=0), "count": np.array([len(values)])}
    return statistics | dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles, strict=True))


def normalisable(statistics: dict) -> dict[str, np.ndarray]:
    """LeRobot's statistics of a feature (d,), changed so that each of its normalisations can use them.

    A column that never moves gets a small width: its value is normalised to 0, and 0 back to its value. Mean and
    standard deviation are moved to where the extremes and quantiles allow them to be; those of float32 sums may be
    outside. Quantiles that coincide are replaced by the extremes.
    """
    mended = {name: np.asarray(value, dtype=np.float64) for name, value in statistics.items()}
    if {"min", "max"} <= mended.keys():
        low, high = mended["min"], mended["max"]
    elif {"mean", "std"} <= mended.keys():
        low, high = mended["mean"] - mended["std"], mended["mean"] + mended["std"]
    else:
        return mended
    size = np.maximum(np.abs(low), np.abs(high))
    is_still = high - low <= STILL * np.maximum(size, 1.0)
    middle, width = (low + high) / 2, STILL_SCALE * np.maximum(size, 1.0)
    if "mean" in mended:
        mended["mean"] = np.where(is_still, middle, mended["mean"].clip(low, high))
    for first, last in (("q01", "q99"), ("q10", "q90")):
        if first in mended and last in mended:
            is_narrow = mended[last] - mended[first] <= 1e-3 * (high - low)
            mended[first] = np.where(is_narrow, low, mended[first])
            mended[last] = np.where(is_narrow, high, mended[last])
    if "std" in mended:
        least = 0.0
        if {"mean", "q10", "q90"} <= mended.keys():  # a tenth of the values lies beyond each
            below, above = (mended["mean"] - mended["q10"]).clip(0), (mended["q90"] - mended["mean"]).clip(0)
            least = np.sqrt(0.1 * (below**2 + above**2))
        mended["std"] = np.where(is_still, width, mended["std"].clip(least, (high - low) / 2))
    for name, place in (("min", -1), ("q01", -1), ("q10", -1), ("q50", 0), ("q90", 1), ("q99", 1), ("max", 1)):
        if name in mended:
            mended[name] = np.where(is_still, middle + place * width, mended[name])
    return mended


def is_constant(values: Tensor, tolerance: float = STILL) -> Tensor:
    """Whether each column of (b, d) varies by no more than rounding, whatever its scale: bool (d,)."""
    values = values.double()
    return values.std(dim=0, correction=0) <= tolerance * values.abs().amax(dim=0)


def r2_per_dim(pred: Tensor, target: Tensor) -> Tensor:
    """Coefficient of determination of each column: (b, d), (b, d) -> float64 (d,).

    It compares with the mean of `target`. A constant column has no variance to explain: 1 if it is predicted, else 0.
    """
    pred, target = pred.double(), target.double()
    residual = (target - pred).square().sum(dim=0)
    total = (target - target.mean(dim=0)).square().sum(dim=0)
    constant = is_constant(target)
    met = torch.isclose(pred, target, rtol=1e-4, atol=0.0).all(dim=0).double()
    return torch.where(constant, met, 1 - residual / torch.where(constant, 1.0, total))


def explained_variance(values: Tensor, groups: Tensor) -> Tensor:
    """The share of the variance of each column of (b, d) that lies between groups int64 (b,): float64 (d,).

    It is adjusted for the number of groups (epsilon squared, Kelley 1935), so it is 0 on average for random groups. It
    is 0 for a column that does not vary, and if every sample is a group of its own.
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
    """Confidence interval of a success rate (Wilson 1927, J. Am. Stat. Assoc. 22); z = 1.96 covers 95 %."""
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    spread = z * ((rate * (1 - rate) + z**2 / (4 * trials)) / trials) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z**2 / trials) for sign in (-1, 1))
    return min(low, rate), max(high, rate)  # equal at 0 and 1, up to rounding


def psnr(pred: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [0, 1]: (b, c, h, w) twice -> (b,) [dB], at most 100."""
    error = (pred.float() - target.float()).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()


def gather(tensor: Tensor) -> Tensor:
    """Concatenates the ranks' tensors along the first axis, on every rank; their lengths may differ.

    It is a collective of torch.distributed: all ranks must call it.
    """
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)

    padded = tensor.new_zeros(int(max(lengths)), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


ALPHAS = [10.0**k for k in range(-4, 5)]  # ridge penalties per sample, for standardised features
NUM_FOLDS = 4
MIN_EPISODES = 3  # two to fit and to choose alpha on, one to score
MAX_INDICATORS = 2048  # codes times token positions; for more, a pass has too few samples
HIDDEN_SIZE, MLP_STEPS, MLP_BATCH_SIZE = 128, 400, 256
CHECK_FREQ, PATIENCE = 10, 8  # steps between checks on left-out episodes, and checks without a gain until it stops


def code_features(codes: Tensor) -> Tensor:
    """The code vectors of all token positions side by side: (b, n, d) -> (b, n d).

    They exist for every bottleneck, also a continuous one. If neighbouring codes mean similar motions (FSQ), a linear
    probe generalises to codes that it has not met.
    """
    return codes.flatten(1).float()


def one_hot_features(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """One indicator for each level of each dimension of a code, at each token position: int64 (b, m) -> (b, m k).

    levels: as `hlrp.quantizers.Quantizer.levels` has them; k is their sum. A codebook is one dimension, whose levels
    are its codes. A probe of indicators finds any assignment of levels to motions, whatever the code vectors are. It
    knows nothing about levels that it was not fitted on, and thousands need more samples than a validation pass has.
    """
    digits = [F.one_hot(indices // prod(levels[:i]) % level, level) for i, level in enumerate(levels)]
    return torch.cat(digits, dim=-1).flatten(1).float()


def mean_one_hot_features(probabilities: Tensor, levels: Sequence[int]) -> Tensor:
    """The mean of `one_hot_features` where each code has a probability: (b, m, codebook_size) -> (b, m k)."""
    digits = [probabilities.unflatten(-1, (-1, level, prod(levels[:i]))) for i, level in enumerate(levels)]
    return torch.cat([digit.sum(dim=(-3, -1)) for digit in digits], dim=-1).flatten(1)


def probe_features(codes: Tensor, indices: Tensor | None, levels: Sequence[int], most: int = MAX_INDICATORS) -> Tensor:
    """The input of a probe for latent actions (b, n, d): indicators of their codes (`one_hot_features`) if they are
    discrete and the indicators are no more than `most`; else their vectors."""
    if indices is not None and levels and indices.shape[1] * sum(levels) <= most:
        return one_hot_features(indices, levels)
    return code_features(codes)


def episode_split(episodes: Tensor, share: float, seed: int) -> Tensor:
    """Marks all samples of a seeded `share` of the episodes (at least one, never all): bool (b,).

    Raises ValueError for fewer than two episodes.
    """
    unique = episodes.unique()
    if len(unique) < 2:
        raise ValueError(f"expected 2 or more episodes to split, got {len(unique)}")
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).to(unique.device)
    count = min(max(round(share * len(unique)), 1), len(unique) - 1)
    return torch.isin(episodes, unique[order[:count]])


def ridge_predictions(x_train: Tensor, y_train: Tensor, x_test: Tensor, alphas: list[float]) -> list[Tensor]:
    """Ridge regression in float64 with standardised features, one prediction (b, a) per alpha.

    Solves (X'X / b + alpha I) w = X'y / b, or its dual if there are more features than samples.
    """
    x_train, y_train, x_test = x_train.double(), y_train.double(), x_test.double()
    mean, constant = x_train.mean(dim=0), is_constant(x_train)
    scale = torch.where(constant, 1.0, x_train.std(dim=0, correction=0))
    x_train, x_test = ((x - mean) / scale * ~constant for x in (x_train, x_test))
    offset = y_train.mean(dim=0)

    num_samples, num_features = x_train.shape
    dual = num_features > num_samples
    gram = (x_train @ x_train.T if dual else x_train.T @ x_train) / num_samples
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    right = (y_train - offset if dual else x_train.T @ (y_train - offset)) / num_samples
    left = x_test @ x_train.T if dual else x_test
    return [offset + left @ torch.cholesky_solve(right, torch.linalg.cholesky(gram + alpha * eye)) for alpha in alphas]


def choose_alpha(x: Tensor, y: Tensor, episodes: Tensor, seed: int = 0) -> float:
    """The alpha with the smallest squared error on episodes left out of the fit, summed over up to 4 folds.

    Every dimension of y has the same weight, whatever its unit.
    """
    unique, number = episodes.unique(return_inverse=True)
    if len(unique) < 2:
        raise ValueError(f"expected 2 or more episodes to choose the penalty of a probe on, got {len(unique)}")
    fold = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).to(x.device)[number] % NUM_FOLDS
    weight = 1 / torch.where(is_constant(y), torch.inf, y.double().var(dim=0, correction=0))
    errors = torch.zeros(len(ALPHAS), dtype=torch.float64, device=x.device)
    for k in range(min(NUM_FOLDS, len(unique))):
        out = fold == k
        preds = ridge_predictions(x[~out], y[~out], x[out], ALPHAS)
        errors += torch.stack([((pred - y[out]).square() * weight).sum() for pred in preds])
    return ALPHAS[errors.argmin()]


def ridge(x_train: Tensor, y_train: Tensor, x_test: Tensor, episodes: Tensor, seed: int = 0) -> Tensor:
    """Prediction float64 (b_test, a) of ridge regression, whose penalty is chosen on left-out training episodes.

    x_train: (b, d), y_train: (b, a), x_test: (b_test, d), episodes: int64 (b,), those of the training rows.
    """
    alpha = choose_alpha(x_train, y_train, episodes, seed)
    return ridge_predictions(x_train, y_train, x_test, [alpha])[0]


def mean_and_scale(values: Tensor, of_constant: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation float64 (d,) of rows (b, d). of_constant: what stands for that of a constant column;
    infinity turns the column into zeros."""
    scale = values.double().std(dim=0, correction=0)
    return values.double().mean(dim=0), torch.where(is_constant(values), of_constant, scale)


def mlp(x_train: Tensor, y_train: Tensor, x_test: Tensor, episodes: Tensor, seed: int = 0) -> Tensor:
    """Prediction float64 (b_test, a) of a network of two hidden layers; arguments as for `ridge`.

    It starts as the mean, and the result is the network that predicted left-out training episodes best. So if the input
    tells nothing, the prediction is the mean.
    """
    out = episode_split(episodes, share=0.2, seed=seed)
    (mean, scale), (offset, spread) = mean_and_scale(x_train, torch.inf), mean_and_scale(y_train, 1.0)
    x, x_out, x_test = (((part - mean) / scale).float() for part in (x_train[~out], x_train[out], x_test))
    y, y_out = (((part - offset) / spread).float() for part in (y_train[~out], y_train[out]))

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        sizes = (x.shape[1], HIDDEN_SIZE, HIDDEN_SIZE, y.shape[1])
        first, second, last = (nn.Linear(a, b).to(x.device) for a, b in pairwise(sizes))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        network = nn.Sequential(first, nn.GELU(), nn.Dropout(0.1), second, nn.GELU(), nn.Dropout(0.1), last)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
        least, best, best_step = torch.inf, None, 0
        for step in range(MLP_STEPS):
            if step % CHECK_FREQ == 0:
                network.eval()
                with torch.no_grad():
                    error = float(F.mse_loss(network(x_out), y_out))
                    if error < least:
                        least, best, best_step = error, network(x_test), step
                network.train()
            if step - best_step > PATIENCE * CHECK_FREQ:
                break
            rows = torch.randint(len(x), (min(MLP_BATCH_SIZE, len(x)),)).to(x.device)
            F.mse_loss(network(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert best is not None
    return offset + best.double() * spread


PROBES = {"ridge": ridge, "mlp": mlp}


def few_shot(x_train: Tensor, y_train: Tensor, x_test: Tensor, seed: int = 0) -> Tensor:
    """Prediction float64 (b_test, a) of what a few demonstrations tell: the mean of small networks.

    Noise on the features and the mean over networks keep them from overfitting. No demonstration is left out to stop
    the training: where each task has one, that would be a task unseen.
    """
    (mean, scale), (offset, spread) = mean_and_scale(x_train, torch.inf), mean_and_scale(y_train, 1.0)
    x, x_test = (((part - mean) / scale).float() for part in (x_train, x_test))
    y = ((y_train - offset) / spread).float()

    def predict(x: Tensor) -> Tensor:  # m b d, or b d
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = F.gelu(x @ weight + bias)
        return x @ weights[-1] + biases[-1]  # m b a

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        sizes = (x.shape[1], FEW_SHOT_HIDDEN, FEW_SHOT_HIDDEN, y.shape[1])
        weights, biases = [], []
        for fan_in, fan_out in pairwise(sizes):
            weights.append(nn.Parameter(torch.randn(FEW_SHOT_NETWORKS, fan_in, fan_out).to(x) * fan_in**-0.5))
            biases.append(nn.Parameter(torch.zeros(FEW_SHOT_NETWORKS, 1, fan_out).to(x)))
        optimizer = torch.optim.AdamW([*weights, *biases], lr=FEW_SHOT_LR, weight_decay=FEW_SHOT_DECAY, fused=True)
        for step in range(FEW_SHOT_STEPS):
            optimizer.param_groups[0]["lr"] = FEW_SHOT_LR * (1 - step / FEW_SHOT_STEPS)
            rows = torch.randint(len(x), (FEW_SHOT_NETWORKS, FEW_SHOT_BATCH)).to(x.device)
            noisy = x[rows] + FEW_SHOT_NOISE * torch.randn(*rows.shape, x.shape[1]).to(x)
            F.mse_loss(predict(noisy), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        predicted = torch.cat([predict(part).mean(dim=0) for part in x_test.split(8192)])
    return offset + predicted.double() * spread


# of `few_shot`: networks, width of their two hidden layers, optimizer steps, samples in each, learning rate, weight
# decay, and the noise on the features [standard deviation of a feature]
FEW_SHOT_NETWORKS, FEW_SHOT_HIDDEN, FEW_SHOT_STEPS, FEW_SHOT_BATCH = 5, 128, 300, 128
FEW_SHOT_LR, FEW_SHOT_DECAY, FEW_SHOT_NOISE = 3e-3, 0.1, 0.2


def resampled_r2(pred: Tensor, target: Tensor, episodes: Tensor, num_draws: int, seed: int) -> Tensor:
    """R2 of each column over sets of episodes drawn with replacement (bootstrap): float64 (num_draws, a).

    The draws depend on the episodes and the seed alone, so two predictions of one set can be compared draw by draw.
    """
    unique, number = episodes.unique(return_inverse=True)
    offset = target.double().mean(dim=0)
    pred, target = pred.double() - offset, target.double() - offset

    def of_episodes(values: Tensor) -> Tensor:
        return values.new_zeros(len(unique), values.shape[1]).index_add_(0, number, values)

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(unique), (num_draws, len(unique)), generator=generator)
    once = torch.ones(drawn.shape, dtype=torch.float64)
    times = torch.zeros_like(once).scatter_add_(1, drawn, once).to(target.device)  # how often each was drawn: r e
    residual = times @ of_episodes((pred - target).square())
    count = times @ of_episodes(torch.ones_like(target))
    total = times @ of_episodes(target.square()) - (times @ of_episodes(target)).square() / count
    of_all = target.square().mean(dim=0) * count  # in place of the total, if hardly anything varies in the draw
    return 1 - residual / torch.where(total < 0.1 * of_all, of_all, total).clamp(min=1e-12)


def probe_r2(latents: Tensor, actions: Tensor, episodes: Tensor, is_fit: Tensor | None = None, seed: int = 0) -> dict:
    """R2 of a ridge probe latents -> actions, fitted and scored on different episodes.

    latents: (b, d), actions: (b, a), episodes: int64 (b,); is_fit: bool (b,), the samples to fit on (default: a seeded
    half of the episodes). Raises ValueError if an episode is on both sides.

    Returns `r2`, the mean over the dimensions of an action, None if there are none; `r2_per_dim`, None for a dimension
    that is constant on either side, which is left out of the mean and counted in `constant_dims`; and `r2_random`, the
    score of the same probe on Gaussian noise of the latents' shape, which tells nothing.
    """
    if is_fit is None:
        is_fit = episode_split(episodes, share=0.5, seed=seed)
    fitted, scored = episodes[is_fit].unique(), episodes[~is_fit].unique()
    if torch.isin(fitted, scored).any():
        both = fitted[torch.isin(fitted, scored)].tolist()
        raise ValueError(f"expected other episodes to score a probe than to fit it, got episodes {both[:8]} in both")

    constant = is_constant(actions[is_fit]) | is_constant(actions[~is_fit])
    varying = actions[:, ~constant]

    def score(x: Tensor) -> list[float]:
        if constant.all():
            return []
        pred = ridge(x[is_fit], varying[is_fit], x[~is_fit], episodes[is_fit], seed)
        return r2_per_dim(pred, varying[~is_fit]).tolist()

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    per_dim, random_per_dim = score(latents), score(noise)
    remaining = iter(per_dim)
    return {
        "r2": fmean(per_dim) if per_dim else None,
        "r2_random": fmean(random_per_dim) if per_dim else None,
        "r2_per_dim": [None if is_out else next(remaining) for is_out in constant.tolist()],
        "constant_dims": int(constant.sum()),
    }


def principal_components(x: Tensor, is_fit: Tensor, num_components: int) -> Tensor:
    """Scores (b, k) of the rows (b, d) on the first components of the marked ones, at most `num_components`."""
    return principal_axes(x[is_fit], num_components)(x)


def principal_axes(x: Tensor, num_components: int) -> Callable[[Tensor], Tensor]:
    """A function from rows (b, d) to their scores (b, k) on the first components of x, at most `num_components`."""
    x = x.float()
    mean = x.double().mean(dim=0).float()
    num_components = min(num_components, x.shape[1], len(x) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, components = torch.pca_lowrank(x - mean, q=min(num_components + 8, *x.shape), niter=3)
    components = components[:, :num_components]
    return lambda rows: (rows.float() - mean) @ components
