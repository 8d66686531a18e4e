"""Validation of a LAQ on held-out episodes: does the decoder use the code, is the codebook in use, and what
do the codes tell about the actions? Every figure stands beside its control.

`algebra`, for the probe card, asks whether latent actions undo, add up and come back. There z(a, b) is the latent
action from frame a to frame b, minus the mean of z(a, a), where nothing changes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hlrp.contract import SampleSet
from hlrp.data import Loader, collate, subset
from hlrp.distributed import wait_for_all
from hlrp.laq import LAQ
from hlrp.metrics import MIN_EPISODES, code_health, episode_split, gather, probe_features, probe_r2, ridge
from hlrp.transformer import mean_action

IGNORED_BELOW = 1.05  # shuffled / true error below which the decoder ignores the code
HEALTHY_FROM = 1.2  # and from which it uses it
TOLD_FROM = 0.1  # R2 above that of random codes from which codes tell something
COLLAPSED_UP_TO = 8  # unique sequences in a whole pass
# of `algebra`
CAMERA_SHIFT = 1 / 32  # of the frame's side
BRIGHTNESS = 0.8
BATCH_SIZE = 64
MIN_FITTED = 2  # episodes, to choose the penalty of a ridge on


class EncodedSet(NamedTuple):
    """The latent actions of a whole set, in its order."""

    codes: Tensor  # (b, n, d)
    indices: Tensor | None  # int64 (b, m), None if continuous
    episodes: Tensor  # int64 (b,)
    actions: Tensor | None  # (b, a), mean over the pair's time span, None if the source has none
    has_action: Tensor | None  # bool (b,)


class Share(NamedTuple):
    """Which part of each set this process reads, and how."""

    rank: int
    num_ranks: int
    batch_size: int
    num_workers: int
    device: torch.device

    def batches(self, dataset: SampleSet) -> Iterator[tuple[slice, dict]]:
        """The batches of this rank's part of a set, a contiguous one, each with its place in the set."""
        first, end = (len(dataset) * rank // self.num_ranks for rank in (self.rank, self.rank + 1))
        part = subset(dataset, range(first, end))
        alike = partial(collate, sizes=getattr(dataset, "sizes", None))  # also where none of a batch has an action
        loader = Loader(part, self.batch_size, num_workers=self.num_workers, collate_fn=alike)
        for batch in loader:
            place = slice(first, first + len(batch["frames"]))
            yield place, {key: x.to(self.device) if isinstance(x, Tensor) else x for key, x in batch.items()}
            first = place.stop

    def tasks(self, dataset: SampleSet) -> list[str]:
        """The different instructions of a whole set, on every rank."""
        tasks = {task for _, batch in self.batches(dataset) for task in batch["task"]}
        if self.num_ranks > 1:
            parts = [set[str]()] * self.num_ranks
            wait_for_all()
            dist.all_gather_object(parts, tasks)
            tasks = set().union(*parts)
        return sorted(tasks)

    def gather(self, tensor: Tensor) -> Tensor:
        wait_for_all()  # on the host: shares may differ in how long they take
        return gather(tensor) if self.num_ranks > 1 else tensor


@torch.no_grad()
def evaluate(
    laq: LAQ,
    sets: Mapping[str, SampleSet],
    fit_sets: Mapping[str, SampleSet] | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, dict]:
    """The report of each source, from validation pairs in `sets` and, for its action probe, training pairs in
    `fit_sets`; without the latter the probe is fitted on half of the validation episodes.

    All ranks call it with the same sets (`num_ranks` > 1 needs torch.distributed); each works on its share,
    and all return the same report. The same weights give the same report, and neither the model's mode nor a
    global random state is changed.

    Plain JSON. A figure that a source cannot have (continuous codes, no actions, a single pair) is missing or None:
        pairs, episodes
        pairs_alone               pairs that are the only one of their episode, which no other pair can be swapped with
        error, copy_error         by target, mean squared: with the true code; of the first frame shown again
        true_over_copy, zero_over_true, shuffled_over_true, shuffled_in_episode_over_true
                                  by target, ratios of errors; shuffled: with the code of another pair
        usage, perplexity, entropy, unique_sequences, possible_sequences
                                  the last: the most that a pass of this size can have
        action_r2, action_r2_random, action_r2_per_dim, action_constant_dims
                                  ridge probe of the mean action over the span; random: from noise
    Raises ValueError where a set has fewer pairs than ranks, or shares an episode with its fit set.
    """
    share = Share(rank, num_ranks, batch_size, num_workers, next(laq.parameters()).device)
    for name, dataset in [*sets.items(), *(fit_sets or {}).items()]:
        if len(dataset) < num_ranks:
            raise ValueError(f"{name} has {len(dataset)} pairs for {num_ranks} ranks: give it more episodes")

    was_training = laq.training
    laq.eval()
    report = {}
    for name, dataset in sets.items():
        latents = encode_all(laq, dataset, share)
        report[name] = {"pairs": len(dataset), "episodes": len(latents.episodes.unique())}
        report[name] |= code_use(laq, dataset, latents, share, seed)
        codebook_size = laq.quantizer.codebook_size
        if latents.indices is not None and codebook_size is not None:
            report[name] |= code_health(latents.indices, codebook_size)
            report[name]["possible_sequences"] = min(len(dataset), codebook_size ** latents.indices.shape[1])
        if latents.actions is not None:
            fit = encode_all(laq, fit_sets[name], share) if fit_sets and name in fit_sets else None
            report[name] |= action_probe(latents, fit, laq.quantizer.levels, seed)
    laq.train(was_training)
    return report


def encode_all(laq: LAQ, dataset: SampleSet, share: Share) -> EncodedSet:
    """Encodes this rank's share of a set and gathers all of them."""
    parts = []
    for _, batch in share.batches(dataset):
        actions = has_action = None
        if "action" in batch:
            actions, has_action = mean_action(batch["action"].double(), batch["action_is_pad"])
        parts.append(EncodedSet(*laq.encode(batch["frames"]), batch["episode"], actions, has_action))
    return joined(parts, share.gather)


def joined[T: NamedTuple](parts: Sequence[T], finish: Callable[[Tensor], Tensor]) -> T:
    """Concatenates the tensors of each field and finishes the result; a field that is None stays None."""
    columns = zip(*parts, strict=True)
    return parts[0]._make(None if xs[0] is None else finish(torch.cat(xs)) for xs in columns)


def partners(groups: Tensor, seed: int) -> Tensor:
    """For each sample another one of its group, each chosen once: a random cycle through every group.

    groups: int64 (b,) -> int64 (b,). A sample alone in its group is its own partner.
    """
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).to(groups.device)
    order = order[groups[order].argsort(stable=True)]  # group after group, in random order within
    ordered = groups[order]
    following = torch.arange(1, len(groups) + 1, device=groups.device)
    is_last = following == torch.searchsorted(ordered, ordered, right=True)
    following = torch.where(is_last, torch.searchsorted(ordered, ordered), following)
    result = torch.empty_like(order)
    result[order] = order[following]
    return result


def code_use(laq: LAQ, dataset: SampleSet, latents: EncodedSet, share: Share, seed: int) -> dict:
    """Errors of the decoder with true, zeroed and shuffled codes, and of copying the first frame."""
    codes = latents.codes
    across = partners(torch.zeros_like(latents.episodes), seed)
    within = partners(latents.episodes, seed)
    alone = within == torch.arange(len(codes), device=codes.device)

    targets, parts = [], []
    for place, batch in share.batches(dataset):
        true = codes[place]
        variants = [None, true, torch.zeros_like(true), codes[across[place]], codes[within[place]]]
        errors = laq.errors(batch["frames"], variants, batch["task"])
        targets = list(errors[0])
        errors = torch.stack([torch.stack([by_target[t] for t in targets]) for by_target in errors]).double()
        paired = errors[[1, 4]] * ~alone[place]  # true and shuffled, where the episode has another pair
        parts.append(torch.cat([errors[:4], paired]).sum(dim=-1))  # condition target b -> condition target
    sums = share.gather(reduce(torch.add, parts)[None]).sum(dim=0)
    copy, true, zero, shuffled, true_paired, shuffled_paired = sums.unbind()

    def by_target(values: Tensor) -> dict[str, float]:
        return dict(zip(targets, values.tolist(), strict=True))

    def ratio(above: Tensor, below: Tensor, exists: bool = True) -> dict[str, float] | None:
        """Finite also for a perfect decoder; nothing over nothing is 1."""
        return by_target((above + 1e-12) / (below + 1e-12)) if exists else None

    return {
        "pairs_alone": int(alone.sum()),
        "error": by_target(true / len(codes)),
        "copy_error": by_target(copy / len(codes)),
        "true_over_copy": ratio(true, copy),
        "zero_over_true": ratio(zero, true),
        "shuffled_over_true": ratio(shuffled, true, exists=len(codes) > 1),
        "shuffled_in_episode_over_true": ratio(shuffled_paired, true_paired, exists=not alone.all()),
    }


def probe_rows(scored, fit) -> tuple[list, Tensor, Tensor, Tensor] | None:
    """What a probe of the actions is fitted and scored on: the sets, and for each of their samples that has an action,
    whether the probe is fitted on it, bool (b,), its action (b, a), and its episode, int64 (b,).

    fit: the set to fit on; None: a part of `scored`. Both have `actions`, `has_action` and `episodes`. Returns None
    where there are too few episodes.
    """
    sides = [scored] if fit is None else [fit, scored]
    is_fit = torch.cat([torch.full_like(side.has_action, side is fit)[side.has_action] for side in sides])
    actions = torch.cat([side.actions[side.has_action] for side in sides])
    episodes = torch.cat([side.episodes[side.has_action] for side in sides])
    num_fitted, num_scored = (len(episodes[side].unique()) for side in (is_fit, ~is_fit))
    if num_scored < MIN_EPISODES if fit is None else num_fitted < MIN_EPISODES - 1 or num_scored < 1:
        return None
    return sides, is_fit, actions, episodes


def action_probe(latents: EncodedSet, fit: EncodedSet | None, levels: Sequence[int], seed: int) -> dict:
    """Ridge probe from the codes to the mean action, scored on the validation episodes."""
    rows = probe_rows(latents, fit)
    if rows is None:
        return {"action_r2": None, "action_r2_random": None}
    sides, is_fit, actions, episodes = rows
    features = [probe_features(side.codes, side.indices, levels)[side.has_action] for side in sides]
    x = torch.cat(features)
    probe = probe_r2(x, actions, episodes, is_fit if fit is not None else None, seed)
    return {
        "action_r2": probe["r2"],
        "action_r2_random": probe["r2_random"],
        "action_r2_per_dim": probe["r2_per_dim"],
        "action_constant_dims": probe["constant_dims"],
    }


def alarms(report: dict[str, dict]) -> list[str]:
    """A sentence for each figure that says the codes are not latent actions."""
    sentences = []
    for name, figures in report.items():
        for target, value in (figures["shuffled_over_true"] or {}).items():
            if value < IGNORED_BELOW:
                sentences.append(
                    f"{name}: the decoder ignores the code. Its {target} error with another pair's code is "
                    f"{value:.3f} times that with the true code (healthy: {HEALTHY_FROM} or more)."
                )
        unique = figures.get("unique_sequences")
        if unique is not None and unique <= min(COLLAPSED_UP_TO, figures["possible_sequences"] // 2):
            sentences.append(
                f"{name}: stop, the codebook has collapsed. Different sequences of codes: {unique} in "
                f"{figures['pairs']} pairs, where {figures['possible_sequences']} were possible."
            )
    return sentences


def findings(report: dict[str, dict]) -> list[tuple[str, str, str, str, str]]:
    """What a report says in words, a row each: source, figure, value, control, verdict."""
    rows = []
    for name, figures in report.items():
        for target, ratio in figures["true_over_copy"].items():
            verdict = "predicted" if round(ratio, 2) < 1 else "no better than the first frame shown again"
            rows.append((name, f"error of {target} / error of the first frame", f"{ratio:.2f}", "1", verdict))
        for target, ratio in (figures["shuffled_over_true"] or {}).items():
            verdict = "the codes are used" if ratio >= HEALTHY_FROM else "the codes are hardly used"
            rows.append(
                (name, f"error of {target} with another pair's code / with its own", f"{ratio:.2f}", "1", verdict)
            )
        if (r2 := figures.get("action_r2")) is not None:
            random = figures["action_r2_random"]
            verdict = "the codes tell the actions" if r2 > random + TOLD_FROM else "the codes do not tell the actions"
            rows.append(
                (name, "R2 of the true actions from the codes", f"{r2:.2f}", f"random codes {random:.2f}", verdict)
            )
    return rows


def shifted(frames: Tensor, pixels: int) -> Tensor:
    """Frames uint8 (b, c, h, w) as a camera that turned sees them: moved right and down, the border repeated."""
    size = frames.shape[-1]
    padded = F.pad(frames.float(), (pixels, 0, pixels, 0), mode="replicate")
    return padded[..., :size, :size].to(torch.uint8)


def darker(frames: Tensor) -> Tensor:
    return (frames.float() * BRIGHTNESS).to(torch.uint8)


def relative_error(pred: Tensor, target: Tensor) -> float:
    """Squared error (b, d) over the variance of the target: 0 is exact, 1 as good as the mean."""
    spread = (target - target.mean(dim=0)).square().sum()
    return float((pred - target).square().sum() / spread.clamp(min=1e-12))


@torch.no_grad()
def algebra(laq: LAQ, frames: Tensor, tasks: list[str], episodes: Tensor, has_third: Tensor, seed: int = 0) -> dict:
    """frames: uint8 (b, 3, c, h, w), a, b, c, delta apart; has_third: bool (b,), whether the episode reaches c.

    Plain JSON:
        zero_transition         median length of z(a, a), over that of z(a, b)
        camera_shift            of z(a, a shifted), likewise
        crop, brightness        of what z(a, b) changes by where both frames are shifted, or darker, likewise;
                                None: half of all z(a, b) are z(a, a)
        reversal                relative error of -z(a, b) as z(b, a)
        additivity              of z(a, b) + z(b, c) as z(a, c); None: fewer than four episodes reach c
        cycle                   of z(a, decoded from a and z(a, b)) as z(a, b); None: no pixels are decoded
        cycle_tokens            share of the discrete tokens that the cycle gives back; None: continuous
    The last four are {"true", "shuffled"}: the latter with the latent action of another pair for z(a, b) or z(b, c).
    reversal and additivity are also {"linear", "linear_shuffled"}: the error of a ridge map from z(a, b), or from both,
    fitted on half of the episodes, which asks whether there is a rule at all, in whatever coordinates.
    """
    device = next(laq.parameters()).device

    def linear(x: Tensor, y: Tensor, of: Tensor) -> float:
        is_fit = episode_split(of, share=0.5, seed=seed).to(device)
        return relative_error(ridge(x[is_fit], y[is_fit], x[~is_fit], of.to(device)[is_fit]), y[~is_fit].double())

    def label(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        pairs = torch.stack([first, second], dim=1).split(BATCH_SIZE)
        vectors, indices = zip(*(laq.label(part.to(device)) for part in pairs), strict=True)
        return torch.cat(vectors).flatten(1), None if indices[0] is None else torch.cat(indices).flatten(1)

    def z(first: Tensor, second: Tensor) -> Tensor:
        return label(first, second)[0] - origin

    a, b, c = frames.unbind(1)
    pixels = max(1, round(CAMERA_SHIFT * frames.shape[-1]))
    nothing, _ = label(a, a)
    origin = nothing.mean(dim=0)
    forward, true_indices = label(a, b)
    forward = forward - origin
    others = partners(torch.zeros(len(a), dtype=torch.int64), seed).to(device)
    size = float(forward.norm(dim=-1).median())

    def response(difference: Tensor) -> float | None:
        return float(difference.norm(dim=-1).median()) / size if size else None

    figures: dict[str, float | dict[str, float] | None] = {
        "zero_transition": response(nothing - origin),
        "camera_shift": response(z(a, shifted(a, pixels))),
        "crop": response(z(shifted(a, pixels), shifted(b, pixels)) - forward),
        "brightness": response(z(darker(a), darker(b)) - forward),
    }
    backward = z(b, a)
    figures |= {"reversal": None, "additivity": None, "cycle": None, "cycle_tokens": None}
    if len(episodes.unique()) >= 2 * MIN_FITTED:
        figures["reversal"] = {
            "true": relative_error(-forward, backward),
            "shuffled": relative_error(-forward[others], backward),
            "linear": linear(forward, backward, episodes),
            "linear_shuffled": linear(forward[others], backward, episodes),
        }
    if len(episodes[has_third].unique()) >= 2 * MIN_FITTED:
        a, b, c = frames[has_third].unbind(1)
        first, second, both = forward[has_third.to(device)], z(b, c), z(a, c)
        swapped = partners(torch.zeros(len(second), dtype=torch.int64), seed)
        other, of = second[swapped.to(device)], episodes[has_third]
        figures["additivity"] = {
            "true": relative_error(first + second, both),
            "shuffled": relative_error(first + other, both),
            "linear": linear(torch.cat([first, second], dim=1), both, of),
            "linear_shuffled": linear(torch.cat([first, other], dim=1), both, of),
        }
    if "pixels" in laq.weights:
        a, b, _ = frames.unbind(1)
        decoded = [decode(laq, *part, device) for part in parts(a, b, tasks)]
        again, indices = label(a, torch.cat(decoded))
        again = again - origin
        figures["cycle"] = {"true": relative_error(again, forward), "shuffled": relative_error(again[others], forward)}
        if indices is not None:
            figures["cycle_tokens"] = {
                "true": float((indices == true_indices).double().mean()),
                "shuffled": float((indices[others] == true_indices).double().mean()),
            }
    return figures


def parts(a: Tensor, b: Tensor, tasks: list[str]):
    for i in range(0, len(a), BATCH_SIZE):
        rows = slice(i, i + BATCH_SIZE)
        yield a[rows], b[rows], tasks[rows]


def decode(laq: LAQ, first: Tensor, second: Tensor, tasks: list[str], device) -> Tensor:
    """The second frames as they are decoded, uint8."""
    codes, _ = laq.encode(torch.stack([first, second], dim=1).to(device))
    pixels = laq.decode(first.to(device), codes, tasks, second.to(device))["pixels"]
    return (pixels * 255).round().to(torch.uint8).cpu()
