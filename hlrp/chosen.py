"""Which episodes' actions are learned, which clips are validated on, and which clip takes the place of an
unreadable one; and statistics of actions."""

import logging
from collections.abc import Sequence
from itertools import count
from math import gcd

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from hlrp.clips import Clips, refuse_not_finite
from hlrp.metrics import column_statistics, normalisable
from hlrp.sources import instructions_of
from hlrp.splits import EpisodeRange, is_stream

logger = logging.getLogger(__name__)
STRIDE = 7919  # clips from a broken one to the next that is tried, or a few more: rarely of the same episode
MAX_STEPS = 1000  # of this length, before all of a source are called broken
MAX_EPISODES = 1000  # whose actions statistics are taken of


def labelled_episodes(
    source, episodes: np.ndarray | EpisodeRange, demonstrations: int | None, label_fraction: float, seed: int
) -> np.ndarray | EpisodeRange:
    """Those of the training episodes whose actions are learned beside latent ones: `demonstrations` of each task, which
    are those of a policy; or else `label_fraction` of them, see `labelled_share`.

    Raises ValueError for demonstrations of a stream, and where a task has fewer.
    """
    if demonstrations is None:
        return labelled_share(source, episodes, label_fraction, seed)
    if is_stream(source) and source.action_dim:
        raise ValueError(
            f"demonstrations={demonstrations}, but {source.uri} is a stream, whose tasks are not known before; give "
            f"--label-fraction, or python -m hlrp.shards --data '{source.uri}' makes a source that has them"
        )
    return choose_demonstrations(source, episodes, demonstrations, seed)


def choose_demonstrations(source, episodes: Sequence[int], per_task: int | None, seed: int) -> np.ndarray:
    """`per_task` of `episodes` of each instruction, drawn at random: fewer are part of more. None: all of them. A
    stream, which cannot be read at random, has none. An episode is of its first instruction that is not empty.

    Raises ValueError where an instruction has fewer.
    """
    if not source.action_dim or is_stream(source):
        return np.zeros(0, dtype=np.int64)
    if per_task is None:
        return np.asarray(episodes)
    by_task = shuffled_by_task(source, episodes, seed)
    for task, found in by_task.items():
        if len(found) < per_task:
            raise ValueError(
                f"demonstrations={per_task}, but {source.uri} has {len(found)} training episodes of {task!r}"
            )
    return np.sort([episode for found in by_task.values() for episode in found[:per_task]])


def labelled_share(source, episodes: np.ndarray | EpisodeRange, share: float, seed: int) -> np.ndarray | EpisodeRange:
    """That share of the episodes of each instruction, drawn at random, at least one. A smaller share is part of a
    larger one. Episodes whose instruction no other one has are one group. Of a stream, a share of the hashes."""
    if isinstance(episodes, EpisodeRange):
        return episodes._replace(high=episodes.low + share * (episodes.high - episodes.low))
    if share in (0, 1) or not source.action_dim:
        return np.asarray(episodes)[: round(share * len(episodes))]
    groups = [*shuffled_by_task(source, episodes, seed).values()]
    groups = [found for found in groups if len(found) > 1] + [[e for found in groups if len(found) == 1 for e in found]]
    return np.sort([episode for found in groups for episode in found[: max(1, round(share * len(found)))]])


def shuffled_by_task(source, episodes: Sequence[int], seed: int) -> dict[str, list[int]]:
    """The episodes of each instruction, in a random order that follows from the episodes and the seed."""
    by_task: dict[str, list[int]] = {}
    for episode in np.random.default_rng(seed).permutation(episodes).tolist():
        task = next(filter(None, instructions_of(source, episode)), "")
        by_task.setdefault(task, []).append(episode)
    return by_task


def action_statistics(clips) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation float32 (a,) of the actions in the labelled episodes, or in `MAX_EPISODES` of them
    all over the source; as `normalisable` has them. 0 and 1 where there are none."""
    clips = held(clips, num_episodes=256) if clips.source.action_dim else clips
    source = clips.source
    episodes = np.random.default_rng(0).permutation(clips.labelled_episodes)[:MAX_EPISODES]
    if not source.action_dim or not len(episodes):
        return torch.zeros(source.action_dim), torch.ones(source.action_dim)
    found = normalisable(column_statistics(whole_column(source, "actions", np.sort(episodes))))
    return torch.from_numpy(found["mean"]).float(), torch.from_numpy(found["std"]).float()


def whole_column(source, name: str, episodes: Sequence[int]) -> np.ndarray:
    """`actions` or `states` of all frames of these episodes, (frames, d). Raises ValueError where one is not finite."""
    parts = []
    for episode in map(int, episodes):
        part = getattr(source, name)(episode, np.arange(source.lengths[episode])).numpy()
        refuse_not_finite(f"{source.uri}, episode {episode}: {name.removesuffix('s')}", part)
        parts.append(part)
    return np.concatenate(parts)


def read_clips(clips: Clips, indices: Sequence[int], skip_broken: bool) -> tuple[list[dict], list[str]]:
    """The clips at `indices`, and what could not be read: with `skip_broken`, another clip takes its place."""
    if not skip_broken:
        return clips.__getitems__(indices), []
    try:
        return clips.__getitems__(indices), []
    except ValueError:
        skipped = []
        return [read_or_next(clips, int(index), skipped) for index in indices], skipped


def read_or_next(clips: Clips, index: int, skipped: list[str]) -> dict:
    """The clip, or the first one to be read of a walk from it through all of them."""
    stride = next(n for n in count(STRIDE) if gcd(n, len(clips)) == 1)
    for step in range(min(len(clips), MAX_STEPS)):
        try:
            return clips[(index + step * stride) % len(clips)]
        except ValueError as error:
            skipped.append(str(error))
    raise ValueError(f"{clips.source.uri}: none of {step + 1} clips all over it can be read: {skipped[-1]}")


class Chosen(Subset):
    """Some clips. With `skip_broken`, another takes the place of one that cannot be read, which is logged."""

    def __init__(self, clips: Clips, indices: Sequence[int], skip_broken: bool):
        super().__init__(clips, indices)
        self.skip_broken = skip_broken

    def __getitem__(self, place: int) -> dict:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict]:
        found, skipped = read_clips(self.dataset, [self.indices[i] for i in places], self.skip_broken)
        for message in skipped:
            logger.warning("skipped %s", message)
        return found


def choose_clips(clips, max_clips: int, seed: int, skip_broken: bool = False) -> Chosen:
    """At most `max_clips` clips, spread evenly: one drawn from each of that many equal stretches. Of a stream, eight of
    each of its first episodes."""
    everywhere = clips
    clips = held(clips, num_episodes=-(-max_clips // 8))
    borders = np.linspace(0, len(clips), min(max_clips, len(clips)) + 1).astype(np.int64)
    chosen = np.random.default_rng(seed).integers(borders[:-1], borders[1:]).tolist()
    if clips is not everywhere:
        clips.source.forget_all_but(clips.frames_of(chosen))
    return Chosen(clips, chosen, skip_broken)


def held(clips, num_episodes: int) -> Clips:
    """The clips; of a stream, those of its first episodes, in memory."""
    return clips if isinstance(clips, Clips) else clips.hold(num_episodes)
