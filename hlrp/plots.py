"""Drawing: sheets of frames (pairs, one code on many frames, many codes on one frame) and charts of latent actions (how
often each code is used, where latent actions lie, what they say about actions and motion).
"""

import io
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from hlrp.metrics import code_counts, entropy, is_constant, principal_components

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CODES = 16  # codes applied to one frame
CELL, GAP, LINE = 160, 8, 18  # least side of a picture, space between two, height of a line of text [pixel]
GAIN = 3  # of difference pictures


class Row(NamedTuple):
    pictures: Sequence[Tensor | None]  # (c, h, w), uint8 or float in [0, 1]; None: an empty place
    caption: str = ""  # one line under the pictures
    labels: Sequence[str] = ()  # one over each picture


def sheet(path: Path, title: str, rows: Sequence[Row], gap_after: int = 0) -> Path:
    """Draws rows of pictures of one size, enlarged by whole pixels, with a wide gap after `gap_after` columns."""
    picture = next(x for row in rows for x in row.pictures if x is not None)
    zoom = -(-CELL // max(picture.shape[1:]))
    height, width = (zoom * side for side in picture.shape[1:])
    num_columns = max(len(row.pictures) for row in rows)
    lefts = [GAP + i * (width + GAP) + 3 * GAP * (0 < gap_after <= i) for i in range(num_columns)]
    lines = 2 + sum(bool(row.labels) + bool(row.caption) for row in rows)
    page_width, page_height = lefts[-1] + width + GAP, GAP + lines * LINE + len(rows) * (height + GAP)
    page = np.full((page_height, page_width, 3), 255, dtype=np.uint8)
    figure = new_figure(figsize=(page_width / 100, page_height / 100), dpi=100)

    def write(text: str, x: float, top: float, max_width: int, **style) -> None:
        text = textwrap.shorten(text, int(max_width / 6.3), placeholder=" ...")  # [pixel] a letter
        style = {"size": 8.5, "va": "center_baseline", "parse_math": False} | style
        figure.text(x / page_width, 1 - (top + LINE / 2) / page_height, text, **style)

    write(title, GAP, GAP, page_width, size=11, weight="bold")
    top = GAP + 2 * LINE
    for row in rows:
        for left, label in zip(lefts[: len(row.labels)], row.labels, strict=True):
            write(label, left + width / 2, top, width, ha="center")
        top += LINE * bool(row.labels)
        for left, image in zip(lefts[: len(row.pictures)], row.pictures, strict=True):
            if image is not None:
                page[top : top + height, left : left + width] = enlarge(image, zoom)
        top += height
        if row.caption:
            write(row.caption, GAP, top, page_width, color="0.3")
            top += LINE
        top += GAP
    figure.figimage(page)
    figure.savefig(path)
    return path


def enlarge(image: Tensor, zoom: int) -> np.ndarray:
    """(c, h, w), uint8 or float in [0, 1] -> uint8 (zoom h, zoom w, c), nearest neighbour."""
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().byte()
    return repeat(image.cpu().numpy(), "c h w -> (h y) (w x) c", y=zoom, x=zoom)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Absolute difference of pictures in [0, 1], amplified."""
    return (GAIN * (a - b).abs()).clamp(0, 1)


def pairs_grid(path: Path, title: str, columns: dict[str, Tensor], captions: Sequence[str]) -> Path:
    """One row for each pair. columns: label -> (b, c, h, w): the frames, the decoded pictures, the error."""
    rows = [Row(x, caption) for *x, caption in zip(*columns.values(), captions, strict=True)]
    return sheet(path, title, [rows[0]._replace(labels=list(columns)), *rows[1:]])


def transfer_grid(
    path: Path, title: str, pairs: dict[str, Tensor], anchors: Row, decoded: Tensor, captions: Sequence[str]
) -> Path:
    """One row for each code, which comes from the pair on the left and is applied to each of the n frames above.

    pairs: label -> (r, c, h, w), the first and the second frames; decoded: (r, n, c, h, w).
    """
    rows = [Row([None, None, *anchors.pictures], labels=["", "", *anchors.labels])]
    columns = zip(*pairs.values(), decoded, captions, strict=True)
    rows += [Row([first, second, *applied], caption) for first, second, applied, caption in columns]
    rows[1] = rows[1]._replace(labels=[*pairs, *["its code applied"] * len(anchors.pictures)])
    return sheet(path, title, rows, gap_after=2)


def codes_grid(path: Path, title: str, anchor: Tensor, decoded: dict[str, Tensor], change: bool) -> Path:
    """Many codes applied to one frame, eight in a row, and, with `change`, the difference that each makes.

    anchor: (c, h, w), decoded: code -> (c, h, w).
    """
    rows, codes = [], [*decoded]
    for some in (codes[i : i + 8] for i in range(0, len(codes), 8)):
        rows.append(Row([anchor, *(decoded[code] for code in some)], labels=["first frame", *some]))
        if change:
            changes = [difference(decoded[code], anchor) for code in some]
            rows.append(Row([None, *changes], labels=[f"|change| x {GAIN}"]))
    return sheet(path, title, rows, gap_after=1)


def picture(predictions: dict[str, Tensor]) -> Tensor:
    """Predicted pixels, or flow as colours: (b, c, h, w) in [0, 1]."""
    if "pixels" in predictions:
        return predictions["pixels"].float().cpu()
    from hlrp.backbones import flow_to_rgb

    return flow_to_rgb(predictions["flow"].cpu()) / 255


def moving(frames: Tensor, source: Tensor, episodes: Tensor) -> list[int]:
    """The half of the samples that change more, the sources in turn, and the episodes of each source in turn."""
    change = (frames[:, 1].float() - frames[:, 0].float()).abs().flatten(1).mean(dim=1)
    queues = []
    for number in source.unique():
        mine = torch.where(source == number)[0]
        mine = mine[change[mine] >= change[mine].median()]
        turn = [(episodes[mine[:k]] == episodes[i]).sum() for k, i in enumerate(mine)]
        queues.append(mine[torch.tensor(turn).argsort(stable=True)].tolist())
    return [i for turn in zip_longest(*queues) for i in turn if i is not None]


def frequent(indices: Tensor) -> dict[str, int]:
    """The most frequent codes, each with a sample that has it: "3 14 15 9" -> sample."""
    _, number, counts = indices.unique(dim=0, return_inverse=True, return_counts=True)
    sample_of = {}
    for i in counts[number].argsort(descending=True, stable=True).tolist():
        sample_of.setdefault(" ".join(map(str, indices[i].tolist())), i)
    return dict(list(sample_of.items())[:NUM_CODES])


INK, BLUE, GREY, ORANGE = "#1f2933", "#2563eb", "#9aa5b1", "#d97706"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
}
DPI = 144  # twice a page's own, for sharp letters
MAX_SCATTERED = 1500  # points of a scatter plot
MAX_NAME = 24  # letters of a sequence that a chart shows
MAX_SEQUENCES = 30  # bars of a chart
MAX_NAMED = 6  # arrows of a compass that bear their number


def new_figure(**settings) -> "Figure":
    """An empty figure. Matplotlib is imported only when the first one is drawn."""
    from matplotlib.figure import Figure

    return Figure(**settings)


def png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def usage_chart(indices: Tensor, codebook_size: int) -> "Figure":
    """How often each code is used at each token position. indices: int64 (b, m)."""
    counts = code_counts(indices.cpu(), codebook_size)
    figure = new_figure(figsize=(8, 0.4 + 1.2 * len(counts)), layout="constrained")
    for i, axes in enumerate(figure.subplots(len(counts), sharex=True, sharey=True, squeeze=False)[:, 0]):
        axes.stairs(counts[i] / len(indices), np.arange(codebook_size + 1) - 0.5, fill=True, color=BLUE)
        axes.axhline(1 / codebook_size, color=GREY, linewidth=0.8, linestyle="--")
        used, perplexity = (counts[i] > 0).sum(), entropy(counts[i]).exp()
        axes.set_title(f"token {i}: {used} of {codebook_size} codes used, perplexity {perplexity:.1f}")
        axes.set_ylabel("share")
        axes.margins(x=0)
    axes.set_xlabel("code (dashed: all codes equally often)")
    return figure


def sequences_chart(sequences: Sequence[str], counts: Sequence[int]) -> "Figure":
    """How often each whole sequence of codes occurs, the most frequent first."""
    num_bars = min(len(sequences), MAX_SEQUENCES)
    figure = new_figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    left.bar(range(num_bars), counts[:num_bars], color=BLUE)
    names = [name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…" for name in sequences[:num_bars]]
    left.set_xticks(range(num_bars), names, rotation=90, size=7, family="monospace")
    left.set_ylabel("samples")
    left.set_title(f"the {num_bars} most frequent of {len(sequences)} sequences")
    left.margins(x=0.01)
    right.plot(range(1, len(counts) + 1), np.cumsum(counts) / sum(counts), color=BLUE)
    right.set_xscale("log")
    right.set_xlabel("sequences, the most frequent first")
    right.set_ylabel("share of the samples")
    right.set_ylim(0, 1.02)
    right.set_title("how many it takes to cover the samples")
    return figure


def directions(actions: Tensor) -> np.ndarray:
    """A colour for each action (b, a): its direction in the first two dimensions that vary as hue, its length as
    saturation."""
    actions = actions[:, ~is_constant(actions)].double()
    actions = (actions - actions.mean(dim=0)) / actions.std(dim=0)
    x, y = actions[:, 0], actions[:, 1] if actions.shape[1] > 1 else torch.zeros_like(actions[:, 0])
    hue = torch.atan2(y, x) / (2 * torch.pi) % 1
    length = torch.hypot(x, y)
    saturation = (length / length.quantile(0.8)).clamp(max=1)
    from matplotlib.colors import hsv_to_rgb

    return hsv_to_rgb(torch.stack([hue, saturation, torch.full_like(hue, 0.85)], dim=1).numpy())


def latent_map(vectors: Tensor, actions: Tensor | None) -> "Figure":
    """The first two principal components of latent actions (b, d), coloured by their actions (b, a)."""
    rows = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:MAX_SCATTERED]
    place = principal_components(vectors[rows], torch.ones(len(rows), dtype=torch.bool), 2)
    place = torch.cat([place, torch.zeros(len(place), 2)], dim=1)[:, :2]  # of one dimension, a line
    noise = 0.02 * place.std() * torch.randn(place.shape, generator=torch.Generator().manual_seed(0))
    if actions is not None and is_constant(actions).all():
        actions = None
    colours = GREY if actions is None else directions(actions)[rows]
    figure = new_figure(figsize=(4.6, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*(place + noise).T, s=9, c=colours, alpha=0.75, linewidths=0)
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second")
    axes.set_aspect("equal", adjustable="datalim")
    if actions is not None and int((~is_constant(actions)).sum()) > 1:
        wheel = axes.inset_axes((0.86, 0.84, 0.15, 0.15), projection="polar")
        angles = np.linspace(0, 2 * np.pi, 60)
        from matplotlib.colors import hsv_to_rgb

        hues = hsv_to_rgb(np.stack([angles / (2 * np.pi) % 1, np.ones(60), np.full(60, 0.85)], axis=1))
        wheel.bar(angles, 1, width=2 * np.pi / 58, bottom=0.6, color=hues)
        wheel.set_axis_off()
    return figure


class Scatter(NamedTuple):
    title: str
    values: Tensor  # (b, 2)
    groups: Tensor  # int64 (b,): each has a colour of its own
    names: tuple[str, str]  # of the axes


def scatters(parts: Sequence[Scatter]) -> "Figure":
    """Values in two dimensions: one colour for each group, and a cross at its mean."""
    columns = min(3, len(parts))
    num_rows = -(-len(parts) // columns)
    figure = new_figure(figsize=(3.6 * columns, 3.5 * num_rows), layout="constrained")
    every = figure.subplots(num_rows, columns, squeeze=False).flat[: len(parts)]
    for part, axes in zip(parts, every, strict=True):
        names, colours = group_colours(part.groups)
        axes.scatter(*part.values[:MAX_SCATTERED].T, s=8, c=colours[:MAX_SCATTERED], alpha=0.6, linewidths=0)
        for name in names:
            mine = part.groups == name
            axes.scatter(*part.values[mine].mean(dim=0), s=70, marker="X", color=colours[mine][:1], edgecolors=INK)
        axes.set_title(part.title)
        axes.set_xlabel(part.names[0])
        axes.set_ylabel(part.names[1])
    for axes in list(figure.axes)[len(parts) :]:
        axes.set_axis_off()
    return figure


def group_colours(groups: Tensor) -> tuple[list[int], np.ndarray]:
    """The groups in the order of their numbers, and a colour for each sample."""
    import matplotlib

    names, place = groups.unique(return_inverse=True)
    hues = place.numpy() / max(len(names), 1)
    return names.tolist(), matplotlib.colormaps["turbo"](0.05 + 0.9 * hues)


def compasses(means: dict[str, list[dict[int, Tensor]]]) -> "Figure":
    """An arrow for each code, the longest ones with their numbers.

    means: row title -> per token position, code -> mean flow (2,) right and down [pixel].
    """
    width = max(len(row) for row in means.values())
    figure = new_figure(figsize=(2.5 * width, 2.7 * len(means)), layout="constrained")
    grid = figure.subplots(len(means), width, squeeze=False)
    for axes_row, (title, row) in zip(grid, means.items(), strict=True):
        longest = max(float(flow.norm()) for codes in row for flow in codes.values()) or 1.0
        for position, (axes, codes) in enumerate(zip(axes_row, row, strict=True)):
            names, colours = group_colours(torch.tensor([*codes]))
            x, y = np.array([codes[name].tolist() for name in names]).reshape(-1, 2).T
            nothing, arrows = np.zeros_like(x), {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012}
            axes.quiver(nothing, nothing, x, -y, color=colours, **arrows)
            for i in np.hypot(x, y).argsort()[-MAX_NAMED:].tolist():
                axes.text(1.12 * x[i], -1.12 * y[i], str(names[i]), ha="center", va="center", size=7.5)
            axes.set_xlim(-1.3 * longest, 1.3 * longest)
            axes.set_ylim(-1.3 * longest, 1.3 * longest)
            axes.set_aspect("equal")
            axes.axhline(0, color=GREY, linewidth=0.5, zorder=0)
            axes.axvline(0, color=GREY, linewidth=0.5, zorder=0)
            axes.set_title(f"token {position}, {title}")
            axes.tick_params(labelsize=7)
    figure.supxlabel("mean optical flow of the pairs with a code: right and up [pixel]", size=9)
    return figure


def heat_map(shares: Tensor, names: Sequence[str]) -> "Figure":
    """shares (m, k, s): which share of the samples of source s has the code k at the token position m."""
    num_tokens, codebook_size, num_sources = shares.shape
    height = min(0.8 + 0.16 * num_tokens * codebook_size, 16.0)  # of thousands of codes too
    figure = new_figure(figsize=(1.5 + 1.1 * num_sources * 1.3, height))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.flatten(0, 1), aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    axes.set_xticks(range(num_sources), names, rotation=20, ha="right")
    middles = [(i + 0.5) * codebook_size - 0.5 for i in range(num_tokens)]
    axes.set_yticks(middles, [f"token {i}" for i in range(num_tokens)])
    for i in range(1, num_tokens):
        axes.axhline(i * codebook_size - 0.5, color=INK, linewidth=0.8)
    axes.tick_params(length=0)
    axes.set_title(f"share of a source's samples with each of {codebook_size} codes")
    figure.colorbar(image, ax=axes)
    return figure
