"""The figures of a probe card: what the latent actions of a model are worth, every figure beside its control.

The protocol gathers LAOM's (Nikulin et al. 2025, arXiv:2502.00379), CoMo's (Yang et al. 2025, arXiv:2505.17006) and
Genie's (Bruce et al. 2024, arXiv:2402.15391). Probes are fitted on some episodes and scored on others. An interval
covers 95 % of the sets of scored episodes that are drawn with replacement.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from hlrp.clips import SAMPLE_KEYS
from hlrp.data import Chosen
from hlrp.images import resize
from hlrp.laq import LatentActions
from hlrp.laq_validation import Share, joined
from hlrp.metrics import (
    PROBES,
    code_health,
    few_shot,
    is_constant,
    k_means,
    mutual_information,
    one_hot_features,
    principal_components,
    probe_features,
    r2_per_dim,
    resampled_r2,
    ridge,
)
from hlrp.transformer import mean_action

OBSERVED_SIZE = 32  # side of the frames that observation controls see [pixel]
MAX_COMPONENTS = 256  # principal components of frames that a control has, at most
MIN_COMPONENTS = 32  # principal components of the observation, however few dimensions a latent action has
MIN_MISSING = 0.02  # R2 that an observation misses, below which nobody can add to it
MAX_INDICATORS = 512  # of codes, for networks: for more, they read vectors
NUM_DRAWS = 1000  # of the bootstrap
NUM_DEMONSTRATIONS = (1, 5)  # of each task, that a probe is fitted on
NUM_ACTION_BINS, NUM_SHIFTS = 16, 200  # clusters of actions; shifts of the codes against them, for the null
MIN_TRANSFERRED = 0.05  # R2 within an embodiment, below which a ratio to it means nothing
MAX_EPISODES = 50  # that a probe tries to tell apart by their latent actions

Z, OBSERVATION, BOTH, CHANGE = "z", "observation", "observation + z", "change of pixels"
CEILING = "observation + true change"  # of the state
STATES = "true state and change"
RANDOM, SHUFFLED, LABELS = "random encoder", "shuffled futures", "labels only"


class Pairs(NamedTuple):
    """Pairs of frames, what their source knows about them, and their latent actions by several models."""

    episodes: Tensor  # int64 (b,)
    is_fit: Tensor  # bool (b,)
    first: Tensor  # uint8 (b, c, h, w), small
    second: Tensor
    actions: Tensor | None  # float64 (b, a), mean over the span
    facts: dict[str, Tensor]  # float64 (b, f): what the source knows that is not an action
    embodiments: Tensor | None  # int64 (b,)
    latents: dict[str, LatentActions]  # vectors (b, n, e), indices (b, m)
    state_change: Tensor | None = None  # float64 (b, s), from the first frame to the second
    tasks: Sequence[str] = ()  # the instruction of each pair


def read_pairs(sets: Sequence[Chosen], encoders: dict[str, Callable[[Tensor], LatentActions]], share: Share) -> Pairs:
    """Reads two sets once, of the episodes to fit on and of the episodes to score, and encodes them by every model."""
    rows, tasks, latents, num_fit = [], [], {name: [] for name in encoders}, len(sets[0])
    for side, dataset in enumerate(sets):
        for _, batch in share.batches(dataset):
            first, second = batch["frames"].unbind(1)
            episodes = len(sets) * batch["episode"] + side  # a stream's episodes are numbered anew on each side
            row = {"episodes": episodes, "facts": facts_of(batch)}
            row["first"], row["second"] = (resize(x, (OBSERVED_SIZE, OBSERVED_SIZE)) for x in (first, second))
            if "action" in batch:
                row["actions"], _ = mean_action(batch["action"].double(), batch["action_is_pad"])
            if "embodiment" in batch:
                row["embodiments"] = batch["embodiment"]
            rows.append(row)
            tasks += batch["task"]
            for name, encode in encoders.items():
                latents[name].append(encode(batch["frames"]))
    changes = [state_change(dataset.dataset, i) for dataset in sets for i in dataset.indices if "state" in batch]

    def column(name: str) -> Tensor:
        return torch.cat([row[name] for row in rows]).cpu()

    return Pairs(
        column("episodes"),
        torch.arange(sum(map(len, sets))) < num_fit,
        column("first"),
        column("second"),
        column("actions") if "actions" in rows[0] else None,
        {name: torch.cat([row["facts"][name] for row in rows]).cpu() for name in rows[0]["facts"]},
        column("embodiments") if "embodiments" in rows[0] else None,
        {name: joined(parts, Tensor.cpu) for name, parts in latents.items()},
        torch.stack(changes) if changes else None,
        tasks,
    )


def state_change(clips, index: int) -> Tensor:
    """The state at the last frame of one of the `Clips` minus the state at its first: float64 (s,)."""
    ((episode, frames),) = clips.frames_of([index]).items()
    first, last = clips.source.states(episode, [min(frames), max(frames)]).double()
    return last - first


def facts_of(batch: dict) -> dict[str, Tensor]:
    """What a source knows beside the actions, as numbers: the mean colour of the first frame, the state in it, the
    motion of whatever else moves, and what an episode is.
    """
    facts = {"colour of the frame": batch["frames"][:, 0].double().mean(dim=(2, 3)) / 255}
    if "state" in batch:
        facts["state"] = batch["state"].double()
    for name, value in batch.items():
        if name in SAMPLE_KEYS or not isinstance(value, Tensor):
            continue
        name = name.replace("_", " ")
        if value.is_floating_point() and value.ndim == 3:  # b 2 f, at the first and the second frame
            facts[f"motion of {name}"] = (value[:, 1] - value[:, 0]).double()
        elif not value.is_floating_point() and value.ndim == 1:
            facts[name] = value[:, None].double()
    return facts


class Score(NamedTuple):
    """What one probe read, on the scored pairs."""

    pred: Tensor  # float64 (b, a), of the dimensions that vary
    r2: Tensor  # float64 (a,)
    resampled: Tensor  # float64 (r, a)


def score(x: Tensor, y: Tensor, pairs: Pairs, probes: Sequence[str], seed: int) -> dict[str, Score]:
    """Probes from x (b, d) to y (b, a), by their names."""
    fit, scored, scores = pairs.is_fit, ~pairs.is_fit, {}
    for name in probes:
        pred = PROBES[name](x[fit], y[fit], x[scored], pairs.episodes[fit], seed)
        resampled = resampled_r2(pred, y[scored], pairs.episodes[scored], NUM_DRAWS, seed)
        scores[name] = Score(pred, r2_per_dim(pred, y[scored]), resampled)
    return scores


def best(scores: dict[str, Score]) -> Score:
    return max(scores.values(), key=lambda s: float(s.r2.mean()))


def interval(values: Tensor) -> list[float]:
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def gain(over: Score, under: Score) -> dict:
    """How much more one probe reads than another, on the same draws of episodes."""
    difference = (over.resampled - under.resampled).mean(dim=1)
    return {"r2": float(over.r2.mean() - under.r2.mean()), "interval": interval(difference)}


def varying(y: Tensor, is_fit: Tensor) -> Tensor:
    """Which columns vary on both sides: bool (a,)."""
    return ~(is_constant(y[is_fit]) | is_constant(y[~is_fit]))


def inputs_of(pairs: Pairs, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """What probes read: z, its controls, the ceiling where the source has states, and the latents of other models.

    The change of pixels has as many dimensions as z. The observation has at least `MIN_COMPONENTS`: against fewer, a
    copy of the state would seem to add to what an observation shows.
    """
    dim, z = min(features[Z].shape[1], MAX_COMPONENTS), features[Z]
    first, second = flat(pairs.first), flat(pairs.second)
    observation = principal_components(first, pairs.is_fit, max(dim, MIN_COMPONENTS))

    def beside_observation(x: Tensor) -> Tensor:
        spreads = ((x, x[pairs.is_fit].double()) for x in (observation, x.float()))
        return torch.cat([x / torch.where(is_constant(fit), 1.0, fit.std(dim=0)).float() for x, fit in spreads], dim=1)

    inputs = {
        Z: z,
        OBSERVATION: observation,
        BOTH: beside_observation(z),
        CHANGE: principal_components(second - first, pairs.is_fit, dim),
    }
    if pairs.state_change is not None:
        inputs[CEILING] = beside_observation(pairs.state_change)
    return inputs | {name: x for name, x in features.items() if name != Z}


def information(
    pairs: Pairs, features: dict[str, Tensor], groups: dict[str, list[int]], seed: int
) -> tuple[dict, Score]:
    """What z and its controls tell about the actions, and the better probe's predictions from z.

    probes: by input and probe r2, interval, r2_per_dim, error_per_dim (over that of the mean of the fitted actions)
    and groups of dimensions. gains: r2 of the better probe of z beyond that of each control; "increment": of
    observation + z beyond the observation. share: the increment over the R2 that the observation misses; None where
    it misses less than `MIN_MISSING`. ceiling: the input that tells the most, and its r2: the observation and the true
    change of the state, or else the best control. A constant dimension is None, and in no mean.
    """
    assert pairs.actions is not None
    which = varying(pairs.actions, pairs.is_fit)
    if not which.any():
        raise ValueError("no dimension of the actions varies in these episodes: there is nothing to probe for")
    y, dims = pairs.actions[:, which].double(), which.nonzero().flatten().tolist()
    scored = y[~pairs.is_fit]
    fitted_mean = y[pairs.is_fit].mean(dim=0)
    error_of_mean = (scored - fitted_mean).square().mean(dim=0)
    inputs = inputs_of(pairs, features)
    scores = {name: score(x, y, pairs, [*PROBES], seed) for name, x in inputs.items()}

    def per_dim(values: Tensor) -> list[float | None]:
        found = dict(zip(dims, values.tolist(), strict=True))
        return [found.get(i) for i in range(len(which))]

    def figures(s: Score) -> dict:
        error = (s.pred - scored).square().mean(dim=0) / error_of_mean
        in_groups = {}
        for group, members in groups.items():
            columns = [dims.index(i) for i in members if i in dims]
            if columns:
                in_groups[group] = {
                    "r2": float(s.r2[columns].mean()),
                    "interval": interval(s.resampled[:, columns].mean(dim=1)),
                    "error": float(error[columns].mean()),
                }
        return {
            "r2": float(s.r2.mean()),
            "interval": interval(s.resampled.mean(dim=1)),
            "error": float(error.mean()),
            "r2_per_dim": per_dim(s.r2),
            "error_per_dim": per_dim(error),
            "groups": in_groups,
        }

    z, both, observation = (best(scores[name]) for name in (Z, BOTH, OBSERVATION))
    gains = {name: gain(z, best(s)) for name, s in scores.items() if name not in (Z, BOTH, CEILING)}
    gains["increment"] = gain(both, observation)
    share, missing = None, float(1 - observation.r2.mean())
    if missing >= MIN_MISSING:
        increments = (both.resampled - observation.resampled).mean(dim=1)
        shares = increments / (1 - observation.resampled.mean(dim=1)).clamp(min=1e-6)
        share = {"r2": gains["increment"]["r2"] / missing, "interval": interval(shares)}
    tops = [CEILING] if CEILING in scores else [name for name in scores if name not in (Z, BOTH)]
    ceiling = max(tops, key=lambda name: float(best(scores[name]).r2.mean()))
    return {
        "dims": len(which),
        "constant_dims": int((~which).sum()),
        "matched_dims": inputs[CHANGE].shape[1],
        "r2": float(z.r2.mean()),
        "interval": interval(z.resampled.mean(dim=1)),
        "mean": float(r2_per_dim(fitted_mean.expand_as(scored), scored).mean()),
        "probes": {name: {k: figures(s) for k, s in of.items()} for name, of in scores.items()},
        "gains": gains,
        "share": share,
        "ceiling": {"name": ceiling, "r2": float(best(scores[ceiling]).r2.mean())},
    }, z


def few_shots(pairs: Pairs, features: dict[str, Tensor], seed: int) -> dict[int, dict[str, dict]]:
    """What networks read of few demonstrations (`hlrp.metrics.few_shot`), as `hlrp.inverse` labels video by them.

    By the number of demonstrations of each task, and by what stands beside the principal components of the first frame:
    r2 and r2_per_dim of the mean action. A number that a task does not have is left out.
    """
    assert pairs.actions is not None
    y = pairs.actions[:, varying(pairs.actions, pairs.is_fit)].double()
    first, second = flat(pairs.first), flat(pairs.second)
    observation = principal_components(first, pairs.is_fit, MIN_COMPONENTS)
    inputs = {OBSERVATION: observation.new_zeros(len(observation), 0), Z: features[Z]}
    inputs[CHANGE] = principal_components(second - first, pairs.is_fit, MIN_COMPONENTS)
    if RANDOM in features:
        inputs[RANDOM] = features[RANDOM]
    if pairs.state_change is not None:
        inputs[STATES] = torch.cat([pairs.facts["state"], pairs.state_change], dim=1)
    inputs["true action"] = y

    episodes = {}  # of each task, those to fit on
    for task, episode, is_fit in zip(pairs.tasks, pairs.episodes.tolist(), pairs.is_fit.tolist(), strict=True):
        if is_fit:
            episodes.setdefault(task, {})[episode] = None
    figures: dict[int, dict[str, dict]] = {}
    for count in NUM_DEMONSTRATIONS:
        if min(map(len, episodes.values())) < count:
            continue
        rng = np.random.default_rng(seed)
        chosen = [e for of_task in episodes.values() for e in rng.permutation(sorted(of_task))[:count].tolist()]
        is_chosen, figures[count] = torch.isin(pairs.episodes, torch.tensor(chosen)), {}
        for name, x in inputs.items():
            x = torch.cat([x.float(), observation], dim=1)
            scores = r2_per_dim(few_shot(x[is_chosen], y[is_chosen], x[~pairs.is_fit], seed), y[~pairs.is_fit])
            figures[count][name] = {"r2": float(scores.mean()), "r2_per_dim": scores.tolist()}
    return figures


def leakage(pairs: Pairs, features: dict[str, Tensor], seed: int) -> dict:
    """What z tells of what is no action: r2 with its interval.

    Beside it, what the true action, the random encoder, and as many principal components of the change of pixels as z
    has dimensions tell of it: whoever describes a change in so many numbers tells so much.
    """
    dim = min(features[Z].shape[1], MAX_COMPONENTS)
    change = principal_components(flat(pairs.second) - flat(pairs.first), pairs.is_fit, dim)
    inputs = {Z: features[Z], CHANGE: change}
    if pairs.actions is not None:
        inputs["true action"] = pairs.actions
    if RANDOM in features:
        inputs[RANDOM] = features[RANDOM]
    figures = {}
    for name, target in pairs.facts.items():
        target = target[:, varying(target, pairs.is_fit)]
        if not target.shape[1]:
            continue
        figures[name] = {}
        for source, x in inputs.items():
            s = best(score(x, target, pairs, [*PROBES] if source in (Z, CHANGE) else ["ridge"], seed))
            figures[name][source] = {"r2": float(s.r2.mean()), "interval": interval(s.resampled.mean(dim=1))}
    return figures


def episode_identity(pairs: Pairs, features: dict[str, Tensor]) -> dict | None:
    """How often a linear probe tells which of up to `MAX_EPISODES` episodes a pair is of, fitted on the other half of
    the pairs of each. None where no two episodes have four pairs."""
    _, number, counts = pairs.episodes.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0)).to(counts.device)
    chosen = order[counts[order].argsort(descending=True, stable=True)][:MAX_EPISODES]
    chosen = chosen[counts[chosen] >= 4]
    if len(chosen) < 2:
        return None
    inputs = {Z: features[Z]} | ({} if pairs.actions is None else {"true action": pairs.actions})
    rows = torch.isin(number, chosen).nonzero().flatten()
    rows = rows[number[rows].argsort(stable=True)]
    label = (number[rows][:, None] == chosen).double()  # b k
    is_fit = torch.arange(len(rows)) % 2 == 0
    half = torch.arange(len(rows))[is_fit] // 2 % 2  # penalties are chosen between the halves of the fitted half
    figures = {"episodes": len(chosen), "chance": float(label.mean(dim=0).max())}
    for name, x in inputs.items():
        pred = ridge(x[rows][is_fit], label[is_fit], x[rows][~is_fit], half)
        figures[name] = float((pred.argmax(1) == label[~is_fit].argmax(1)).double().mean())
    return figures


def dependence(indices: Tensor, actions: Tensor, seed: int) -> dict:
    """Mutual information [nat] of codes int64 (b, m) and k-means bins of the actions, and what it is where codes of
    other pairs stand beside the actions: shifted in time as a whole, so that neighbours stay neighbours.

    of each position of the codes, and of the whole sequence: {"mi", "nmi", "null", "null_95"}, the latter of nmi.
    """
    bins = k_means(actions[:, ~is_constant(actions)], NUM_ACTION_BINS, seed)
    _, sequence = indices.unique(dim=0, return_inverse=True)
    offsets = torch.randperm(len(bins) - 1, generator=torch.Generator().manual_seed(seed))[:NUM_SHIFTS] + 1

    def against_null(codes: Tensor) -> dict:
        mi, nmi = mutual_information(codes, bins)
        null = torch.tensor([mutual_information(codes.roll(k), bins)[1] for k in offsets.tolist()])
        return {"mi": mi, "nmi": nmi, "null": float(null.mean()), "null_95": float(null.quantile(0.95))}

    return {"positions": [against_null(column) for column in indices.unbind(1)], "sequence": against_null(sequence)}


def health(latents: LatentActions, codebook_size: int | None) -> dict:
    """Use of the codes over the whole pass; of continuous ones, the dimensions in use.

    effective_dims: participation ratio of the covariance's eigenvalues, (sum l)^2 / sum l^2.
    """
    if latents.indices is not None and codebook_size is not None:
        possible = min(len(latents.indices), codebook_size ** latents.indices.shape[1])
        return code_health(latents.indices, codebook_size) | {"possible_sequences": possible}
    vectors = latents.vectors.flatten(1).double()
    values = torch.linalg.eigvalsh(torch.cov(vectors.T).reshape(vectors.shape[1], -1)).clamp(min=0)
    effective = values.sum().square() / values.square().sum().clamp(min=1e-24)
    return {"dims": vectors.shape[1], "effective_dims": float(effective)}


def transfer(x: Tensor, y: Tensor, pairs: Pairs, groups: Tensor, names: dict[int, str], seed: int) -> list[dict]:
    """Ridge probes fitted on each group of episodes and scored on each: fitted, scored, r2, interval."""
    which, cells = varying(y, pairs.is_fit), []
    for a in names:
        for b in names:
            rows = torch.where(pairs.is_fit, groups == a, groups == b)
            part = pairs._replace(is_fit=pairs.is_fit[rows], episodes=pairs.episodes[rows])
            if part.episodes[part.is_fit].unique().numel() < 2 or part.is_fit.all():
                continue
            s = score(x[rows], y[rows][:, which], part, ["ridge"], seed)["ridge"]
            cell = {"fitted": names[a], "scored": names[b], "r2": float(s.r2.mean())}
            cells.append(cell | {"interval": interval(s.resampled.mean(dim=1))})
    return cells


def ratio_of_transfer(cells: list[dict]) -> float | None:
    """R2 from one group to another, over that within the other; the mean over pairs of groups. None where there is one
    group, or nothing to transfer."""
    within = {cell["scored"]: cell["r2"] for cell in cells if cell["fitted"] == cell["scored"]}
    ratios = [
        cell["r2"] / within[cell["scored"]]
        for cell in cells
        if cell["fitted"] != cell["scored"] and within.get(cell["scored"], 0.0) > MIN_TRANSFERRED
    ]
    return fmean(ratios) if ratios else None


def features_of(actions: LatentActions, codebook_size: int | None) -> Tensor:
    """What probes read of latent actions (b, d): one indicator per code where codes come without vectors."""
    if not actions.vectors.numel():
        assert actions.indices is not None and codebook_size is not None
        return one_hot_features(actions.indices, (codebook_size,))
    levels = () if codebook_size is None else (codebook_size,)
    return probe_features(actions.vectors, actions.indices, levels, MAX_INDICATORS)


def flat(frames: Tensor) -> Tensor:
    """uint8 frames (b, c, h, w) as rows of numbers in [0, 1]."""
    return rearrange(frames, "b c h w -> b (c h w)").float() / 255
