"""Label efficiency: success in simulation against the number of demonstrations, for hlrp and its rivals.

    python -m hlrp.curve                                             # MT10, K = 1 to 50, three seeds
    python -m hlrp.curve --demonstrations 5 --methods hlrp bc --output-dir outputs/curve
    python -m hlrp.curve --cell $SLURM_ARRAY_TASK_ID                 # one cell of the table, for job arrays
    python -m hlrp.curve --list                                      # the cells and how each stands

    hlrp       latent actions of video (stages 1 and 2), then K demonstrations beside the other video
    bc         behaviour cloning: the same backbone and steps from K demonstrations alone
    idm        an inverse model of the K demonstrations labels the other video, which is then cloned (hlrp.inverse)
    random     hlrp, with a LAQ that has learned nothing
    shuffled   hlrp, with the latent actions of other samples

Stages 1 and 2 are trained once, with seed 0; a seed is of the demonstrations, the third stage and its weights. bc and
idm get the vlm of stage 2 as it was before. Each cell is a run folder below OUTPUT_DIR. What is finished is not run
again, what was cut is resumed, and several processes may share the table: each waits for a stage that another one
trains. Gives curve.json, curve.md and curve.png.
"""

import json
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import tyro

from hlrp.checkpoints import hold, load_config, write_json, write_text
from hlrp.cli import tell_mistakes
from hlrp.metrics import wilson
from hlrp.runs import markdown_table

Method = Literal["hlrp", "bc", "idm", "random", "shuffled"]
ROOT = Path(__file__).parents[1]
LAST = "checkpoints/last/pretrained_model"


@dataclass
class Args:
    data: str = "metaworld:mt10?episodes=100"  # demonstrations and, without their actions, other video
    demonstrations: tuple[int, ...] = (1, 2, 5, 10, 25, 50)  # numbers of demonstrations of each task, each a cell
    methods: tuple[Method, ...] = get_args(Method)  # methods to compare
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the demonstrations and the training, each a cell

    env: str = "hlrp_metaworld"  # environment in which success counts
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
    demonstrations: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}_k{self.demonstrations}_seed{self.seed}"


def main(args: Args) -> None:
    cells = cells_of(args)
    if args.list:
        for i, cell in enumerate(cells):
            print(f"{i:4}  {cell.name:24}  {'done' if result_of(args, cell) else 'to run'}")
        return
    record_settings(args)
    for cell in cells if args.cell is None else [cells[args.cell]]:
        if result_of(args, cell) is None:
            run_cell(args, cell)
    results = {cell: result for cell in cells if (result := result_of(args, cell)) is not None}
    write_json(args.output_dir / "curve.json", {cell.name: result for cell, result in results.items()})
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
    if min(args.demonstrations) < 1 or args.episodes < 1:
        raise ValueError(f"demonstrations={args.demonstrations}, episodes={args.episodes}; expected 1 or more")
    cells = [Cell(m, k, s) for k in args.demonstrations for s in args.seeds for m in args.methods]
    if args.cell is not None and not 0 <= args.cell < len(cells):
        raise ValueError(f"cell={args.cell}; expected 0 to {len(cells) - 1}")
    return cells


def record_settings(args: Args) -> None:
    """Writes what all cells share, or raises ValueError where the folder holds a table of other settings."""
    names = ("data", "env", "tasks", "episodes", "eval_seed", "laq_flags", "vla_flags", "policy_flags", "inverse_flags")
    settings = json.loads(json.dumps({name: getattr(args, name) for name in names}))
    file = args.output_dir / "settings.json"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(file):
        was = json.loads(file.read_text()) if file.is_file() else settings
        if other := [name for name in names if was.get(name) != settings[name]]:
            changes = "; ".join(f"{name} was {was.get(name)!r} and is {settings[name]!r}" for name in other)
            raise ValueError(f"{args.output_dir} holds a table with other settings ({changes}); give another folder")
        write_json(file, settings)


def run_cell(args: Args, cell: Cell) -> None:
    """Trains what the cell needs and is not there, then its policy, and rolls that out."""
    policy = args.output_dir / cell.name
    shared = {"--data": args.data, "--demonstrations": cell.demonstrations, "--seed": cell.seed}
    flags = shared | {"--output-dir": policy}
    more = shlex.split(args.policy_flags)
    if cell.method in ("hlrp", "random", "shuffled"):
        laq, vla = stages(args, cell.method)
        flags |= {"--laq": laq / LAST, "--policy.vla": vla / LAST}
        more += ["--shuffle-latents"] if cell.method == "shuffled" else []
    else:
        flags |= {"--policy.vla": "None"} | backbone(args)
    if cell.method == "idm":
        labels = args.output_dir / f"inverse_k{cell.demonstrations}_seed{cell.seed}"
        with exclusive(labels):
            if not labels.is_dir():
                run([*"-m hlrp.inverse".split(), *shlex.split(args.inverse_flags)], shared | {"--output-dir": labels})
        flags["--pseudo-actions"] = labels
    with exclusive(policy):
        train("finetune_policy.py", policy, flags, more)
        tasks = ["--tasks", *args.tasks] if args.tasks else []
        count = {"--episodes": args.episodes, "--seed": args.eval_seed, "--env": args.env, "--videos": 1}
        if not (policy / "rollout.json").is_file():
            batch = {"--batch-size": min(args.episodes, 5), "--policy": policy / LAST, "--output-dir": policy}
            run(["-m", "hlrp.rollout", *tasks], count | batch)


def backbone(args: Args) -> dict:
    """Flags by which rivals without stage 2 get its vlm, where the table has a method with it."""
    staged = [method for method in args.methods if method in ("hlrp", "random", "shuffled")]
    if not staged:
        return {"--policy.vlm": "tiny"}
    vlm = load_config(stages(args, staged[0])[1] / LAST, "vla")["vla"]["vlm"]
    return {"--policy.vlm": vlm["vlm"]} | ({"--policy.image-size": vlm["image_size"]} if vlm["image_size"] else {})


def stages(args: Args, method: str) -> tuple[Path, Path]:
    """Run folders of stage 1 and stage 2, trained here where they are not there yet."""
    laq = args.output_dir / ("laq_random" if method == "random" else "laq")
    vla = args.output_dir / f"vla_{method}"
    untrained = "--steps 1 --warmup-steps 0 --lr 1e-12".split() if method == "random" else []
    with exclusive(laq):
        train("train_laq.py", laq, {"--data": args.data, "--output-dir": laq}, shlex.split(args.laq_flags) + untrained)
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


def result_of(args: Args, cell: Cell) -> dict | None:
    file = args.output_dir / cell.name / "rollout.json"
    return json.loads(file.read_text()) if file.is_file() else None


def pooled(results: dict[Cell, dict], method: str, demonstrations: int) -> tuple[int, int]:
    """Successes and episodes over the seeds."""
    rows = [r["all"] for c, r in results.items() if (c.method, c.demonstrations) == (method, demonstrations)]
    return sum(row["successes"] for row in rows), sum(row["episodes"] for row in rows)


def table(args: Args, results: dict[Cell, dict]) -> str:
    """Markdown: success over all seeds and tasks, its 95 % Wilson interval, and the number of episodes."""
    rows = [["demonstrations of each task", *args.methods]]
    for k in args.demonstrations:
        row = [str(k)]
        for method in args.methods:
            successes, episodes = pooled(results, method, k)
            if not episodes:
                row.append("–")
                continue
            low, high = wilson(successes, episodes)
            row.append(f"{successes / episodes:.2f} ({low:.2f} to {high:.2f}; {episodes})")
        rows.append(row)
    return markdown_table(rows) + "\n"


def plot(args: Args, results: dict[Cell, dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, method in enumerate(args.methods):
        counts = {k: pooled(results, method, k) for k in sorted(args.demonstrations)}
        known = {k: (s / n, *wilson(s, n)) for k, (s, n) in counts.items() if n}
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
