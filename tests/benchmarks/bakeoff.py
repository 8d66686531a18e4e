"""Quantizers beside each other: what the latent actions of each are worth on the built-in world, at equal cost.

    python tests/benchmarks/bakeoff.py      # all quantizers, two seeds
    python tests/benchmarks/bakeoff.py --quantizers fsq gaussian --label-fractions 0 .025 --variants clean
    python tests/benchmarks/bakeoff.py --num-tokens 1 2 4 8 --seeds 0 1 2 --steps 1000 --output-dir outputs/tokens

Each cell of the table is a small LAQ (frames of 32 pixels) with the probes of hlrp.card on held-out episodes; where
labels are used, a model of these labels alone stands beside them. What is finished is not run again. Gives bakeoff.md
and bakeoff.json.
"""

import json
import os
import time
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import tyro
from torch import Tensor
from torch.utils.data import Dataset

from hlrp.checkpoints import write_json, write_text
from hlrp.cli import tell_mistakes
from hlrp.distributed import keep_freed_memory
from hlrp.quantizers import QuantizerName
from hlrp.runs import markdown_table

Variant = Literal["default", "clean", "distractors", "shake", "arm", "hand"]
LABELS_ONLY = "labels only"
IMAGE_SIZE = 32  # [pixel]
NUM_EPISODES, NUM_VAL = 500, 100  # of the world, of these held out
NUM_PAIRS, NUM_DECODED = 2500, 256  # probed; decoded
WORLD_SEED = 0


@dataclass
class Args:
    quantizers: tuple[QuantizerName, ...] = get_args(QuantizerName)  # quantizers to compare
    num_tokens: tuple[int, ...] = (4,)  # tokens per latent action, each number a cell
    codebook_size: int = 8  # codes that each token chooses from
    label_fractions: tuple[float, ...] = (0.0,)  # shares of the training episodes whose actions are seen, each a cell
    variants: tuple[Variant, ...] = ("hand",)  # variants of the built-in world; all but hand take more steps
    delta: float = 0.4  # time between the two frames of a pair [s]
    seeds: tuple[int, ...] = (0, 1)  # seeds of the weights and the order of the data, each a cell

    steps: int = 320  # optimizer steps of each cell
    batch_size: int = 16  # pairs of frames in an optimizer step
    lr: float = 4e-3  # highest learning rate

    num_processes: int | None = None  # cells that train at once, one thread each; None: one for each core
    output_dir: Path = Path("outputs/bakeoff")  # folder for the results and the table


class Cell(NamedTuple):
    quantizer: str
    num_tokens: int
    label_fraction: float
    variant: str
    seed: int

    @property
    def name(self) -> str:
        labels, quantizer = f"labels{self.label_fraction:g}", self.quantizer.replace(" ", "-")
        return f"{quantizer}_n{self.num_tokens}_{labels}_{self.variant}_seed{self.seed}"


class Cached(Dataset):
    """Clips that are read once and then kept in memory; those of unlabelled episodes come without actions."""

    def __init__(self, clips, labelled: set[int], samples: dict[int, dict]):
        self.clips, self.labelled, self.samples = clips, labelled, samples

    def __getattr__(self, name: str):
        return getattr(self.clips, name)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices) -> list[dict]:
        indices = [int(i) for i in indices]
        if missing := [i for i in dict.fromkeys(indices) if i not in self.samples]:
            self.samples |= zip(missing, self.clips.__getitems__(missing), strict=True)
        return [self.seen(self.samples[i]) for i in indices]

    def seen(self, sample: dict) -> dict:
        hidden = () if sample["episode"] in self.labelled else ("action", "action_is_pad")
        return {name: value for name, value in sample.items() if name not in hidden}


def main(args: Args) -> None:
    cells = cells_of(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    left = [cell for cell in cells if result_of(args, cell) is None]
    num_processes = min(args.num_processes or len(os.sched_getaffinity(0)), max(1, len(left)))
    if num_processes == 1:
        run_cells(0, args, [left])
    elif left:
        parts = [left[i::num_processes] for i in range(num_processes)]
        torch.multiprocessing.spawn(run_cells, args=(args, parts), nprocs=num_processes)
    results: dict[Cell, dict] = {}
    for cell in cells:
        result = result_of(args, cell)
        assert result is not None
        results[cell] = result
    write_json(args.output_dir / "bakeoff.json", {cell.name: result for cell, result in results.items()})
    text = table(args, results)
    write_text(args.output_dir / "bakeoff.md", text)
    print(text)


def cells_of(args: Args) -> list[Cell]:
    """Raises ValueError for settings that make no table."""
    for name in ("quantizers", "num_tokens", "label_fractions", "variants", "seeds"):
        values = getattr(args, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={values}; expected one or more different values")
    if not all(0 <= share <= 1 for share in args.label_fractions):
        raise ValueError(f"label_fractions={args.label_fractions}; expected shares from 0 to 1")
    if args.steps < 1 or args.batch_size < 1 or (args.num_processes or 1) < 1:
        raise ValueError(
            f"steps={args.steps}, batch_size={args.batch_size}, num_processes={args.num_processes}; expected 1 or more"
        )
    cells = []
    for variant in args.variants:
        for share in args.label_fractions:
            rivals = [(LABELS_ONLY, 0)] if share else []
            rivals += [(quantizer, n) for n in args.num_tokens for quantizer in args.quantizers]
            cells += [Cell(quantizer, n, share, variant, seed) for seed in args.seeds for quantizer, n in rivals]
    return cells


def settings_of(args: Args) -> dict:
    """The settings beside the cell that a result depends on."""
    return {name: getattr(args, name) for name in ("codebook_size", "delta", "steps", "batch_size", "lr")}


def result_of(args: Args, cell: Cell) -> dict | None:
    """Raises ValueError where the cell was run with other settings."""
    path = args.output_dir / "cells" / f"{cell.name}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != (settings := settings_of(args)):
        raise ValueError(f"{path} is of {result['settings']}, not of {settings}; give another --output-dir")
    return result


def run_cells(process: int, args: Args, parts: list[list[Cell]]) -> None:
    keep_freed_memory()
    if len(parts) > 1:
        torch.set_num_threads(1)
    data: dict[str, tuple] = {}
    for cell in parts[process]:
        if cell.variant not in data:
            data = {cell.variant: read(cell.variant, args.delta)}
        start = time.monotonic()
        result = run_cell(args, cell, *data[cell.variant])
        result |= {"settings": settings_of(args), "seconds": time.monotonic() - start}
        folder = args.output_dir / "cells"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{cell.name}.json", result)
        print(f"{cell.name}: R2 {result['r2']:.2f}, {result['seconds']:.0f} s", flush=True)


def read(variant: str, delta: float) -> tuple[Cached, Cached]:
    """Clips of the episodes for training and of those held out, kept in memory once they are drawn."""
    from hlrp.clips import Clips
    from hlrp.world import World

    world = World(variant, episodes=NUM_EPISODES, seed=WORLD_SEED)
    sides = (range(NUM_EPISODES - NUM_VAL), range(NUM_EPISODES - NUM_VAL, NUM_EPISODES))
    train, val = (Cached(Clips(world, side, (0.0, delta), IMAGE_SIZE), set(side), {}) for side in sides)
    return train, val


def run_cell(args: Args, cell: Cell, train: Cached, val: Cached) -> dict:
    """Trains and probes one model: r2, ridge, mlp with intervals; leakage of what moves by itself; use and health."""
    from hlrp.card import Z, features_of, health, interval, leakage, read_pairs, score
    from hlrp.card_subjects import encode, predicted_actions, trained_on_labels, untrained
    from hlrp.card_subjects import train as trained
    from hlrp.clips import Clips
    from hlrp.contract import EpisodeRange, labelled_share
    from hlrp.data import action_statistics, choose_clips
    from hlrp.laq import LAQConfig, LatentActions
    from hlrp.laq_validation import Share, code_use, encode_all

    labelled = labelled_share(train.source, train.clips.episodes, cell.label_fraction, seed=0)
    assert not isinstance(labelled, EpisodeRange)  # the world is no stream
    settings = {"batch_size": args.batch_size, "lr": args.lr, "seed": cell.seed}
    share, result, size = Share(0, 1, 64, 0, torch.device("cpu")), {}, None
    labelled_clips = Clips(train.source, labelled, (0.0, args.delta), IMAGE_SIZE) if len(labelled) else None
    if cell.quantizer == LABELS_ONLY:
        statistics = action_statistics(labelled_clips)
        model = trained_on_labels(IMAGE_SIZE, 1, labelled_clips, args.steps, "cpu", statistics, **settings)

        def encoder(frames: Tensor) -> LatentActions:
            return LatentActions(predicted_actions(model, frames)[:, None], None)
    else:
        config = LAQConfig(
            delta=args.delta,
            image_size=IMAGE_SIZE,
            quantizer=cell.quantizer,
            num_tokens=cell.num_tokens,
            codebook_size=args.codebook_size,
        )
        if labelled_clips is not None:
            config.action_weight, config.action_dim, config.action_sources = 1.0, train.source.action_dim, 1
        laq = untrained(config, cell.seed)
        if labelled_clips is not None:
            laq.to_action.set_statistics([action_statistics(labelled_clips)])
        clips = Cached(train.clips, set(labelled.tolist()), train.samples)
        trained(laq, [clips], args.steps, **settings)
        encoder, size = partial(encode, laq), laq.quantizer.codebook_size

    sets = [choose_clips(train.clips, NUM_PAIRS, 0), choose_clips(val.clips, NUM_PAIRS, 0)]
    for part, cached in zip(sets, (train, val), strict=True):
        part.dataset = cached
    pairs = read_pairs(sets, {Z: encoder}, share)
    assert pairs.actions is not None  # the world has them
    x = features_of(pairs.latents[Z], size)
    for name, probed in score(x, pairs.actions, pairs, ["ridge", "mlp"], seed=0).items():
        result[name] = {"r2": float(probed.r2.mean()), "interval": interval(probed.resampled.mean(dim=1))}
    better = max((result["ridge"], result["mlp"]), key=lambda figures: figures["r2"])
    motions = {name: fact for name, fact in pairs.facts.items() if name.startswith("motion")}
    leaks = leakage(pairs._replace(facts=motions), {Z: x}, seed=0)
    result |= better | {"leakage": {name: figures[Z]["r2"] for name, figures in leaks.items()}}
    if cell.quantizer != LABELS_ONLY:
        samples = [sets[1][i] for i in range(0, len(sets[1]), -(-len(sets[1]) // NUM_DECODED))]
        use = code_use(laq, samples, encode_all(laq, samples, share), share, seed=0)
        result |= {name: use[name]["pixels"] for name in ("true_over_copy", "shuffled_over_true")}
        result["health"] = health(pairs.latents[Z], size)
    return result


def table(args: Args, results: dict[Cell, dict]) -> str:
    """Markdown: a row is the mean over seeds; an interval reaches from the lowest to the highest of their 95 % ones."""
    import pandas as pd

    leaks = list(dict.fromkeys(name for result in results.values() for name in result["leakage"]))
    head = ["world", "labels", "tokens", "quantizer", "R2 of the actions", "ridge", "MLP"]
    head += [f"R2 of {name}" for name in leaks] + ["error / copy", "shuffled / true", "usage", "perplexity"]
    figures = ["ridge.r2", "mlp.r2", *(f"leakage.{name}" for name in leaks), "true_over_copy", "shuffled_over_true"]
    figures = ["r2", *figures, "health.usage", "health.perplexity"]
    records = [
        cell._asdict() | result | dict(zip(("low", "high"), result["interval"], strict=True))
        for cell, result in results.items()
    ]
    frame, rows = pd.json_normalize(records), []
    frame = frame.reindex(columns=[*frame, *(name for name in figures if name not in frame)])
    groups: Any = frame.groupby(["variant", "label_fraction", "num_tokens", "quantizer"], sort=False)
    for (variant, share, tokens, quantizer), group in groups:
        means = group[figures].mean(skipna=False)
        r2, *others = ("-" if isnan(mean) else f"{mean:z.2f}" for mean in means)
        r2 = f"{r2} ({group['low'].min():z.2f} to {group['high'].max():z.2f})"
        rows.append([variant, f"{share:g}", str(tokens or "-"), quantizer, r2, *others])
    facts = f"{args.steps} steps of {args.batch_size} pairs, {len(args.seeds)} seeds, codebooks of {args.codebook_size}"
    return f"{facts}\n\n{markdown_table([head, *rows])}\n"


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
