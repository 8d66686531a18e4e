"""Validation of a policy on held-out demonstrations: how far its actions are from the true ones, beside what the mean
action, another instruction and a grey image give."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hlrp.action_expert import mean_over_steps
from hlrp.demonstrations import to_lerobot
from hlrp.predictions import CONDITIONS, label, under
from hlrp.validation import Share


@torch.no_grad()
def evaluate(
    policy,
    preprocessor,
    laq,
    sets: dict[str, Dataset],
    rank: int = 0,
    num_ranks: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, dict]:
    """The report of each source, as `hlrp.validation.evaluate` makes that of a LAQ, and called alike.

    laq: of the latent actions that the policy predicts beside, or None. Errors are mean absolute ones over the steps
    of a chunk that are none of padding, in standard deviations of an action:
        samples, episodes, tasks
        action_loss, latent_loss                           as in training
        action_error, action_error_shuffled_text, action_error_blank_image
        action_error_mean                                  of the mean action of the demonstrations
    """
    share = Share(rank, num_ranks, batch_size, num_workers, next(policy.parameters()).device)
    was_training = policy.training
    policy.eval()
    report = {}
    for name, dataset in sets.items():
        if len(dataset) < num_ranks:
            raise ValueError(f"{name} has {len(dataset)} samples for {num_ranks} ranks: give it more episodes")
        tasks = share.tasks(dataset)
        rows, losses, episodes = [], [], []
        for _, batch in share.batches(dataset):
            truth = preprocessor(to_lerobot(batch, policy.config))
            errors = [absolute_error(torch.zeros_like(truth["action"]), truth)]
            for condition in CONDITIONS:
                seen = under(condition, batch, tasks, seed)
                torch.manual_seed(seed)  # the flow's noise: the same at every validation
                chunk = policy.predict_action_chunk(preprocessor(to_lerobot(seen, policy.config)))
                errors.append(absolute_error(chunk, truth))
            rows.append(torch.stack(errors, dim=1))
            torch.manual_seed(seed)
            labelled = {"latent_is_pad": batch["latent_is_pad"]} | label(laq, batch["frames"]) if laq else {}
            counts = {"num_labelled": (~truth["action_is_pad"]).any(1).sum()}  # here, and not of all ranks
            if labelled:
                counts["num_latent"] = (~batch["latent_is_pad"]).any(1).sum()
            _, metrics = policy(truth | labelled | counts)
            losses.append(torch.tensor([list(metrics.values())] * len(batch["task"]), device=share.device))
            episodes.append(batch["episode"])
        means = share.gather(torch.cat(rows)).double().mean(0).tolist()
        figures = {"samples": len(dataset), "episodes": len(share.gather(torch.cat(episodes)).unique())}
        figures["tasks"] = len(tasks)
        figures |= dict(zip(metrics, share.gather(torch.cat(losses)).mean(0).tolist(), strict=True))
        figures |= {"action_error_mean": means[0]}
        figures |= {f"action_error{c}": mean for c, mean in zip(CONDITIONS, means[1:], strict=True)}
        report[name] = figures
    policy.train(was_training)
    return report


def absolute_error(chunk: Tensor, truth: dict) -> Tensor:
    """Of normalised actions (b, t, a), the mean (b,) over the steps that are none of padding."""
    return mean_over_steps((chunk - truth["action"]).abs().mean(-1), truth["action_is_pad"])


def alarms(report: dict[str, dict]) -> list[str]:
    """A sentence for each figure that says that the policy has not learned its task."""
    sentences = []
    for name, figures in report.items():
        error = figures["action_error"]
        if error >= figures["action_error_mean"]:
            sentences.append(
                f"{name}: the policy's actions are off by {error:.2f} standard deviations, the mean action by "
                f"{figures['action_error_mean']:.2f}."
            )
        for condition, fault in (("_shuffled_text", "read the text"), ("_blank_image", "look at the image")):
            other = figures[f"action_error{condition}"]
            if other <= error and (condition != "_shuffled_text" or figures["tasks"] > 1):
                sentences.append(
                    f"{name}: the policy does not {fault}: its error is {error:.2f}, and {other:.2f} with "
                    f"{condition[1:].replace('_', ' ')}."
                )
    return sentences
