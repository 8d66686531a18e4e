"""The data of a LeRobot policy: demonstrations and other video, their features, statistics and batches, and validation.

Validation says how far the actions of a policy are from the true ones on held-out demonstrations, beside what the mean
action, another instruction and a grey image give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE
from torch import Tensor
from torch.utils.data import Dataset

from hlrp.action_expert import mean_over_steps
from hlrp.clips import Clips
from hlrp.contract import EpisodeRange, Stream, choose_demonstrations, split_episodes
from hlrp.data import Mixture, choose_clips, whole_column
from hlrp.idle import busy_frames
from hlrp.inverse import PseudoLabelled
from hlrp.label import latent_space
from hlrp.laq import LAQ
from hlrp.laq_validation import Share
from hlrp.metrics import column_statistics, normalisable
from hlrp.streams import clips_of
from hlrp.vla import LatentSpace
from hlrp.vla_validation import CONDITIONS, label, under


@dataclass
class Part:
    """One source of a policy's data."""

    source: Any  # what is learned from, with pseudo-actions where there are some
    truth: Any  # the source itself, which validation compares with
    weight: float
    train: np.ndarray | EpisodeRange  # episodes to learn from
    val: np.ndarray | EpisodeRange  # and those held out
    demonstrations: np.ndarray  # training episodes whose actions are learned

    @property
    def video(self) -> np.ndarray | EpisodeRange:
        """The training episodes that show their latent actions alone."""
        return self.train if isinstance(self.source, Stream) else np.setdiff1d(self.train, self.demonstrations)


def choose_parts(args, sources: Sequence, weights: Sequence[float]) -> list[Part]:
    """A part for each source. args: `val_fraction`, `seed`, `demonstrations`, `episodes`, `pseudo_actions` are read.

    Raises ValueError for settings that are of one source, where there are several.
    """
    for name in ("episodes", "pseudo_actions"):
        if (value := getattr(args, name)) is not None and len(sources) > 1:
            uris = ", ".join(source.uri for source in sources)
            raise ValueError(f"{name}={value}; expected one source, got {len(sources)}: {uris}")
    parts = []
    for source, weight in zip(sources, weights, strict=True):
        train, val = split_episodes(source, args.val_fraction, args.seed)
        if args.episodes is None:
            demonstrations = choose_demonstrations(source, train, args.demonstrations, args.seed)
        else:
            demonstrations = check_episodes(args.episodes, source, train)
        parts.append(Part(source, source, weight, train, val, demonstrations))
    if args.pseudo_actions is not None:
        (part,) = parts
        part.source = PseudoLabelled(part.truth, args.pseudo_actions, part.demonstrations)
    return parts


def check_episodes(episodes: Sequence[int], source, train: np.ndarray) -> np.ndarray:
    """The given episodes; raises ValueError where one of them is held out or does not exist."""
    if strangers := sorted(set(episodes) - set(train.tolist())):
        raise ValueError(
            f"episodes={strangers} of {source.uri} are held out or do not exist; of its {len(source.lengths)} those "
            f"to train on are {train.tolist()[:8]}..., by --val-fraction and --seed"
        )
    return np.sort(np.array(episodes))


def robots_of(parts: Sequence[Part], config) -> list[Clips]:
    """The demonstrations of each source that has some, as a policy of this config learns them."""
    sizes = {"min_times": 1, "chunk_size": config.chunk_size, "num_images": config.n_obs_steps}
    return [
        Clips(part.truth, part.demonstrations, (0.0,), labelled_episodes=part.demonstrations, **sizes)
        for part in parts
        if len(part.demonstrations)
    ]


def mix(args, parts: Sequence[Part], times: Sequence[float], with_video: bool, cached: dict | None, **sizes):
    """The mixture of demonstrations and other video, and held-out samples of each source by its name.

    times: of the frames of a sample [s]. with_video: whether anything learns from video without actions. cached: the
    latent space of cached latent actions. args: `action_free`, `idle`, `pseudo_actions` and those of samples are read.
    """
    clips, weights, val = [], [], {}
    for i, part in enumerate(parts):
        settings = {"times": times, "source_index": i, "min_times": 1, **sizes}
        learned = {"latent_space": cached, "frames": None, **settings}
        if args.idle.is_set():
            learned["frames"] = busy_frames(part.source, args.idle)
        if len(part.demonstrations):
            clips.append(Clips(part.source, part.demonstrations, **learned))
            weights.append(part.weight * (1 - args.action_free))
            held_out = Clips(part.truth, part.val, **settings)
            val[part.source.name] = choose_clips(held_out, args.val_samples, args.seed, args.skip_broken)
        if len(part.video) and args.action_free and with_video:
            labelled = part.video if args.pseudo_actions else ()
            name = f"{part.source.name}-video"
            video = clips_of(part.source, part.video, **learned, labelled_episodes=labelled, name=name, seed=args.seed)
            clips.append(video)
            weights.append(part.weight * args.action_free)
    return Mixture(clips, weights, args.seed, args.skip_broken), val


def robot_features(clips: Sequence[Clips], with_state: bool) -> tuple[dict, dict]:
    """Inputs and outputs of a policy that learns from labelled clips: their cameras, the state where they have one.

    Raises ValueError where there is no action, and where sources differ in action or state.
    """
    from lerobot.configs import FeatureType, PolicyFeature

    sources = [c.source for c in clips]
    if not sources:
        raise ValueError(
            "no source has actions that can be read at random; a policy needs some labelled demonstrations, and "
            "python -m hlrp.shards makes them of a stream"
        )
    first = sources[0]
    for source in sources[1:]:
        if (source.action_dim, source.state_dim) != (first.action_dim, first.state_dim):
            raise ValueError(
                f"{source.uri} has {source.action_dim} actions and {source.state_dim} states, {first.uri} has "
                f"{first.action_dim} and {first.state_dim}; the demonstrations of a policy are of one robot"
            )
    shape = tuple(first.read(int(clips[0].episodes[0]), [0])["frames"].shape[1:])
    cameras = sorted([first.camera or OBS_IMAGE, *first.views])
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, shape) for camera in cameras}
    if with_state and first.state_dim:
        inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (first.state_dim,))
    return inputs, {ACTION: PolicyFeature(FeatureType.ACTION, (first.action_dim,))}


def refuse_other_cameras(sources: list, config) -> None:
    """Raises ValueError for a source with more or fewer cameras than the policy."""
    for source in sources:
        found = [source.camera, *source.views]
        if len(found) != len(config.image_features):
            raise ValueError(
                f"{source.uri} has {len(found)} of the {len(config.image_features)} cameras that the policy sees, "
                f"{', '.join(sorted(config.image_features))}; ?camera=top,wrist chooses some of a LeRobot dataset"
            )


def statistics(clips: Sequence[Clips], with_state: bool) -> dict[str, dict[str, np.ndarray]]:
    """LeRobot's statistics of the actions and states in the labelled episodes, and in no others; as `normalisable` has
    them. Raises ValueError, which names the episode, where one is not finite."""

    def of(name: str) -> dict[str, np.ndarray]:
        parts = [whole_column(c.source, name, c.labelled_episodes) for c in clips]
        return normalisable(column_statistics(np.concatenate(parts)))

    found = {ACTION: of("actions")}
    if with_state and clips[0].source.state_dim:
        found[OBS_STATE] = of("states")
    return found


def to_lerobot(batch: dict, config) -> dict[str, Tensor | list[str]]:
    """A batch of `Clips` for a policy -> what LeRobot's preprocessor of it takes."""
    cameras, images = sorted(config.image_features), batch["images"]  # b (cameras t) c h w
    found = {"task": batch["task"]}
    for camera, frames in zip(cameras, (images.float() / 255).chunk(len(cameras), dim=1), strict=True):
        found[camera] = frames if config.n_obs_steps > 1 else frames[:, 0]
    if config.robot_state_feature is not None:
        found[OBS_STATE] = batch["state"][:, : config.robot_state_feature.shape[0]]
    if "action" in batch:
        found |= {ACTION: batch["action"][..., : config.action_feature.shape[0]]}
        found |= {"action_is_pad": batch["action_is_pad"]}
    return found


def teacher_of(policy, folder: Path) -> tuple[LAQ | None, LatentSpace | None]:
    """The LAQ whose latent actions a policy predicts beside its actions, and what they are; None where there is none.

    Raises ValueError where `folder` holds another LAQ than the one that stage 2 learned from.
    """
    config = policy.config
    if policy.latent_head is None or not config.latent_weight:
        return None, None
    laq = LAQ.from_pretrained(folder).requires_grad_(False).to(config.device)
    if laq.fingerprint != config.stage2["latent_space"]["fingerprint"]:
        raise ValueError(f"laq={folder} is not the one that stage 2 learned from; --policy.latent-weight 0 needs none")
    return laq, latent_space(laq)


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
    """The report of each source, as `hlrp.laq_validation.evaluate` makes that of a LAQ, and called alike.

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
