"""Robot demonstrations for a LeRobot policy: what features and statistics they have, and batches as LeRobot's
processors take them. Which episodes they are, `hlrp.chosen` says."""

from collections.abc import Sequence

import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE
from torch import Tensor

from hlrp.chosen import whole_column
from hlrp.clips import Clips
from hlrp.metrics import column_statistics, normalisable


def robot_features(clips: Sequence[Clips], with_state: bool) -> tuple[dict, dict]:
    """Inputs and outputs of a policy that learns from labelled clips: their cameras, the state where they have one.

    Raises ValueError where there is no action, and where sources differ in action or state.
    """
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
    cameras = sorted([first.camera or OBS_IMAGE, *getattr(first, "views", ())])
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, shape) for camera in cameras}
    if with_state and first.state_dim:
        inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (first.state_dim,))
    return inputs, {ACTION: PolicyFeature(FeatureType.ACTION, (first.action_dim,))}


def refuse_other_cameras(sources: list, config) -> None:
    """Raises ValueError for a source with more or fewer cameras than the policy."""
    for source in sources:
        found = [source.camera, *getattr(source, "views", ())]
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
