"""Label efficiency: success in simulation against the number of demonstrations, for hlrp and its rivals.

    python -m hlrp.curve                                             # MT10, K = 1 to 50, four seeds
    python -m hlrp.curve --demonstrations 5 --methods hlrp bc --output-dir outputs/curve
    python -m hlrp.curve --cell $SLURM_ARRAY_TASK_ID                 # one cell of the table, for job arrays
    python -m hlrp.curve --list                                      # the cells and how each stands

    bc          behaviour cloning: the backbone of stage 2 from scratch, K demonstrations of each task alone
    bc_long     the same with twice the batch, so that it sees as many samples and takes as long as those with video
    oracle      the same as bc_long with the actions of all episodes: the most that labels can give
    pca, idm    hlrp.inverse --features pca or pixels labels the other video, which is cloned beside; no latent actions
    labels      the same with --features laq: labels by latent actions, a policy from scratch
    hlrp        the same, and the policy starts from stage 2: the default of finetune_policy.py
    latents     stage 2 and its latent actions of the other video, without labels
    random, shuffled   hlrp with a LAQ that has learned nothing, and with the latent actions of other samples

Every method sees as many samples of the demonstrations in a step; those with video see as many of it beside. Stages 1
and 2 are trained once, with seed 0; a seed is of the demonstrations, their labels and the policy. The episodes in
simulation are the same in every cell, so methods are compared in pairs. Each cell is a run folder below OUTPUT_DIR.
What is finished is not run again, what was cut is resumed, and several processes may share the table: each waits for a
stage that another one trains. Gives curve.md, curve.png, and curve.json with a row for each episode. With settings.json
beside it, a table on another machine goes on from it.
"""

import json
import math
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import tyro

from hlrp.checkpoints import hold, load_config, write_json, write_text
from hlrp.cli import tell_mistakes
from hlrp.metrics import wilson
from hlrp.rollout import read_episodes
from hlrp.runs import markdown_table

Method = Literal["hlrp", "bc", "bc_long", "oracle", "idm", "pca", "labels", "latents", "random", "shuffled"]
STAGED = ("hlrp", "latents", "random", "shuffled")  # methods that start from stage 2
FEATURES = {"idm": "pixels", "pca": "pca", "labels": "laq", "hlrp": "laq", "random": "laq", "shuffled": "laq"}
ROOT = Path(__file__).parents[1]
LAST = "checkpoints/last/pretrained_model"
RESULTS = "curve.json"


@dataclass
class Args:
    data: str = "metaworld:mt10?episodes=100"  # demonstrations and, without their actions, other video
    demonstrations: tuple[int, ...] = (1, 2, 5, 10, 25, 50)  # numbers of demonstrations of each task, each a cell
    methods: tuple[Method, ...] = get_args(Method)  # methods to compare
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # seeds of the demonstrations and the training, each a cell
    batch_size: int = 32  # samples of the demonstrations in a batch; bc_long and oracle take twice as many

    env: str = "hlrp_metaworld"  # environment in which success counts
    env_settings: dict[str, str] = field(default_factory=dict)  # and its further settings, such as: distractors true
    tasks: tuple[str, ...] = ("mt10",)  # tasks of the environment
    episodes: int = 5  # episodes of each task in a cell
    eval_seed: int = 1000  # seed of a task's first episode, the same in every cell

    laq_flags: str = ""  # further flags of train_laq.py, as in --laq-flags='--steps 1000'
    vla_flags: str = ""  # further flags of train_vla.py
    policy_flags: str = "--no-state"  # further flags of finetune_policy.py, for every method
    inverse_flags: str = ""  # further flags of hlrp.inverse

    output_dir: Path = Path("outputs/curve")  # folder for all runs, their results and the figure
    cell: int | None = None  # run only this cell, by its number in --list
    list: bool = False  # show the cells and run nothing


class Cell(NamedTuple):
    method: str
    demonstrations: int | None  # of each task; None: all
    seed: int

    @property
    def name(self) -> str:
        count = "all" if self.demonstrations is None else f"k{self.demonstrations}"
        return f"{self.method}_{count}_seed{self.seed}"


def main(args: Args) -> None:
    cells = cells_of(args)
    if args.list:
        for i, cell in enumerate(cells):
            print(f"{i:4}  {cell.name:24}  {'done' if rows_of(args, cell) else 'to run'}")
        return
    record_settings(args)
    for cell in cells if args.cell is None else [cells[args.cell]]:
        if not rows_of(args, cell):
            run_cell(args, cell)
    results = {cell: rows for cell in cells if (rows := rows_of(args, cell))}
    others = [row for row in read_results(args) if Cell(*(row[name] for name in Cell._fields)) not in results]
    write_json(args.output_dir / RESULTS, others + [row for rows in results.values() for row in rows])
    text = table(args, results)
    write_text(args.output_dir / "curve.md", text)
    plot(args, results)
    print(text)


def cells_of(args: Args) -> list[Cell]:
    """Raises ValueError for settings that make no table."""
    for name in ("demonstrations", "seeds", "methods"):
        values = getattr(args, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={values}; expected one or more different values")
    if min(args.demonstrations) < 1 or args.episodes < 1 or args.batch_size < 1:
        sizes = f"demonstrations={args.demonstrations}, episodes={args.episodes}, batch_size={args.batch_size}"
        raise ValueError(f"{sizes}; expected 1 or more")
    numbers = [(k, s, m) for k in args.demonstrations for s in args.seeds for m in args.methods]
    cells = list(dict.fromkeys(Cell(m, None if m == "oracle" else k, s) for k, s, m in numbers))
    if args.cell is not None and not 0 <= args.cell < len(cells):
        raise ValueError(f"cell={args.cell}; expected 0 to {len(cells) - 1}")
    return cells


def record_settings(args: Args) -> None:
    """Writes what all cells share, or raises ValueError where the folder holds a table of other settings."""
    names = "data batch_size env tasks episodes eval_seed laq_flags vla_flags policy_flags inverse_flags".split()
    names += ["env_settings"] if args.env_settings else []
    settings = json.loads(json.dumps({name: getattr(args, name) for name in names}))
    file = args.output_dir / "settings.json"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(file):
        if (args.output_dir / RESULTS).is_file() and not file.is_file():
            raise ValueError(
                f"{args.output_dir / RESULTS} is there without {file.name}, which says what its rows are of"
            )
        was = json.loads(file.read_text()) if file.is_file() else settings
        if other := [name for name in was | settings if was.get(name) != settings.get(name)]:
            changes = "; ".join(f"{name} was {was.get(name)!r} and is {settings.get(name)!r}" for name in other)
            raise ValueError(f"{args.output_dir} holds a table with other settings ({changes}); give another folder")
        write_json(file, settings)


def run_cell(args: Args, cell: Cell) -> None:
    """Trains what the cell needs and is not there, then its policy, and rolls that out."""
    policy, method = args.output_dir / cell.name, cell.method
    shared = {"--data": args.data, "--seed": cell.seed}
    if cell.demonstrations is not None:
        shared["--demonstrations"] = cell.demonstrations
    batch_size = args.batch_size * (2 if method in ("bc_long", "oracle") else 1)
    flags = shared | {"--output-dir": policy, "--batch-size": batch_size}
    if method in STAGED:
        laq, vla = stages(args, method)
        flags |= {"--laq": laq / LAST, "--policy.vla": vla / LAST}
    else:
        flags |= {"--policy.vla": "None"} | backbone(args)
    more = shlex.split(args.policy_flags)
    if method in FEATURES:
        flags["--pseudo-actions"] = pseudo_actions(args, cell, shared)
    elif method == "latents":
        flags["--pseudo-actions"] = "None"
    with exclusive(policy):
        train("finetune_policy.py", policy, flags, more)
        tasks = ["--tasks", *args.tasks] if args.tasks else []
        settings = ["--env-settings", *chain(*args.env_settings.items())] if args.env_settings else []
        count = {"--episodes": args.episodes, "--seed": args.eval_seed, "--env": args.env, "--videos": 1}
        if not (policy / "rollout.json").is_file():
            batch = {"--batch-size": min(args.episodes, 5), "--policy": policy / LAST, "--output-dir": policy}
            run(["-m", "hlrp.rollout", *tasks, *settings], count | batch)


def pseudo_actions(args: Args, cell: Cell, shared: dict) -> Path:
    """The folder of the labels that a cell's method gives the other video, made here where it is not there yet."""
    method, features = cell.method, FEATURES[cell.method]
    name = features if features != "laq" or method in ("hlrp", "labels") else method
    labels = args.output_dir / f"inverse_{name}_k{cell.demonstrations}_seed{cell.seed}"
    flags, more = shared | {"--output-dir": labels, "--features": features}, shlex.split(args.inverse_flags)
    if features == "laq":
        flags["--laq"] = first_stage(args, method) / LAST
        more += ["--shuffle-latents"] if method == "shuffled" else []
    with exclusive(labels):
        if not labels.is_dir():
            run(["-m", "hlrp.inverse", *more], flags)
    return labels


def backbone(args: Args) -> dict:
    """Flags by which rivals without stage 2 get its vlm, where the table has a method with it."""
    staged = [method for method in args.methods if method in STAGED]
    if not staged:
        return {"--policy.vlm": "tiny"}
    vlm = load_config(stages(args, staged[0])[1] / LAST, "vla")["vla"]["vlm"]
    return {"--policy.vlm": vlm["vlm"]} | ({"--policy.image-size": vlm["image_size"]} if vlm["image_size"] else {})


def first_stage(args: Args, method: str) -> Path:
    """Run folder of stage 1, trained here where it is not there yet."""
    laq = args.output_dir / ("laq_random" if method == "random" else "laq")
    untrained = "--steps 1 --warmup-steps 0 --lr 1e-12".split() if method == "random" else []
    with exclusive(laq):
        train("train_laq.py", laq, {"--data": args.data, "--output-dir": laq}, shlex.split(args.laq_flags) + untrained)
    return laq


def stages(args: Args, method: str) -> tuple[Path, Path]:
    """Run folders of stage 1 and stage 2, trained here where they are not there yet."""
    laq, vla = first_stage(args, method), args.output_dir / f"vla_{'hlrp' if method == 'latents' else method}"
    control = {"random": ["--accept-failed-laq"], "shuffled": ["--shuffle-latents"]}.get(method, [])
    with exclusive(vla):
        train("train_vla.py", vla, {"--laq": laq / LAST, "--output-dir": vla}, shlex.split(args.vla_flags) + control)
    return laq, vla


def train(script: str, output_dir: Path, flags: dict, more: list[str]) -> None:
    """One of the training scripts, unless its run is done."""
    record = output_dir / "run.json"
    if not record.is_file() or json.loads(record.read_text())["state"] != "done":
        run(["-m", "accelerate.commands.launch", str(ROOT / script), *more], flags)


def run(command: list[str], flags: dict) -> None:
    """Raises CalledProcessError where it fails: the cells that are done stay."""
    command = [sys.executable, *command, *(str(part) for pair in flags.items() for part in pair)]
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


@contextmanager
def exclusive(folder: Path):
    """Holds a folder's work against the other processes that share the table; they wait here."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        hold(lock)
        yield


def rows_of(args: Args, cell: Cell) -> list[dict]:
    """A row for each episode in simulation: method, demonstrations, seed, task, episode_seed, success.

    They are those of the cell's own folder, or of curve.json, which may come from another machine; none where the cell
    is not done."""
    facts, folder = cell._asdict(), args.output_dir / cell.name
    if (folder / "rollout.json").is_file():
        episodes = [row for of_task in read_episodes(folder).values() for row in of_task]
        return [
            facts | {"task": row["task"], "episode_seed": row["seed"], "success": int(row["success"])}
            for row in episodes
        ]
    return [row for row in read_results(args) if facts.items() <= row.items()]


def read_results(args: Args) -> list[dict]:
    file = args.output_dir / RESULTS
    return json.loads(file.read_text()) if file.is_file() else []


def successes(results: dict[Cell, list[dict]], method: str, demonstrations: int | None) -> dict[tuple, int]:
    """Success by (seed, task, episode_seed)."""
    if method == "oracle":
        demonstrations = None
    cells = [cell for cell in results if (cell.method, cell.demonstrations) == (method, demonstrations)]
    rows = [row for cell in cells for row in results[cell]]
    return {(row["seed"], row["task"], row["episode_seed"]): row["success"] for row in rows}


class Gain(NamedTuple):
    """How much more often one method succeeds than another, in the episodes that both tried."""

    mean: float
    error: float  # standard error of the mean over the seeds; nan with one seed
    z: float  # of the mean over single episodes, as they come in pairs
    episodes: int


def gain(results: dict[Cell, list[dict]], method: str, rival: str, demonstrations: int) -> Gain | None:
    """Paired difference of success; None where they share no episode."""
    one, other = (successes(results, name, demonstrations) for name in (method, rival))
    differences = {key: one[key] - other[key] for key in one if key in other}
    if not differences:
        return None
    values = np.array(list(differences.values()))
    seeds = sorted({seed for seed, _, _ in differences})
    means = [np.mean([d for (s, _, _), d in differences.items() if s == seed]) for seed in seeds]
    error = float(np.std(means, ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else math.nan
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    z = float(values.mean() / spread * math.sqrt(len(values))) if spread else 0.0
    return Gain(float(values.mean()), error, z, len(values))


def table(args: Args, results: dict[Cell, list[dict]]) -> str:
    """Markdown: success over all seeds and tasks, its 95 % Wilson interval, and the number of episodes; then each
    method's gain over bc and bc_long."""
    lines = [["demonstrations of each task", *args.methods]]
    for k in args.demonstrations:
        row = [str(k)]
        for method in args.methods:
            outcomes = list(successes(results, method, k).values())
            if not outcomes:
                row.append("–")
                continue
            low, high = wilson(sum(outcomes), len(outcomes))
            row.append(f"{sum(outcomes) / len(outcomes):.2f} ({low:.2f} to {high:.2f}; {len(outcomes)})")
        lines.append(row)
    text = markdown_table(lines) + "\n"
    for rival in [name for name in ("bc", "bc_long") if name in args.methods]:
        others = [method for method in args.methods if method != rival]
        if not others:
            continue
        lines = [[f"gain over {rival}, ± its error over seeds; z of paired episodes", *others]]
        for k in args.demonstrations:
            gains = [gain(results, method, rival, k) for method in others]
            lines.append([str(k), *(f"{g.mean:+.2f} ± {g.error:.2f}; {g.z:.1f}" if g else "–" for g in gains)])
        text += "\n" + markdown_table(lines) + "\n"
    return text


def plot(args: Args, results: dict[Cell, list[dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, method in enumerate(args.methods):
        outcomes = {k: list(successes(results, method, k).values()) for k in sorted(args.demonstrations)}
        known = {k: (sum(o) / len(o), *wilson(sum(o), len(o))) for k, o in outcomes.items() if o}
        if known:
            rates, lows, highs = zip(*known.values(), strict=True)
            places = [k * 1.02 ** (i - len(args.methods) / 2) for k in known]  # beside each other
            errors = [
                [r - x for r, x in zip(rates, lows, strict=True)],
                [x - r for r, x in zip(rates, highs, strict=True)],
            ]
            axes.errorbar(places, rates, errors, label=method, marker="o", capsize=3)
    axes.set(xscale="log", xlabel="demonstrations of each task", ylabel="success, 95 % interval", ylim=(0, 1))
    axes.set_xticks(args.demonstrations, [str(k) for k in args.demonstrations], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(args.output_dir / "curve.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
