"""Validation of a VLA on held-out episodes: does it predict the latent actions, by the text and by the image, and
what do its predictions say about the actions? Every figure stands beside its control.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hlrp.contract import SampleSet
from hlrp.images import regrid
from hlrp.laq import LAQ
from hlrp.laq_validation import COLLAPSED_UP_TO, TOLD_FROM, Share, joined, probe_rows
from hlrp.metrics import code_health, episode_split, mean_one_hot_features, one_hot_features, probe_r2
from hlrp.quantizers import nearest
from hlrp.strategies import Latents
from hlrp.transformer import mean_action
from hlrp.vla import VLA, Predicted
from hlrp.vlm import VLM

CONDITIONS = ("", "_shuffled_text", "_blank_image")


class Predictions(NamedTuple):
    """What a VLA predicts for a whole set, in its order. The axis c is the condition (`CONDITIONS`)."""

    true_indices: Tensor | None  # int64 (b, t, m)
    true_vectors: Tensor  # (b, t, e)
    indices: Tensor | None  # int64 (b, c, t, m)
    vectors: Tensor | None  # (b, c, t, e)
    expected: Tensor | None  # (b, t, m, k) or (b, t, e): `VLA.expected` under the first condition
    errors: Tensor | None  # (b, c): the head's loss, where it was asked for
    episodes: Tensor  # int64 (b,)
    actions: Tensor | None  # (b, a), mean over the span
    has_action: Tensor | None  # bool (b,)


@torch.no_grad()
def label(laq: LAQ, frames: Tensor) -> dict[str, Tensor]:
    """What a VLA learns from frames (b, t + 1, c, h, w): the latent actions between them, and the features (b, n, d) of
    the first, at zero mean and unit variance. Each frame is embedded once."""
    embedded = laq.embed(laq.observe(frames))  # b t n d
    last = embedded[:, 0].chunk(laq.num_views, dim=1)[-1]  # of the camera whose image stands last in a prompt
    labels = {"features": F.layer_norm(last, last.shape[-1:])}
    if frames.shape[1] == 1:
        return labels
    actions = laq.between_all(embedded)
    labels["latent_vectors"] = actions.vectors.flatten(2)
    return labels if actions.indices is None else labels | {"latent_indices": actions.indices}


def feature_dim(laq: LAQ, vlm: VLM) -> int:
    """How many numbers of the LAQ's features one image token of the VLM predicts."""
    blank = torch.zeros(1, 1, 3, laq.num_views * laq.image_size, laq.image_size, dtype=torch.uint8)
    features = label(laq, blank.to(laq.queries.device))["features"]
    return regrid(features, vlm.num_image_tokens).shape[-1]


def shuffled(batch: dict) -> dict:
    """The batch with each sample's latent actions replaced by another's: the control for what they say."""
    names = [name for name in batch if name in ("latent_vectors", "latent_indices", "latent_is_pad")]
    return batch | {name: batch[name].roll(1, dims=0) for name in names}


def complete(laq: LAQ, predicted: Predicted) -> tuple[Tensor | None, Tensor]:
    """A prediction as indices (b, t, m), None where the LAQ is continuous, and as vectors (b, t, e).

    A flow's vector stands for the nearest code.
    """
    indices, vectors = predicted
    num_tokens = laq.config.num_tokens
    if vectors is None:
        assert indices is not None
        vectors = laq.quantizer.lookup(indices.flatten(0, 1))  # (b t) n e
        return indices, vectors.flatten(1).unflatten(0, indices.shape[:2])
    if laq.quantizer.codebook_size is None:
        return None, vectors
    every = torch.arange(laq.quantizer.codebook_size, device=vectors.device)
    codebook = laq.quantizer.lookup(every[:, None])[:, 0]  # k e
    tokens = vectors.flatten(0, 1).unflatten(1, (num_tokens, -1))  # (b t) n e
    return nearest(tokens, codebook).unflatten(0, vectors.shape[:2]), vectors


def other_tasks(tasks: list[str], every: list[str], seed: int) -> list[str]:
    """For each instruction another one of those in `every`, drawn at random; the same where there is but one."""
    if len(every) == 1:
        return tasks
    steps = torch.randint(1, len(every), (len(tasks),), generator=torch.Generator().manual_seed(seed))
    return [every[(every.index(t) + k) % len(every)] for t, k in zip(tasks, steps.tolist(), strict=True)]


def under(condition: str, batch: dict, tasks: list[str], seed: int) -> dict:
    """The batch as a model sees it under one of `CONDITIONS`; tasks: all of the set's instructions."""
    if condition == "_shuffled_text":
        return batch | {"task": other_tasks(batch["task"], tasks, seed)}
    if condition == "_blank_image":
        return batch | {"images": torch.full_like(batch["images"], 128)}
    return batch


@torch.no_grad()
def evaluate(
    vla: VLA,
    laq: LAQ,
    sets: Mapping[str, SampleSet],
    fit_sets: Mapping[str, SampleSet] | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, dict]:
    """The report of each source; the arguments are as in `hlrp.laq_validation.evaluate`.

    Plain JSON. A figure that a source cannot have is missing or None:
        samples, episodes, tasks
        loss, loss_shuffled_text, loss_blank_image     of the head: negative log-likelihood of a code, or flow error
        accuracy, accuracy_shuffled_text, accuracy_blank_image, accuracy_by_position    of predicted codes
        majority, majority_by_position                 accuracy of the set's own most frequent code at each position
        unique_sequences, perplexity, usage            of the predicted codes, possible_sequences their bound
        action_r2, action_r2_random                    ridge probe of the mean action, fitted on true latent actions,
                                                       from predicted ones: how likely each code is, the flow's mean
        action_r2_true                                 from the true latent actions: what can be reached
    """
    share = Share(rank, num_ranks, batch_size, num_workers, next(laq.parameters()).device)
    was_training = vla.training
    vla.eval()
    report = {}
    for name, dataset in sets.items():
        if len(dataset) < num_ranks:
            raise ValueError(f"{name} has {len(dataset)} samples for {num_ranks} ranks: give it more episodes")
        tasks = share.tasks(dataset)
        predictions = predict_all(vla, laq, dataset, share, seed, CONDITIONS, tasks, with_errors=True)
        figures: dict[str, Any] = {"samples": len(dataset), "episodes": len(predictions.episodes.unique())}
        figures["tasks"] = len(tasks)
        assert predictions.errors is not None
        for i, condition in enumerate(CONDITIONS):
            figures[f"loss{condition}"] = float(predictions.errors[:, i].double().mean())
        indices, true_indices = predictions.indices, predictions.true_indices
        codebook_size = laq.quantizer.codebook_size
        if indices is not None and true_indices is not None and codebook_size is not None:
            figures |= accuracies(indices, true_indices)
            figures |= code_health(indices[:, 0].flatten(1), codebook_size)
            figures["possible_sequences"] = len(true_indices.flatten(1).unique(dim=0))
        if predictions.actions is not None:
            fit = None
            if fit_sets and name in fit_sets:
                fit = predict_all(vla, laq, fit_sets[name], share, seed, (), tasks, with_errors=False)
            figures |= action_probes(predictions, fit, laq.quantizer.levels, seed)
        report[name] = figures
    vla.train(was_training)
    return report


def predict_all(
    vla: VLA,
    laq: LAQ,
    dataset: SampleSet,
    share: Share,
    seed: int,
    conditions: tuple[str, ...],
    tasks: list[str],
    with_errors: bool,
) -> Predictions:
    """Labels and predicts this rank's share of a set, under each of the conditions, and gathers all of them."""
    parts = []
    for _, batch in share.batches(dataset):
        if "latent_vectors" not in batch:
            batch |= label(laq, batch["frames"])
        rows, errors, expected = [], [], None
        for condition in conditions:
            seen = under(condition, batch, tasks, seed)
            predicted = vla.generate(seen["images"], seen["task"])
            rows.append(complete(laq, predicted))
            torch.manual_seed(seed)  # sequences, times and noise: the same at every validation
            if not condition:
                expected = vla.expected(seen["images"], seen["task"])
            if with_errors:
                errors.append(vla.score(seen))
        indices, vectors = zip(*rows, strict=True) if rows else ((None,), (None,))
        actions = has_action = None
        if "action" in batch:
            actions, has_action = mean_action(batch["action"].double(), batch["action_is_pad"])
        parts.append(
            Predictions(
                batch.get("latent_indices"),
                batch["latent_vectors"],
                None if indices[0] is None else torch.stack(indices, dim=1),
                None if vectors[0] is None else torch.stack(vectors, dim=1),
                expected,
                torch.stack(errors, dim=1) if with_errors else None,
                batch["episode"],
                actions,
                has_action,
            )
        )
    return joined(parts, share.gather)


def accuracies(indices: Tensor, true: Tensor) -> dict:
    """indices int64 (b, c, t, m), true int64 (b, t, m)."""
    hits = (indices == true[:, None]).double().mean(dim=(0, 2))  # c m
    counts = torch.stack([column.bincount().max() for column in true.flatten(0, 1).unbind(-1)])
    majority = counts.double() / true[..., 0].numel()
    names = [f"accuracy{condition}" for condition in CONDITIONS]
    return dict(zip(names, hits.mean(1).tolist(), strict=True)) | {
        "accuracy_by_position": hits[0].tolist(),
        "majority": float(majority.mean()),
        "majority_by_position": majority.tolist(),
    }


def action_probes(scored: Predictions, fit: Predictions | None, levels: Sequence[int], seed: int) -> dict:
    """Ridge probes from latent actions to the mean action, scored on validation episodes.

    They are fitted on true latent actions, and read predicted ones by the same weights: of codes how likely each is,
    of a flow the mean of its vectors. A probe fitted on predictions would also find what is no latent action in them.
    """
    rows = probe_rows(scored, fit)
    if rows is None:
        return {"action_r2": None, "action_r2_random": None, "action_r2_true": None}
    sides, is_fit, actions, episodes = rows
    if fit is None:
        is_fit = episode_split(episodes, share=0.5, seed=seed)

    def true_features(of_codes: bool) -> list[Tensor]:
        """Of the codes, or else of the vectors."""
        features = []
        for side in sides:
            x = side.true_vectors.flatten(1)
            if of_codes:
                x = one_hot_features(side.true_indices.flatten(1), levels)
            features.append(x[side.has_action])
        return features

    assert scored.expected is not None
    are_codes = scored.expected.ndim == 4
    expected = scored.expected.flatten(1)
    if are_codes:
        expected = mean_one_hot_features(scored.expected.flatten(1, 2), levels)
    expected = expected[scored.has_action]
    known = true_features(are_codes)
    read = torch.where(is_fit[:, None], torch.cat(known), torch.cat([*known[:-1], expected]))
    predicted = probe_r2(read, actions, episodes, is_fit, seed)
    every = true_features(scored.true_indices is not None)
    true = probe_r2(torch.cat(every), actions, episodes, is_fit, seed)
    return {
        "action_r2": predicted["r2"],
        "action_r2_random": predicted["r2_random"],
        "action_r2_per_dim": predicted["r2_per_dim"],
        "action_r2_true": true["r2"],
    }


def alarms(report: dict[str, dict]) -> list[str]:
    """A sentence for each figure that says that the model does not predict latent actions."""
    sentences = []
    for name, figures in report.items():
        if "accuracy" in figures and figures["accuracy"] <= figures["majority"]:
            sentences.append(
                f"{name}: the codes predicted are right for {figures['accuracy']:.1%}, no more than the most "
                f"frequent code at each position ({figures['majority']:.1%})."
            )
        unique = figures.get("unique_sequences")
        if unique is not None and unique <= min(COLLAPSED_UP_TO, figures["possible_sequences"] // 2):
            sentences.append(
                f"{name}: the predictions have collapsed. Different sequences of codes: {unique} predicted, "
                f"{figures['possible_sequences']} true ones in {figures['samples']} samples."
            )
        for condition, fault in (("_shuffled_text", "read the text"), ("_blank_image", "look at the image")):
            if figures[f"loss{condition}"] <= figures["loss"] and (
                condition != "_shuffled_text" or figures["tasks"] > 1
            ):
                sentences.append(
                    f"{name}: the model does not {fault}: its loss is {figures['loss']:.3f}, and "
                    f"{figures[f'loss{condition}']:.3f} with {condition[1:].replace('_', ' ')}."
                )
    return sentences


def findings(report: dict[str, dict]) -> list[tuple[str, str, str, str, str]]:
    """What a report says in words, a row each: source, figure, value, control, verdict."""
    rows = []
    for name, figures in report.items():
        text, image = (figures[f"loss_{condition}"] > figures["loss"] for condition in ("shuffled_text", "blank_image"))
        verdict = f"the image is {'' if image else 'not '}looked at"
        if figures["tasks"] > 1:
            verdict = f"the text is {'' if text else 'not '}read, {verdict}"
        if "accuracy" in figures:
            control = f"most frequent code {figures['majority']:.0%}, "
            control += f"another text {figures['accuracy_shuffled_text']:.0%}, "
            control += f"blank image {figures['accuracy_blank_image']:.0%}"
            rows.append((name, "codes predicted", f"{figures['accuracy']:.0%}", control, verdict))
        else:
            control = f"another text {figures['loss_shuffled_text']:.2f}, blank image {figures['loss_blank_image']:.2f}"
            rows.append((name, "loss of the latent actions", f"{figures['loss']:.2f}", control, verdict))
        if (r2 := figures.get("action_r2")) is not None:
            random, true = figures["action_r2_random"], figures["action_r2_true"]
            verdict = "the prediction tells the actions" if r2 > random + TOLD_FROM else "it does not tell the actions"
            control = f"true codes {true:.2f}, random codes {random:.2f}"
            rows.append((name, "R2 of the true actions from the prediction", f"{r2:.2f}", control, verdict))
    return rows


def predicted_latents(vla: VLA, laq: LAQ, batch: dict) -> Latents:
    """The first latent action that a VLA predicts for each sample, and the true one."""
    was_training, device = vla.training, next(laq.parameters()).device
    vla.eval()
    parts = []
    for some in torch.arange(len(batch["frames"])).split(64):
        images, tasks = batch["images"][some].to(device), [batch["task"][i] for i in some]
        indices, vectors = complete(laq, vla.generate(images, tasks))
        codes = laq.expand(vectors[:, 0].unflatten(1, (laq.config.num_tokens, -1)))
        true, _ = laq.encode(batch["frames"][some, :2].to(device))
        parts.append(Latents(codes, None if indices is None else indices[:, 0], true))
    vla.train(was_training)
    return joined(parts, Tensor.cpu)
