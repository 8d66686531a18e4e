"""What a run tells while it trains, to metrics.jsonl, the terminal, TensorBoard and W&B; and how fast each rank is."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from hlrp.checkpoints import write_text

logger = logging.getLogger(__name__)
MUCH_WAITING = 0.3  # share of the time of training
WAITING = (
    "training waits for data {:.0%} of its time: more --num-workers help while cores are free, and shards do, which "
    "python -m hlrp.shards makes once of any source; a pair of frames is read from them in a fraction of a video's "
    "time (docs/data.md, Speed)"
)


class Log:
    """The log of a run; all ranks make one, the main one writes.

    folder: of the run. Lines behind `step` that an interrupted run left in metrics.jsonl are cut off.
    """

    def __init__(self, accelerator, folder: Path, step: int, steps: int, settings: dict, run_id: str, project: str):
        self.accelerator, self.folder, self.steps, self.bar = accelerator, folder, steps, None
        self.num_slow = 0  # lines that told of much waiting
        if not accelerator.is_main_process:
            return
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_text(metrics, "".join(line + "\n" for line in whole if step))
        self.metrics = metrics.open("a")
        wandb = {"id": re.sub(r"[^\w.-]", "-", run_id), "resume": "allow", "dir": folder}
        plain = {name: x if isinstance(x, int | float | str) else str(x) for name, x in settings.items()}
        accelerator.init_trackers(project, config=plain, init_kwargs={"wandb": wandb})
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def write(self, split: str, values: dict[str, float], step: int) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        if not self.accelerator.is_main_process:
            return
        self.metrics.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self.metrics.flush()
        self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step)
        if split == "train":
            self.tell_progress(values, step)

    def tell_progress(self, values: dict[str, float], step: int) -> None:
        text = f"loss {values['loss']:.4f}  {values['samples_per_s']:.0f} samples/s  data {values['data_wait']:.0%}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            eta = timedelta(seconds=round(values["eta_s"]))
            self.print(f"step {step}/{self.steps}  {text}  lr {values['lr']:.1e}  eta {eta}")
        self.num_slow += values["data_wait"] > MUCH_WAITING
        if self.num_slow == 2:  # the first line has the start of the workers in it
            self.print(WAITING.format(values["data_wait"]))

    def show(self, files: Iterable[Path], step: int) -> None:
        """Pictures and videos of a step, to W&B if asked: by the names of their files, without the step."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                import wandb

                media = {}
                for file in sorted(files):
                    name = str(file.relative_to(self.folder).with_suffix(""))
                    name = name.replace(f"/step_{step:06d}", "").removesuffix(f"_{step:06d}")
                    is_video = file.suffix == ".mp4"
                    media[name] = wandb.Video(str(file), format="mp4") if is_video else wandb.Image(str(file))
                tracker.tracker.log(media, step=step)

    def print(self, text: str) -> None:
        """One line above the progress bar, from the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def close(self, exit_code: int) -> None:
        """exit_code: for W&B; of a run that failed, no rank waits for the others."""
        if self.accelerator.is_main_process:
            self.metrics.close()
            if self.bar is not None:
                self.bar.close()
            for tracker in self.accelerator.trackers if exit_code else ():
                if tracker.name == "wandb":
                    tracker.tracker.finish(exit_code=exit_code)
                else:
                    tracker.finish()
        if not exit_code:
            self.accelerator.end_training()


Findings = Sequence[tuple[str, str, str, str, str]]


def findings_table(title: str, rows: Findings) -> str:
    """A title and a table of rows (source, figure, value, control, verdict); the source stands where it changes."""
    cells = [(figure, value, f"({control})") for _, figure, value, control, _ in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines, last = [title], None
    for (source, *_, verdict), row in zip(rows, cells, strict=True):
        lines += [f"  {source}"] if source != last else []
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("    " + "  ".join([*padded, verdict]))
        last = source
    return "\n".join(lines)


class Clock:
    """How fast training goes, and how long it waits for data, since the last `restart`. Validation takes no part."""

    def __init__(self, model: nn.Module | None, device: torch.device):
        self.stopwatch = None if model is None else Stopwatch(model, device)
        self.restart()

    def restart(self) -> None:
        self.waited, self.samples, self.since = 0.0, 0, time.monotonic()
        if self.stopwatch is not None:
            self.stopwatch.spans.clear()

    def speed(self, num_ranks: int, samples_left: int) -> dict[str, float]:
        """Samples per second of all ranks, the share of time that waited for data, and the time to go [s]."""
        elapsed = time.monotonic() - self.since
        rate = self.samples * num_ranks / elapsed
        return {"samples_per_s": rate, "data_wait": self.waited / elapsed, "eta_s": samples_left / rate}


class Stopwatch:
    """Time that this rank needs for the forward passes of a model: under DDP they wait for no other rank."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.is_gpu, self.spans = device.type == "cuda", []
        model.register_forward_pre_hook(lambda *_: self.spans.append([self.now()]))
        model.register_forward_hook(lambda *_: self.spans[-1].append(self.now()))

    def now(self):
        if not self.is_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """[s] since the last call; the device has finished what it was given before."""
        spans, self.spans = self.spans, []
        if self.is_gpu:
            return sum(start.elapsed_time(end) for start, end in spans) / 1000
        return sum(end - start for start, end in spans)


def stragglers(times: Tensor, tolerance: float = 1.5) -> str | None:
    """A line that names the ranks which hold up the others; times: of each rank, for data and for computing [s]."""
    totals = times.sum(dim=1)
    median = totals.median()
    slow = [rank for rank in totals.argsort(descending=True).tolist() if totals[rank] > tolerance * median]
    if not slow:
        return None
    named = ", ".join(f"rank {r} {totals[r]:.2f} s ({times[r, 0]:.2f} waiting for data)" for r in slow[:4])
    more = f" and {len(slow) - 4} more" if len(slow) > 4 else ""
    return f"STRAGGLERS, time of a step before ranks meet, median {median:.2f} s: {named}{more}"


def scalars(report: dict[str, dict]) -> dict[str, float]:
    """The report as flat figures for a log, "source/figure".

    With several targets, an error is "source/figure/target"; a ratio is also "source/figure", their mean.
    """
    flat = {}
    for name, figures in report.items():
        for figure, value in figures.items():
            key = f"{name}/{figure}"
            if isinstance(value, dict):
                if len(value) == 1 or "_over_" in figure:
                    flat[key] = fmean(value.values())
                if len(value) > 1:
                    flat |= {f"{key}/{target}": x for target, x in value.items()}
            elif isinstance(value, list):
                flat |= {f"{key}/{i}": x for i, x in enumerate(value) if x is not None}
            elif value is not None:
                flat[key] = float(value)
    return flat


class Intake:
    """What this rank has taken in: how far its streams are read, what was left out, and the episodes of the last steps.

    num_workers: of the loader. max_broken: clips and parts of streams that may be left out.
    """

    def __init__(self, num_workers: int, max_broken: int):
        self.num_readers, self.max_broken = max(1, num_workers), max_broken
        self.turns: dict[str, int] = {}  # where streams begin, see hlrp.streams
        self.reached: dict[str, dict[int, int]] = {}  # and where each reader is
        self.num_broken = 0  # since the start
        self.seen: dict[int, list[str]] = {}  # step -> the episodes in it, until it is known to be sound

    def take(self, batch: dict, step: int) -> None:
        """Takes out of a batch what the loader says of it. Raises ValueError where too much was left out."""
        for name, reader, turn in batch.pop("turns"):
            self.reached.setdefault(name, {})[reader] = turn
        for message in batch.pop("skipped"):
            self.num_broken += 1
            logger.warning("skipped %s", message)
            if self.num_broken > self.max_broken:
                raise ValueError(
                    f"max_broken={self.max_broken}, but more cannot be read, at last {message}; "
                    "mend the data, or allow more"
                )
        places = zip(batch["dataset"], batch["place"], strict=True)
        self.seen.setdefault(step, []).extend(f"{name} {place}" for name, place in places)

    def next_turns(self, device: torch.device) -> dict[str, int]:
        """For each stream, the earliest shard that a reader on any rank has not used up."""
        names = sorted(self.reached)
        turns = [
            min(self.reached[name].values()) if len(self.reached[name]) == self.num_readers else self.turns.get(name, 0)
            for name in names
        ]
        if names and dist.is_initialized():
            lowest = torch.tensor(turns, device=device)
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
            turns = lowest.tolist()
        return dict(zip(names, turns, strict=True))


def labelled_counts(batches: list[dict], with_points: bool) -> dict[str, Tensor]:
    """How many samples of some batches have actions, latent actions and a known point: the counts by which
    `hlrp.transformer.masked_mean` is exact over accumulated batches and ranks."""
    counts = {}
    if "action_is_pad" in batches[0]:
        counts["num_labelled"] = sum((~batch["action_is_pad"]).any(1).sum() for batch in batches)
    if "latent_is_pad" in batches[0]:
        counts["num_latent"] = sum((~batch["latent_is_pad"]).any(1).sum() for batch in batches)
    if with_points:  # a batch may have no point at all, and not so on each rank
        points = [batch["point"] for batch in batches if "point" in batch]
        counts["num_points"] = torch.cat([torch.zeros(0, 2), *points]).isfinite().all(1).sum()
    return counts


def tensor(x) -> Tensor:
    """What a collective of accelerate returns for a tensor: a tensor, though its types allow more."""
    assert isinstance(x, Tensor)
    return x
