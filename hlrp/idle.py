"""Idle frames: frames after which nothing happens for a while. Demonstrations and video are full of them, and a policy
that learns them learns to wait.

    motion(t)   mean absolute change of the image from t to t + span, at 64 pixels, of 255
    action(t)   root mean square of the actions in between, above the least of each dimension; 1 is the source's mean

A frame is idle if every measure with a threshold is below it. The scores of a source and a span are computed once and
kept in $HLRP_CACHE or ~/.cache/hlrp: other thresholds decode no frame again.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hlrp.clips import short
from hlrp.contract import Source, Stream
from hlrp.images import fit

IMAGE_SIZE = 64  # at which motion is measured [pixel]
CHUNK = 256  # frames read together
SHOWN_EPISODES, SHOWN_FRAMES = 6, 12


@dataclass
class IdleConfig:
    motion: float = 0.0  # leave out frames after which the image changes less than this [of 255]; 0: keep them
    action: float = 0.0  # leave out frames after which actions are smaller than this [mean action]; 0: keep them
    span: float = 0.2  # time after a frame over which --idle.motion and --idle.action are measured [s]

    def is_set(self) -> bool:
        return self.motion > 0 or self.action > 0


def scores(source: Source, span: float) -> dict[str, np.ndarray]:
    """`motion` of every frame of every episode in their order, float (frames,), and `action` if there are actions."""
    cache = Path(os.environ.get("HLRP_CACHE", "~/.cache/hlrp")).expanduser() / "idle"
    file = cache / f"{source.fingerprint}_{span:g}s_above_least.npz"
    if not file.is_file():
        episodes = tqdm(range(len(source.lengths)), desc=f"motion of {source.name}", unit="episode", disable=None)
        columns = source.idle_scores(span)
        if columns is None:
            parts = [episode_scores(source, episode, span) for episode in episodes]
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if "action" in columns:
            columns["action"] = activity(columns["action"])
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, allow_pickle=False, **columns)
        partial.replace(file)
    with np.load(file, allow_pickle=False) as saved:
        return dict(saved)


def activity(squares: np.ndarray) -> np.ndarray:
    """How much a robot acts: mean squared actions (t, a) -> (t,), 1 on average.

    Each dimension counts from its least value in the source, because a gripper that rests may have a constant action.
    """
    above = squares - squares.min(axis=0)
    mean = above.mean(axis=0)
    moves = mean > 1e-9 * squares.mean(axis=0)
    return np.sqrt((above[:, moves] / mean[moves]).mean(axis=1)) if moves.any() else np.zeros(len(squares))


def episode_scores(source: Source, episode: int, span: float) -> dict[str, np.ndarray]:
    """`motion` (t,), and as `action` the mean squared action (t, a) over the span in its own units. The last frames
    share the scores of the last whole span."""
    length = int(source.lengths[episode])
    offset = min(max(1, round(float(source.fps[episode]) * span)), max(1, length - 1))
    first = np.minimum(np.arange(length), max(0, length - 1 - offset))
    later = np.minimum(first + offset, length - 1)
    small = []
    for start in range(0, length, CHUNK):
        frames = source.read(episode, range(start, min(start + CHUNK, length)))["frames"]
        small.append(fit(frames, IMAGE_SIZE, getattr(source, "crop", False)))
    small = torch.cat(small).to(torch.int16)
    found = {"motion": (small[later] - small[first]).abs().float().mean(dim=(1, 2, 3)).numpy()}
    if source.action_dim:
        squares = source.actions(episode, range(length)).double().square().numpy()
        sums = np.concatenate([np.zeros((1, source.action_dim)), squares.cumsum(axis=0)])
        found["action"] = (sums[first + offset] - sums[first]) / offset
    return found


def busy_frames(source: Source, config: IdleConfig) -> list[np.ndarray]:
    """The numbers of the frames of each episode that are not idle.

    Raises ValueError for a stream, for a threshold on actions that a source does not have, and if no frame is left.
    """
    for name in ("motion", "action"):
        if getattr(config, name) < 0:
            raise ValueError(f"idle.{name}={getattr(config, name)}; expected 0 or more")
    if config.span <= 0:
        raise ValueError(f"idle.span={config.span}; expected a time above 0 [s]")
    if isinstance(source, Stream):
        raise ValueError(
            f"{source.uri} is a stream, and frames of a stream cannot be left out; "
            f"make a source with python -m hlrp.shards --data '{source.uri}'"
        )
    found = scores(source, config.span)
    if config.action and "action" not in found:
        raise ValueError(f"idle.action={config.action}, but {source.uri} has no actions; set --idle.motion instead")
    thresholds = {name: getattr(config, name) for name in ("motion", "action") if getattr(config, name)}
    is_idle = np.logical_and.reduce([found[name] < threshold for name, threshold in thresholds.items()])
    if is_idle.all():
        highest = ", ".join(f"{name} {found[name].max():.3g}" for name in thresholds)
        raise ValueError(f"{source.uri}: all frames are idle at {thresholds}; the highest: {highest}")
    borders = np.cumsum(source.lengths)[:-1]
    return [np.flatnonzero(~part) for part in np.split(is_idle, borders)]


def save_picture(path: Path, source, config: IdleConfig, episodes) -> None:
    """Draws some episodes: frames with a red border if they are left out, above the scores and the thresholds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, busy = scores(source, config.span), busy_frames(source, config)
    first = np.cumsum(source.lengths) - source.lengths
    episodes = np.sort(np.random.default_rng(0).permutation(episodes)[:SHOWN_EPISODES])
    figure, axes = plt.subplots(
        2 * len(episodes),
        1,
        figsize=(12, 2.6 * len(episodes)),
        height_ratios=[1, 1] * len(episodes),
        layout="constrained",
    )
    for row, episode in enumerate(episodes.tolist()):
        length = int(source.lengths[episode])
        frames = np.linspace(0, length - 1, min(SHOWN_FRAMES, length)).astype(int)
        pictures = fit(source.read(episode, frames)["frames"], IMAGE_SIZE, source.crop)
        task = source.instructions(episode, frames[:1])[0]
        is_busy = np.isin(frames, busy[episode])
        red = torch.tensor([230, 30, 30], dtype=torch.uint8)[:, None, None]
        for picture in (pictures[i] for i in np.flatnonzero(~is_busy)):
            picture[:, :3], picture[:, -3:], picture[..., :3], picture[..., -3:] = red, red, red, red
        strip, curve = axes[2 * row], axes[2 * row + 1]
        strip.imshow(pictures.permute(2, 0, 3, 1).flatten(1, 2).numpy())
        share = 1 - len(busy[episode]) / length
        strip.set_title(f"{short(source.place(episode))}, {task!r}: {share:.0%} of its frames left out", fontsize=9)
        strip.axis("off")
        for name, colour in (("motion", "tab:blue"), ("action", "tab:orange")):
            if name in found:
                curve.plot(found[name][first[episode] : first[episode] + length], color=colour, label=name)
                if getattr(config, name):
                    curve.axhline(getattr(config, name), color=colour, linestyle=":")
        curve.set_xlim(0, length - 1)
        curve.legend(frameon=False, fontsize=7, loc="upper right")
        curve.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
