"""The plots of a probe card, PNG by name."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from hlrp.card import BOTH, RANDOM, Pairs, Z, varying
from hlrp.clips import short
from hlrp.plots import BLUE, GREY, INK, MAX_SCATTERED, ORANGE, STYLE, Row, latent_map, moving, png, sheet, usage_chart

NUM_QUERIES, NUM_NEIGHBOURS = 5, 4
MAX_CODES = 256  # codes


def bars(names: Sequence[str], values: Sequence[float], intervals, colours, label: str, line: float | None) -> Figure:
    """Horizontal bars from the top down, with their intervals; line: what to compare with."""
    figure = Figure(figsize=(5.4, 0.7 + 0.3 * len(names)), layout="constrained")
    axes, y = figure.subplots(), np.arange(len(names))
    axes.barh(y, values, color=colours, height=0.66)
    for i, (value, interval) in enumerate(zip(values, intervals, strict=True)):
        right = value
        if interval is not None:
            axes.plot(interval, [i, i], color=INK, linewidth=1.4)
            right = max(value, interval[1])
        axes.annotate(f"{value:z.2f}", (max(right, 0), i), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(y, names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=0.8)
    if line is not None:
        axes.axvline(line, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel(label)
    axes.margins(x=0.08)
    return figure


def draw(
    card: dict, pairs: Pairs, predicted: Tensor | None, scored: Dataset, codebook_size: int | None
) -> dict[str, bytes]:
    """predicted: the actions that the better probe reads from z on the scored pairs, of the varying dimensions."""
    with matplotlib.rc_context(STYLE):
        pictures = {}
        if "information" in card:
            assert predicted is not None
            pictures["information"] = png(information_bars(card["information"]))
            pictures["predicted"] = png(predicted_scatter(pairs, predicted))
        if card["leakage"]:
            pictures["leakage"] = png(leakage_bars(card["leakage"]))
        if "transfer" in card:
            pictures["transfer_matrix"] = png(transfer_matrix(card["transfer"]["cells"]))
        if "use" in card:
            pictures["use"] = png(use_bars(card["use"]))
        if "algebra" in card:
            if card["algebra"]["zero_transition"] is not None:
                pictures["invariance"] = png(invariance_bars(card["algebra"]))
            pictures["algebra"] = png(algebra_bars(card["algebra"]))
        pictures["map"] = png(latent_map(vectors_of(pairs), pairs.actions))
        with tempfile.TemporaryDirectory() as folder:
            indices = pairs.latents[Z].indices
            if indices is not None and codebook_size is not None and codebook_size <= MAX_CODES:
                pictures["usage"] = png(usage_chart(indices[:, :8], codebook_size))
            pictures["neighbours"] = neighbours_grid(Path(folder) / "neighbours.png", pairs, scored).read_bytes()
    return pictures


def use_bars(figures: dict) -> Figure:
    """Errors over that of the copied frame, by the code that the decoder is given."""
    names, values, colours = [], [], []
    for target, true in figures["true_over_copy"].items():
        named = f"{target}: " if len(figures["true_over_copy"]) > 1 else ""
        names.append(f"{named}true code")
        values.append(true)
        colours.append(BLUE)
        for key, words in (
            ("shuffled_in_episode_over_true", "another pair of the episode"),
            ("shuffled_over_true", "another pair"),
            ("zero_over_true", "zeros"),
        ):
            if figures[key] is not None:
                names.append(f"{named}{words}")
                values.append(true * figures[key][target])
                colours.append(GREY)
    label = "error / error of the first frame shown again (dashed)"
    return bars(names, values, [None] * len(names), colours, label, line=1.0)


def algebra_bars(figures: dict) -> Figure:
    rules = {  # words -> the rule, its error, and the error with others' latent actions
        "reversal, linear": ("reversal", "linear", "linear_shuffled"),
        "additivity, linear": ("additivity", "linear", "linear_shuffled"),
        "cycle": ("cycle", "true", "shuffled"),
    }
    names, values, colours = [], [], []
    for words, (rule, true, shuffled) in rules.items():
        if figures[rule] is not None:
            names += [words, "others' latent actions"]
            values += [figures[rule][true], figures[rule][shuffled]]
            colours += [BLUE, GREY]
    label = "relative error: 0 is exact, 1 as good as the mean (dashed)"
    return bars(names, values, [None] * len(names), colours, label, line=1.0)


def invariance_bars(figures: dict) -> Figure:
    changes = {
        "zero_transition": "nothing happens",
        "camera_shift": "camera moves",
        "crop": "both frames shifted",
        "brightness": "both frames darker",
    }
    label = "length of the response / median length of a latent action"
    return bars([*changes.values()], [figures[name] for name in changes], [None] * 4, BLUE, label, line=None)


def information_bars(figures: dict) -> Figure:
    names, values, intervals, colours = [], [], [], []
    for name, probes in figures["probes"].items():
        for probe, colour in (("ridge", BLUE), ("mlp", "#1e3a8a")) if name == Z else (("", GREY),):
            part = probes[probe] if probe else max(probes.values(), key=lambda p: p["r2"])
            words = {Z: f"latent action, {probe}", BOTH: "observation + latent action"}.get(name, name)
            names.append(words)
            values.append(part["r2"])
            intervals.append(part["interval"])
            colours.append(ORANGE if name == BOTH else colour)
    figure = bars(names, values, intervals, colours, "R2 of the actions in episodes not fitted on", line=None)
    figure.axes[0].set_xlim(left=min(-0.05, *values), right=max(1.0, *values) * 1.08)
    return figure


def leakage_bars(leakage: dict) -> Figure:
    of_z = [figures[Z] for figures in leakage.values()]
    values, intervals = [x["r2"] for x in of_z], [x["interval"] for x in of_z]
    label = "R2 of what is no action (less is better)"
    figure = bars([*leakage], values, intervals, BLUE, label, line=None)
    axes, marked = figure.axes[0], {"true action": ("D", ORANGE), RANDOM: ("o", GREY)}
    for source, (marker, colour) in marked.items():
        points = [(figures[source]["r2"], i) for i, figures in enumerate(leakage.values()) if source in figures]
        if points:
            axes.scatter(
                *zip(*points, strict=True), marker=marker, color=colour, s=22, zorder=3, label=f"from the {source}"
            )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=False)
    axes.set_xlim(left=min(-0.05, *values), right=1.05)
    return figure


def predicted_scatter(pairs: Pairs, predicted: Tensor) -> Figure:
    """Predicted against true actions, up to eight dimensions."""
    assert pairs.actions is not None
    dims = varying(pairs.actions, pairs.is_fit).nonzero().flatten().tolist()[:8]
    true = pairs.actions[~pairs.is_fit]
    columns = min(4, len(dims))
    num_rows = -(-len(dims) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.6 * num_rows), layout="constrained")
    every = figure.subplots(num_rows, columns, squeeze=False).flat[: len(dims)]
    for i, (dim, axes) in enumerate(zip(dims, every, strict=True)):
        x, y = true[:MAX_SCATTERED, dim], predicted[:MAX_SCATTERED, i]
        low, high = float(x.min()), float(x.max())
        axes.plot([low, high], [low, high], color=GREY, linewidth=1)
        axes.scatter(x, y, s=6, alpha=0.4, color=BLUE, linewidths=0)
        axes.set_title(f"dimension {dim}")
        axes.set_xlabel("true mean action")
        axes.set_ylabel("read from the latent action" if i % columns == 0 else "")
        margin = 0.1 * (high - low)
        axes.set_ylim(low - margin, high + margin)
    for axes in list(figure.axes)[len(dims) :]:
        axes.set_axis_off()
    return figure


def vectors_of(pairs: Pairs) -> Tensor:
    """The latent actions as vectors float64 (b, d): of codes that come without, an indicator each."""
    vectors, indices = pairs.latents[Z]
    if vectors.numel():
        return vectors.flatten(1).double()
    assert indices is not None
    return F.one_hot(indices).flatten(1).double()


def transfer_matrix(cells: list[dict]) -> Figure:
    names = list(dict.fromkeys(name for cell in cells for name in (cell["fitted"], cell["scored"])))
    values = np.full((len(names), len(names)), np.nan)
    for cell in cells:
        values[names.index(cell["fitted"]), names.index(cell["scored"])] = cell["r2"]
    figure = Figure(figsize=(2.4 + 0.9 * len(names), 1.2 + 0.7 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for i, j in np.argwhere(np.isfinite(values)):
        value = values[i, j]
        axes.text(j, i, f"{value:z.2f}", ha="center", va="center", color="white" if value > 0.5 else INK)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("scored on")
    axes.set_ylabel("fitted on")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def neighbours(vectors: Tensor, episodes: Tensor, rows: Sequence[int], count: int) -> list[list[int]]:
    """For each row the pairs of the nearest latent actions (b, d), of other episodes, one of each."""
    vectors, found = F.normalize(vectors - vectors.mean(dim=0), dim=1), []
    for row in rows:
        order, seen, near = ((vectors @ vectors[row]).argsort(descending=True).tolist(), {int(episodes[row])}, [])
        for i in order:
            if int(episodes[i]) not in seen:
                seen.add(int(episodes[i]))
                near.append(i)
            if len(near) == count:
                break
        found.append(near)
    return found


def neighbours_grid(path: Path, pairs: Pairs, scored: Dataset) -> Path:
    """Pairs that move, each with the pairs of other episodes whose latent actions are nearest to its own."""
    side = ~pairs.is_fit
    episodes = pairs.episodes[side]
    some = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(0))[:192]
    frames = torch.stack([pairs.first[side][some], pairs.second[side][some]], dim=1)
    queries = some[moving(frames, torch.zeros(len(some)), episodes[some])[:NUM_QUERIES]].tolist()
    rows, near_ones = [], neighbours(vectors_of(pairs)[side], episodes, queries, NUM_NEIGHBOURS)
    for query, near in zip(queries, near_ones, strict=True):
        samples = [scored[i] for i in (query, *near)]
        pictures = [frame for sample in samples for frame in sample["frames"][:2]]
        names = [short(sample["place"]) for sample in samples]
        labels = [label for name in names for label in (name, "then")]
        rows.append(Row(pictures, labels=labels))
    return sheet(path, "Left: a pair. Right of it: the nearest latent actions of other episodes", rows, gap_after=2)
