"""Probes, linear and small networks: what can be read from a latent action, fitted and scored on different episodes."""

from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlrp.metrics import is_constant, r2_per_dim

ALPHAS = [10.0**k for k in range(-4, 5)]  # ridge penalties per sample, for standardised features
NUM_FOLDS = 4
MIN_EPISODES = 3  # two to fit and to choose alpha on, one to score
MAX_INDICATORS = 1024  # codes times token positions that a pass has samples enough to tell apart
HIDDEN_SIZE, MLP_STEPS, MLP_BATCH_SIZE = 128, 400, 256
CHECK_FREQ, PATIENCE = 10, 8  # steps from a look at left-out episodes to the next, and looks without a gain


def code_features(codes: Tensor) -> Tensor:
    """The code vectors of all token positions side by side: (b, n, d) -> (b, n d).

    They exist for every bottleneck, also the continuous ones. Where neighbouring codes mean neighbouring motions
    (FSQ), a linear probe generalises to codes that it has not met.
    """
    return codes.flatten(1).float()


def one_hot_features(indices: Tensor, codebook_size: int) -> Tensor:
    """One indicator per code and token position: int64 (b, m) -> (b, m k).

    Credits an assignment of codes to motions however the code vectors lie; codes unseen in fitting say
    nothing, and thousands of codes need more samples than a validation pass has.
    """
    return F.one_hot(indices, codebook_size).flatten(1).float()


def probe_features(codes: Tensor, indices: Tensor | None, codebook_size: int | None) -> Tensor:
    """What a probe reads of latent actions (b, n, d): which codes there are, as the next stage does, where they are
    discrete and no more than `MAX_INDICATORS`; their vectors elsewhere."""
    if indices is not None and indices.shape[1] * codebook_size <= MAX_INDICATORS:
        return one_hot_features(indices, codebook_size)
    return code_features(codes)


def episode_split(episodes: Tensor, share: float, seed: int) -> Tensor:
    """Marks all samples of a seeded `share` of the episodes (at least one, never all): bool (b,).

    Raises ValueError where there are fewer than two episodes.
    """
    unique = episodes.unique()
    if len(unique) < 2:
        raise ValueError(f"{len(unique)} episode(s); a split by episode needs at least 2")
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).to(unique.device)
    count = min(max(round(share * len(unique)), 1), len(unique) - 1)
    return torch.isin(episodes, unique[order[:count]])


def ridge_predictions(x_train: Tensor, y_train: Tensor, x_test: Tensor, alphas: list[float]) -> list[Tensor]:
    """Ridge regression in float64 with standardised features, one prediction (b, a) per alpha.

    Solves (X'X / b + alpha I) w = X'y / b, or its dual where there are more features than samples.
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
    """The alpha of the least squared error on episodes left out of the fit, summed over up to 4 folds.

    Every dimension of y counts alike, whatever its unit.
    """
    unique, number = episodes.unique(return_inverse=True)
    if len(unique) < 2:
        raise ValueError(f"{len(unique)} episode(s) to fit a probe on; choosing its penalty needs at least 2")
    fold = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).to(x.device)[number] % NUM_FOLDS
    weight = 1 / torch.where(is_constant(y), torch.inf, y.double().var(dim=0, correction=0))
    errors = torch.zeros(len(ALPHAS), dtype=torch.float64, device=x.device)
    for k in range(min(NUM_FOLDS, len(unique))):
        out = fold == k
        preds = ridge_predictions(x[~out], y[~out], x[out], ALPHAS)
        errors += torch.stack([((pred - y[out]).square() * weight).sum() for pred in preds])
    return ALPHAS[errors.argmin()]


def ridge(x_train: Tensor, y_train: Tensor, x_test: Tensor, episodes: Tensor, seed: int = 0) -> Tensor:
    """Ridge prediction float64 (b_test, a); the penalty is chosen on left-out training episodes.

    x_train: (b, d), y_train: (b, a), x_test: (b_test, d), episodes: int64 (b,), of the training rows.
    """
    alpha = choose_alpha(x_train, y_train, episodes, seed)
    return ridge_predictions(x_train, y_train, x_test, [alpha])[0]


def mlp(x_train: Tensor, y_train: Tensor, x_test: Tensor, episodes: Tensor, seed: int = 0) -> Tensor:
    """Prediction float64 (b_test, a) of a network of two hidden layers; arguments as for `ridge`.

    It starts from the mean, and is taken as it was when it predicted left-out training episodes best: where there is
    nothing to read, it says the mean.
    """
    out = episode_split(episodes, share=0.2, seed=seed)
    mean, constant = x_train.double().mean(dim=0), is_constant(x_train)
    scale = torch.where(constant, torch.inf, x_train.double().std(dim=0, correction=0))
    offset, spread = y_train.double().mean(dim=0), y_train.double().std(dim=0, correction=0)
    spread = torch.where(is_constant(y_train), 1.0, spread)
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
        least, best, found = torch.inf, None, 0
        for step in range(MLP_STEPS):
            if step % CHECK_FREQ == 0:
                network.eval()
                with torch.no_grad():
                    error = float(F.mse_loss(network(x_out), y_out))
                    if error < least:
                        least, best, found = error, network(x_test), step
                network.train()
            if step - found > PATIENCE * CHECK_FREQ:
                break
            rows = torch.randint(len(x), (min(MLP_BATCH_SIZE, len(x)),)).to(x.device)
            F.mse_loss(network(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return offset + best.double() * spread


PROBES = {"ridge": ridge, "mlp": mlp}


def resampled_r2(pred: Tensor, target: Tensor, episodes: Tensor, num_draws: int, seed: int) -> Tensor:
    """R2 of each column over sets of episodes drawn with replacement (bootstrap): float64 (num_draws, a).

    The draws depend on the episodes and the seed alone, so that two predictions of one set are compared in pairs.
    """
    unique, number = episodes.unique(return_inverse=True)
    offset = target.double().mean(dim=0)
    pred, target = pred.double() - offset, target.double() - offset

    def of_episodes(values: Tensor) -> Tensor:
        return values.new_zeros(len(unique), values.shape[1]).index_add_(0, number, values)

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(unique), (num_draws, len(unique)), generator=generator)
    once = torch.ones(drawn.shape, dtype=torch.float64)
    times = torch.zeros_like(once).scatter_add_(1, drawn, once).to(target.device)  # that each was drawn: r e
    residual = times @ of_episodes((pred - target).square())
    count = times @ of_episodes(torch.ones_like(target))
    total = times @ of_episodes(target.square()) - (times @ of_episodes(target)).square() / count
    of_all = target.square().mean(dim=0) * count  # where hardly anything varies in what was drawn
    return 1 - residual / torch.where(total < 0.1 * of_all, of_all, total).clamp(min=1e-12)


def probe_r2(latents: Tensor, actions: Tensor, episodes: Tensor, is_fit: Tensor | None = None, seed: int = 0) -> dict:
    """R2 of a ridge probe latents -> actions, fitted and scored on different episodes.

    latents: (b, d), actions: (b, a), episodes: int64 (b,); is_fit: bool (b,), the samples to fit on, by
    default a seeded half of the episodes. Raises ValueError where an episode stands on both sides.

    Returns the mean `r2` over action dimensions; `r2_per_dim`, None for a dimension that is constant on
    either side (counted in `constant_dims`, left out of the mean); `r2_random`, the same probe on Gaussian
    noise of the latents' shape: what it scores where there is nothing to read. A mean over none is None.
    """
    if is_fit is None:
        is_fit = episode_split(episodes, share=0.5, seed=seed)
    fitted, scored = episodes[is_fit].unique(), episodes[~is_fit].unique()
    if torch.isin(fitted, scored).any():
        both = fitted[torch.isin(fitted, scored)].tolist()
        raise ValueError(f"episodes {both[:8]} are both in the fit and in the score of a probe")

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
