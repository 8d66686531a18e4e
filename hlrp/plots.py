"""Sheets of pictures: pairs of frames, one code on many frames, many codes on one frame."""

import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import repeat
from torch import Tensor

NUM_CODES = 16  # codes applied to one frame
CELL, GAP, LINE = 160, 8, 18  # least side of a picture, space between two, height of a line of text [pixel]
GAIN = 3  # of difference pictures


class Row(NamedTuple):
    pictures: Sequence[Tensor | None]  # (c, h, w), uint8 or float in [0, 1]; None: an empty place
    caption: str = ""  # one line under the pictures
    labels: Sequence[str] = ()  # one over each picture


def sheet(path: Path, title: str, rows: Sequence[Row], gap_after: int = 0) -> Path:
    """Draws pictures of one size, enlarged by whole pixels; a wide gap stands behind `gap_after` columns."""
    from matplotlib.figure import Figure

    picture = next(x for row in rows for x in row.pictures if x is not None)
    zoom = -(-CELL // max(picture.shape[1:]))
    height, width = (zoom * side for side in picture.shape[1:])
    num_columns = max(len(row.pictures) for row in rows)
    lefts = [GAP + i * (width + GAP) + 3 * GAP * (0 < gap_after <= i) for i in range(num_columns)]
    lines = 2 + sum(bool(row.labels) + bool(row.caption) for row in rows)
    page_width, page_height = lefts[-1] + width + GAP, GAP + lines * LINE + len(rows) * (height + GAP)
    page = np.full((page_height, page_width, 3), 255, dtype=np.uint8)
    figure = Figure(figsize=(page_width / 100, page_height / 100), dpi=100)

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
    """A row a pair. columns: label -> (b, c, h, w): its frames, what was decoded, the error."""
    rows = [Row(x, caption) for *x, caption in zip(*columns.values(), captions, strict=True)]
    return sheet(path, title, [rows[0]._replace(labels=list(columns)), *rows[1:]])


def transfer_grid(
    path: Path, title: str, pairs: dict[str, Tensor], anchors: Row, decoded: Tensor, captions: Sequence[str]
) -> Path:
    """A row a code, taken from the pair at its left and applied to each of the n anchor frames above.

    pairs: label -> (r, c, h, w), the first and the second frames; decoded: (r, n, c, h, w).
    """
    rows = [Row([None, None, *anchors.pictures], labels=["", "", *anchors.labels])]
    columns = zip(*pairs.values(), decoded, captions, strict=True)
    rows += [Row([first, second, *applied], caption) for first, second, applied, caption in columns]
    rows[1] = rows[1]._replace(labels=[*pairs, *["its code applied"] * len(anchors.pictures)])
    return sheet(path, title, rows, gap_after=2)


def codes_grid(path: Path, title: str, anchor: Tensor, decoded: dict[str, Tensor], change: bool) -> Path:
    """Many codes on one frame, eight in a row, and, if `change`, what each changes.

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
    from hlrp.optical_flow import flow_to_rgb

    return flow_to_rgb(predictions["flow"].cpu()) / 255


def moving(frames: Tensor, source: Tensor, episodes: Tensor) -> list[int]:
    """The half of the samples that changes more: sources in turn, and the episodes of each in turn."""
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
