"""The run table: one row a run folder, with the settings in which runs differ, their figures, cost and state.

    python -m hlrp.runs outputs                                              # all runs below
    python -m hlrp.runs outputs/sweep --sort=-val/world-default/action_r2 --format markdown
    python -m hlrp.runs outputs --where state=done 'lr<=1e-3' quantizer=fsq --metrics 'val/*/action_r2' train/loss

Reads run.json and metrics.jsonl alone, also of runs that are under way. hours are those of training, summed over all
processes: GPU-hours where the device is one. memory_gb is the most that a process, or its GPU, has held.
"""

import csv
import json
import operator
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hlrp.cli import tell_mistakes

METRICS = (  # of stages 1, 2 and 3, whichever a run has
    "val/*/action_r2",
    "val/*/shuffled_over_true",
    "val/*/true_over_copy",
    "val/*/accuracy",
    "val/*/action_error",
    "env/success/all",
)
# columns of every run; a setting of such a name, as `state` of stage 3, is settings.state
OWN = frozenset("run script state step device hours memory_gb settings".split())
COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders to search for runs
    metrics: tuple[str, ...] = METRICS  # figures to show: split/name as in metrics.jsonl; * stands for any name
    settings: tuple[str, ...] = ()  # settings to show beside those in which the runs differ
    where: tuple[str, ...] = ()  # which runs to show: column=value, also != < <= > >=
    sort: str | None = None  # column to sort by; --sort=-NAME: from the highest down
    format: Literal["text", "markdown", "csv"] = "text"  # how to print the table


def main(args: Args) -> None:
    runs = [read_run(path.parent, args.metrics) for folder in args.folders for path in sorted(folder.rglob("run.json"))]
    if not runs:
        raise ValueError(
            f"no run.json in or below {', '.join(map(str, args.folders))}; expected the --output-dir of a run"
        )
    for condition in args.where:
        runs = [run for run in runs if meets(condition, run)]
    columns = columns_of(runs, args.settings)
    if args.sort:
        runs = in_order(runs, args.sort)
    table = [columns, *([cell_text(run.get(column)) for column in columns] for run in runs)]
    if args.format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(table)
    else:
        print({"text": text_table, "markdown": markdown_table}[args.format](table))


def read_run(folder: Path, metrics: tuple[str, ...]) -> dict:
    """A run as one flat row: run, its settings, state, step, hours, and the last value of each of these metrics."""
    record = json.loads((folder / "run.json").read_text())
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    logged = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half written
    settings = record["settings"]
    step = max([record.get("step", 0), *(line["step"] for line in logged)])
    row = {"run": str(folder), "state": record["state"], "step": f"{step}/{settings['steps']}"}
    row |= {"device": record["device"], "hours": hours(record, logged)}
    if "memory_gb" in record:  # a run that has ended
        row["memory_gb"] = record.get("device_memory_gb", record["memory_gb"])
    row["script"] = Path(record["command"][0]).stem
    settings = {f"settings.{name}" if name in OWN else name: value for name, value in settings.items()}
    row["settings"] = settings
    for line in logged:
        for name, value in line.items():
            name = f"{line['split']}/{name}"
            if any(fnmatchcase(name, pattern) for pattern in metrics):
                row[name] = value
    return row | settings


def hours(record: dict, logged: list[dict]) -> float:
    """Hours of training of all processes, by the speed that was logged."""
    settings = record["settings"]
    samples_per_step = settings["batch_size"] * settings.get("grad_accumulation", 1) * settings["num_processes"]
    samples_per_step = record.get("samples_per_step", samples_per_step)  # runs of 0.1.0 do not say it
    seconds, before = 0.0, 0
    for line in logged:
        if line["split"] == "train" and "samples_per_s" in line:
            seconds += (line["step"] - before) * samples_per_step / line["samples_per_s"]
            before = line["step"]
    return seconds * settings["num_processes"] / 3600


def columns_of(runs: list[dict], more: tuple[str, ...]) -> list[str]:
    """run; the settings that were asked for, and those in which the runs differ; what was measured; what it took and
    how each run stands.

    Raises ValueError for a setting that no run has.
    """
    names = list(dict.fromkeys(name for run in runs for name in run["settings"]))
    if stray := [name for name in more if name not in names]:
        raise ValueError(f"settings: no run has {stray[0]!r}; they have {', '.join(sorted(names))}")
    differ = [
        name
        for name in names
        if name != "output_dir"
        and len({json.dumps(run["settings"][name]) for run in runs if name in run["settings"]}) > 1
    ]
    if len({run["script"] for run in runs}) > 1:
        differ.insert(0, "script")
    measured = sorted({name for run in runs for name in run if name not in OWN and name not in names})
    cost = ["hours", *(["memory_gb"] if any("memory_gb" in run for run in runs) else [])]
    return ["run", *dict.fromkeys([*more, *differ]), *measured, *cost, "device", "step", "state"]


def meets(condition: str, run: dict) -> bool:
    """Whether a run meets `column=value` or another comparison; one that lacks the column does not."""
    found = re.fullmatch(r"(.+?)(<=|>=|!=|=|<|>)(.*)", condition)
    if found is None:
        raise ValueError(f"where: {condition!r}; expected a comparison, such as lr=1e-4 or 'steps>=1000'")
    column, comparison, text = found.groups()
    value = run.get(column)
    if value is None:
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return COMPARISONS[comparison](value, float(text))
        except ValueError:
            raise ValueError(f"where: {condition!r}, but {column} is {value}; expected a number") from None
    if comparison not in ("=", "!="):
        raise ValueError(f"where: {condition!r}, but {column} is {value!r}; expected = or !=")
    return COMPARISONS[comparison](cell_text(value), text)


def in_order(runs: list[dict], column: str) -> list[dict]:
    """Raises ValueError for a column that no run has; runs without it come last."""
    descending, column = column.startswith("-"), column.removeprefix("-")
    having = [run for run in runs if run.get(column) is not None]
    if not having:
        names = sorted({name for run in runs for name in run if name != "settings"})
        raise ValueError(f"sort: no run has {column!r}; they have {', '.join(names)}")
    numeric = all(isinstance(run[column], int | float) for run in having)
    having.sort(key=lambda run: run[column] if numeric else cell_text(run[column]), reverse=descending)
    return having + [run for run in runs if run.get(column) is None]


def cell_text(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(cell_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def text_table(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells, aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first."""
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
