"""PNG grids: reconstructions, one code on many frames, many codes on one frame, usage of the codes."""

import logging
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hlrp.data import collate
from hlrp.laq import LAQ
from hlrp.metrics import code_counts, entropy, psnr
from hlrp.validation import partners

log = logging.getLogger(__name__)

NUM_CANDIDATES = 192  # pairs encoded, over all sources
NUM_ROWS = 6  # pairs shown
NUM_ANCHORS = 6  # frames that a code is applied to
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
        for left, label in zip(lefts, row.labels, strict=False):
            write(label, left + width / 2, top, width, ha="center")
        top += LINE * bool(row.labels)
        for left, image in zip(lefts, row.pictures, strict=False):
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


def usage_chart(path: Path, title: str, indices: Tensor, codebook_size: int) -> Path:
    """How often each code is used at each token position. indices: int64 (b, m)."""
    from matplotlib.figure import Figure

    counts = code_counts(indices.cpu(), codebook_size)
    figure = Figure(figsize=(8, 0.8 + 1.2 * len(counts)), dpi=100, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
    for i, axes in enumerate(figure.subplots(len(counts), sharex=True, sharey=True, squeeze=False)[:, 0]):
        axes.stairs(counts[i] / len(indices), np.arange(codebook_size + 1) - 0.5, fill=True)
        axes.axhline(1 / codebook_size, color="0.5", linewidth=0.8, linestyle="--")
        used, perplexity = (counts[i] > 0).sum(), entropy(counts[i]).exp()
        figures = f"{used} of {codebook_size} codes used, perplexity {perplexity:.1f}"
        axes.set_title(f"token {i}: {figures}", size=9, loc="left")
        axes.set_ylabel("share", size=8.5)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    axes.set_xlabel("code (dashed: all codes equally often)", size=8.5)
    figure.savefig(path)
    return path


@torch.no_grad()
def save_grids(
    laq: LAQ, sets: dict[str, Dataset], folder: Path, step: int | None = None, seed: int = 0
) -> list[Path]:
    """Draws all grids on a seeded choice of validation pairs, the same at every step; returns the files, whose names
    end in the step where there is one.

    The pairs shown are of the half that changes more: a robot at rest says nothing about codes. A LAQ that
    decodes no pixels shows its optical flow. What there is nothing to draw for is named in the log.
    """
    was_training, device = laq.training, next(laq.parameters()).device
    laq.eval()
    batch, source = candidates(sets, seed)
    frames, tasks = batch["frames"], batch["task"]
    encoded = [laq.encode(part.to(device)) for part in frames.split(64)]
    codes = torch.cat([codes for codes, _ in encoded])
    indices = None if encoded[0][1] is None else torch.cat([indices for _, indices in encoded]).cpu()

    def decode(samples: list[int], codes_of: list[int]) -> dict[str, Tensor]:
        """The codes of some samples, applied to the first frames of others."""
        first, second = frames[samples].to(device).unbind(1)
        return laq.decode(first, codes[codes_of], [tasks[i] for i in samples], second)

    chosen = moving(frames, source, batch["episode"])[: NUM_ROWS + NUM_ANCHORS]
    rows, anchors = chosen[:NUM_ROWS], chosen[-NUM_ANCHORS:]
    others = partners(source, seed)[rows].tolist()
    givers = frequent(indices) if indices is not None else {f"code {i + 1}": i for i in chosen}
    at_home = decode(rows + rows, rows + others)  # with the true code, then with another of the same source
    abroad = decode(anchors * len(rows), [i for i in rows for _ in anchors])
    on_one = decode(anchors[:1] * len(givers), [*givers.values()])
    laq.train(was_training)

    def place(grid: str, title: str) -> tuple[Path, str]:
        if step is None:
            return folder / f"{grid}.png", title
        return folder / f"{grid}_{step:06d}.png", f"{title}, step {step}"

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if indices is None:
        log.warning("no usage chart: the codes of quantizer=%s are continuous", laq.config.quantizer)
    else:
        usage = place("usage", f"Codes of {len(indices)} held-out pairs")
        paths.append(usage_chart(*usage, indices, laq.quantizer.codebook_size))
    if not {"pixels", "flow"} & at_home.keys():
        log.warning("no picture grids: the LAQ decodes %s, neither pixels nor flow", ", ".join(at_home))
        return paths

    images = frames / 255
    names = [f"{name}, episode {i}" for name, i in zip(batch["dataset"], batch["episode"], strict=True)]
    captions = [f"{names[i]}, frame {batch['index'][i]}. {tasks[i]}" for i in rows]
    first, second = images[rows].unbind(1)
    pairs = {"first frame": first, f"{laq.config.delta:g} s later": second}
    true, other = picture(at_home).chunk(2)
    if "pixels" in at_home:
        columns = {"decoded": true, "with another code": other, f"|error| x {GAIN}": difference(true, second)}
        figures = zip(*(psnr(x, second).tolist() for x in (true, other, first)), captions, strict=True)
        notes = [f"PSNR {a:.1f} dB, another code {b:.1f}, first frame {c:.1f}. {x}" for a, b, c, x in figures]
    else:
        notes, change = captions, difference(first, second)
        columns = {f"|change| x {GAIN}": change, "decoded flow": true, "with another code": other}
    applied = rearrange(picture(abroad), "(r n) c h w -> r n c h w", n=len(anchors))
    above = Row(images[anchors, 0], labels=[names[i] for i in anchors])
    varied = dict(zip(givers, picture(on_one), strict=True))
    many, one = place("transfer", "One code on many frames"), place("codes", "Many codes on one frame")
    paths.append(pairs_grid(*place("pairs", "Held-out pairs"), pairs | columns, notes))
    paths.append(transfer_grid(*many, pairs, above, applied, captions))
    paths.append(codes_grid(*one, images[anchors[0], 0], varied, change="pixels" in on_one))
    return paths


def picture(predictions: dict[str, Tensor]) -> Tensor:
    """Predicted pixels, or flow as colours: (b, c, h, w) in [0, 1]."""
    if "pixels" in predictions:
        return predictions["pixels"].float().cpu()
    from hlrp.optical_flow import flow_to_rgb

    return flow_to_rgb(predictions["flow"].cpu()) / 255


def candidates(sets: dict[str, Dataset], seed: int) -> tuple[dict, Tensor]:
    """A batch of random pairs, as many of each set, and the number of each one's set: int64 (b,)."""
    samples, source, generator = [], [], torch.Generator().manual_seed(seed)
    for number, dataset in enumerate(sets.values()):
        picks = torch.randperm(len(dataset), generator=generator).tolist()[: NUM_CANDIDATES // len(sets) + 1]
        samples += Subset(dataset, picks).__getitems__(list(range(len(picks))))
        source += [number] * len(picks)
    return collate(samples), torch.tensor(source)


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
