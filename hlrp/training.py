"""A run: its settings, its folder, its checkpoints, and the ways in which it ends.

OUTPUT_DIR/
    run.lock                            held while a process trains in this folder
    run.json                            settings, versions, git state, state of the run
    metrics.jsonl                       every logged scalar, one line a step and split
    checkpoints/<step:06d>/pretrained_model    the model (config.json + model.safetensors)
    checkpoints/<step:06d>/training_state      what a resume needs beside it; model.safetensors: the weights in
                                               training, where the model is their average
    checkpoints/last -> <step:06d>

A run is a function of (settings, step): nothing random is carried from step to step, so a resume needs the step,
the weights and the optimizer's state, and continues to the bit.
"""

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from hlrp.checkpoints import (
    WEIGHTS,
    changes,
    check_output_dir,
    contents,
    git_state,
    last_checkpoint,
    link_last,
    load_weights,
    lock,
    save_tensors,
    whole_folder,
    write_json,
)
from hlrp.cli import NOT_GIVEN, Interval
from hlrp.data import Mixture, loader
from hlrp.distributed import (
    Watchdog,
    choose_threads,
    die_with_launcher,
    fails_first,
    full,
    full_copies,
    keep_freed_memory,
    make_accelerator,
    peak_memory,
    release_freed_memory,
    sharding,
    under_launcher,
    wait_for_all,
)
from hlrp.optimizers import load_optimizer, moments, save_optimizer
from hlrp.training_log import Clock, Findings, Intake, Log, findings_table, labelled_counts, scalars, stragglers, tensor

if TYPE_CHECKING:
    from torch.optim.swa_utils import AveragedModel

# exit code: saved and stopped by a signal, the same command goes on; 75, or as slurm/common.sh wants it
INTERRUPTED = int(os.environ.get("HLRP_INTERRUPTED", os.EX_TEMPFAIL))
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # save and stop


@dataclass
class RunArgs:
    """The settings that all three scripts share."""

    # sources to learn from: videos:DIR lerobot:REPO_OR_DIR hdf5:DIR shards:DIR rlds:DIR world:NAME ...; @0.5: a weight
    data: tuple[str, ...] = ()
    output_dir: Path = Path("outputs")  # folder of this run: checkpoints, pictures and log
    steps: int = 600  # optimizer steps of the whole run
    batch_size: int = 32  # samples in a forward pass of one process
    lr: float = 1e-3  # highest learning rate
    optimizer: Literal["muon", "adamw"] = "muon"  # muon trains a model from scratch in fewer steps than adamw
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # number format of the forward pass; auto: bf16 on a GPU
    num_workers: int = 2  # processes that load data, for each training process
    seed: int = 0  # of the weights, the order of the data and the held-out episodes
    # validate every so many steps, and after the last one; None: 600, a tenth of what the steps before it cost
    eval_freq: Interval = NOT_GIVEN

    val_fraction: float = 0.1  # share of each source's episodes that is held out for validation
    val_samples: int = 512  # most samples of each source in a validation
    skip_broken: bool = False  # leave out and count what cannot be read, instead of stopping at it
    max_broken: int = 100  # with --skip-broken: stop after this many unreadable files or clips per process
    grad_accumulation: int = 1  # forward passes in an optimizer step, whose gradients are added
    # steps in which the learning rate grows, before it falls by a cosine; None: a sixth of --steps, at most 100
    warmup_steps: Interval = NOT_GIVEN
    weight_decay: float = 0.05  # share of a weight, times the learning rate, that each step takes away
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down to it
    compile: bool = False  # compile each transformer block by torch.compile

    # save a checkpoint every so many steps, and after the last one; None: half of --steps, at most 300
    save_freq: Interval = NOT_GIVEN
    # log the training loss every so many steps; None: a twelfth of --steps, at most 50
    log_freq: Interval = NOT_GIVEN
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to OUTPUT_DIR/tensorboard

    # (parts, most): what an interval that is not given is, steps // parts and at most `most`
    INTERVALS: ClassVar[dict[str, tuple[int, int]]] = {
        "warmup_steps": (6, 100),
        "log_freq": (12, 50),
        "eval_freq": (1, 600),
        "save_freq": (2, 300),
    }

    def resolved(self) -> Self:
        """The settings with the intervals that follow from the number of steps where they are not given.

        Raises ValueError for settings that no run can have."""
        least = {"warmup_steps": 0}
        intervals = {
            name: min(most, max(self.steps // parts, least.get(name, 1)))
            for name, (parts, most) in self.INTERVALS.items()
            if getattr(self, name) is None
        }
        args = replace(self, **intervals)
        args.check()
        return args

    def settings(self, **resolved) -> dict:
        """The settings by the names of their flags, as plain values; those of nested configs stand beside the others.

        resolved: what stands in place of a field, such as a config whose sizes are filled in."""
        values = asdict(replace(self, **resolved))
        while nested := [name for name, value in values.items() if isinstance(value, dict)]:
            for name in nested:
                values |= values.pop(name)
        return json.loads(json.dumps(values, default=str))

    def check(self) -> None:
        """Raises ValueError for settings that no run can have."""
        for name in "steps batch_size grad_accumulation log_freq eval_freq save_freq val_samples".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 or more")
        if self.max_broken < 0:
            raise ValueError(f"max_broken={self.max_broken}; expected 0 or more")
        for name in ("lr", "grad_clip", "temperature"):
            if (value := getattr(self, name, None)) is not None and value <= 0:
                raise ValueError(f"{name}={value}; expected a positive number")
        for name in ("label_fraction", "ema_decay"):
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 to 1")
        count = getattr(self, "demonstrations", None)
        if count is not None and (count < 1 or getattr(self, "label_fraction", 1) != 1):
            raise ValueError(f"demonstrations={count}; expected 1 or more, and no --label-fraction beside it")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}; expected 0 to steps={self.steps}")


@dataclass
class VideoArgs(RunArgs):
    """The settings that stages 1 and 2 share beside those of every run."""

    # multiply each source's weight by its number of clips ** (1 / temperature); 1: sources count by their size
    temperature: float | None = None
    label_fraction: float = 1.0  # with --action-weight: share of the training episodes whose actions are used
    # with --action-weight: episodes of each task whose actions are used, the same as in stage 3; None: --label-fraction
    demonstrations: int | None = None
    buckets: tuple[str, ...] = ()  # sets of validation samples to draw: 'left: task~left', or files of such lines
    # which pictures to draw at validation: NAME, NAME:BUCKET,BUCKET or NAME@STEPS
    pictures: tuple[str, ...] = ("every",)


class Run:
    """One output folder from the first step to the last, shared by all ranks: `with Run(args) as run`.

    accelerator: accelerate's, for what is not here. step: optimizer steps that are done. report: of the last
    validation, kept in every checkpoint. However the body ends, run.json says so: done, interrupted, or failed and why.
    """

    def __init__(self, args: RunArgs):
        """args: resolved. Raises ValueError where the launcher contradicts them."""
        die_with_launcher()
        self.args, self.accelerator = args, make_accelerator(args)
        accelerator, launched = self.accelerator, int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:
            raise ValueError(
                f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}: each would be a "
                "run of its own in one folder. Launch with torchrun or with accelerate launch --multi_gpu"
            )
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        self.ranks = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}
        self.accumulation = accelerator.gradient_accumulation_steps  # the launcher may have set it
        if self.device.type == "cpu":
            choose_threads(accelerator.num_processes)
            keep_freed_memory()
        self.check_freq = 1 if self.device.type == "cpu" else 10  # steps between looks at what the device computes
        self.watchdog = Watchdog(accelerator.process_index)
        self.step, self.has_started, self.has_stepped = 0, False, False  # has_stepped: since the last batch was given
        self.report: Any = None  # a dict once there is one
        self.stop_signal, self.stop_asked, self.must_stop, self.handlers = 0, 0.0, False, {}

    def __enter__(self) -> "Run":
        return self

    def start(self, settings: dict, mixture: Mixture, batch_size: int | None = None) -> None:
        """Takes the folder and records the run. settings: plain values, which a resume must give again. batch_size:
        samples in a forward pass of one process, where it is not that of the settings.

        Raises ValueError where another process trains in the folder, or another run is in it.
        """
        args, accelerator, folder = self.args, self.accelerator, self.args.output_dir
        self.mixture, self.batch_size = mixture, batch_size or args.batch_size
        self.settings = settings | {
            "num_processes": accelerator.num_processes,
            "grad_accumulation": self.accumulation,
            "mixed_precision": accelerator.mixed_precision,
        }
        if self.is_main:
            self.lock = lock(folder)
            check_output_dir(folder)
        wait_for_all()
        self.checkpoint, record = last_checkpoint(folder), folder / "run.json"
        self.before = json.loads(record.read_text()) if self.checkpoint and record.is_file() else None
        self.record = {"settings": self.settings, "contents": contents(self.settings), "data": mixture.parts}
        if self.before is not None and (found := changes(self.before, self.record)):
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(found)}). Give the old ones to resume it, or "
                "another --output-dir to start anew"
            )
        self.step = int(self.checkpoint.name) if self.checkpoint else 0
        self.intake = Intake(args.num_workers, args.max_broken)
        self.first_fault = torch.full((), math.inf, device=self.device)
        self.record |= {
            "state": "running",
            "started": self.before["started"] if self.before else time.strftime("%Y%m%d-%H%M%S"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "device": str(self.device),
            "samples_per_step": self.samples_per_step,
            "mixed_precision": accelerator.mixed_precision,
            "in_shards": sharding() is not None,
            "versions": {name: version(name) for name in ("lerobot_policy_hlrp", "torch", "accelerate", "numpy")},
            "git": git_state(),
        }
        run_id, project = f"{folder.name}-{self.record['started']}", os.environ.get("WANDB_PROJECT", "hlrp")
        self.output = Log(accelerator, folder, self.step, args.steps, self.settings, run_id, project)
        self.has_started = True
        if self.is_main:
            write_json(record, self.record)
        self.handlers = {number: signal.signal(number, self.request_stop) for number in STOP}
        wait_for_all()

    def request_stop(self, number: int, frame) -> None:
        """Has the run save and stop after its step; a second Ctrl-C ends it at once."""
        if number == signal.SIGINT:
            patience = 2.0 if under_launcher() else 0.0  # which passes on a Ctrl-C that its ranks have had already
            if self.stop_signal == number and time.monotonic() - self.stop_asked >= patience:
                signal.signal(number, signal.SIG_DFL)
                raise KeyboardInterrupt("a second Ctrl-C: ended at once, without saving")
            if self.stop_signal != number:
                self.stop_asked = time.monotonic()
                if self.is_main:  # print() may not be called twice at a time
                    os.write(2, b"\nCtrl-C: saves and stops after this step; Ctrl-C again ends at once\n")
        self.stop_signal = number

    def load(self, model: nn.Module, optimizer: Optimizer, average: "AveragedModel | None" = None) -> None:
        """Continues from the last checkpoint, if there is one."""
        from torch.distributed.tensor.experimental import implicit_replication

        self.clock = Clock(model if dist.is_initialized() else None, self.device)
        if self.checkpoint:
            model, saved = self.accelerator.unwrap_model(model), self.checkpoint / "pretrained_model"
            if average is not None:
                load_weights(saved, average.module)
                average.n_averaged += 1  # of 0 it would begin anew
                saved = self.checkpoint / "training_state"
            with implicit_replication():  # of a whole tensor, a shard takes its part
                load_weights(saved, model)
            load_optimizer(self.checkpoint / "training_state", optimizer)
            step = json.loads((self.checkpoint / "training_state" / "training_step.json").read_text())
            self.report, self.intake.turns = step["report"], step["turns"]
            if self.before is not None:  # streams at another place may have another name
                parts = zip(self.before["data"], self.record["data"], strict=True)
                names = {old["name"]: part["name"] for old, part in parts}
                self.intake.turns = {names[name]: turn for name, turn in step["turns"].items()}
            self.print(f"resumed {self.args.output_dir} at step {self.step}")
            for name, turn in self.intake.turns.items():
                self.print(
                    f"{name} is a stream: it goes on at the beginning of shard {turn} since its start; what was read "
                    "of it and of later ones is seen again"
                )
        wait_for_all()  # some disks are slow

    def batches(self, optimizer: Optimizer) -> Iterator[dict]:
        """Batches of the mixture on the device, up to the last step, with torch's random numbers set for each.

        Gradients are zero where a step begins. The time that the training waits for data is measured here. After a
        signal, and once `must_save` has said so, the run ends here with the exit code that asks for the same command
        again.
        """
        args, accelerator = self.args, self.accelerator
        batches = loader(
            self.mixture,
            self.batch_size,
            self.step * self.samples_per_step,
            **self.ranks,
            num_workers=args.num_workers,
            turns=self.intake.turns,
        )
        iterator, is_first = iter(batches), True
        while self.step < args.steps:
            if self.must_stop:
                self.print(f"stopped by a signal at step {self.step}, saved; the same command goes on")
                sys.exit(INTERRUPTED)
            before = time.monotonic()
            self.watchdog.begins(f"waits for data of step {self.step + 1}")
            group = [next(iterator) for _ in range(self.accumulation)]
            if is_first:
                wait_for_all()  # workers start, and streams fill their buffers, within times of their own
            is_first = False
            self.watchdog.begins(f"computes step {self.step + 1}")
            self.clock.waited += time.monotonic() - before
            labelled = self.counts(group)
            for i, batch in enumerate(group):
                self.intake.take(batch, self.step + 1)
                self.clock.samples += len(batch["dataset"])
                batch = {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
                self.has_stepped = False
                if i == 0:
                    optimizer.zero_grad()
                seed_step(args.seed, self.step * self.accumulation + i, accelerator.process_index)
                yield batch | labelled | {"step": self.step}

    def announce(self, model: nn.Module) -> None:
        """Says what it learns from, what it trains, for how long, and where that goes."""
        args, trained = self.args, sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.print("data      " + "\n          ".join(self.mixture.described()))
        where = f"{self.accelerator.num_processes} process(es) on {self.device.type}"
        self.print(f"model     {trained / 1e6:.1f} M trained parameters, {where}")
        self.print(f"training  {args.steps} steps of {self.samples_per_step} samples, learning rate {args.lr:g}")
        self.print(f"folder    {args.output_dir}")

    def counts(self, batches: list[dict]) -> dict[str, Tensor]:
        """`labelled_counts` of an optimizer step, on all ranks, for each of its batches."""
        counts = labelled_counts(batches, with_points=bool(self.settings.get("point_weight")))
        means = {name: count.to(self.device, torch.float32) for name, count in counts.items()}
        return {name: tensor(self.accelerator.reduce(count, "mean")) / len(batches) for name, count in means.items()}

    def accumulate(self, model: nn.Module):
        """A context in which ranks exchange gradients only in the last forward and backward pass of a step."""
        return self.accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        """Scales the gradient to a norm of at most `grad_clip` and returns the norm before; None while gradients are
        still accumulated."""
        if not self.accelerator.sync_gradients:
            return None
        return self.accelerator.clip_grad_norm_(model.parameters(), self.args.grad_clip)

    def advance(self, loss: Tensor, grad_norm: Tensor | None, lr: float, metrics: dict[str, float | Tensor]) -> None:
        """Counts an optimizer step and logs it when it is due; does nothing while gradients are still accumulated.

        Raises FloatingPointError for a non-finite loss or gradient, naming the step and what the batch was made of.
        """
        if grad_norm is None:
            return
        self.step, self.has_stepped = self.step + 1, True
        self.watchdog.begins(f"has done step {self.step}, and no other")
        sound = torch.isfinite(loss.detach() + full(grad_norm))
        self.first_fault = torch.where(sound, self.first_fault, self.first_fault.clamp(max=self.step))
        if self.output.bar is not None:
            self.output.bar.update()
        if self.step % self.check_freq == 0 or self.step == self.args.steps:
            self.refuse_faults()
        if self.step % self.args.log_freq == 0:
            means = {name: torch.as_tensor(x, device=self.device) for name, x in metrics.items()}
            self.log_training({"loss": loss, **means, "grad_norm": grad_norm, "lr": lr})

    def refuse_faults(self) -> None:
        fault = tensor(self.accelerator.reduce(self.first_fault, "min")) if dist.is_initialized() else self.first_fault
        if math.isinf(first := float(fault)):
            self.intake.seen.clear()
            return
        mine = float(self.first_fault) == first
        sources = sorted(set(self.intake.seen.get(int(first), [])))
        raise FloatingPointError(
            f"step {int(first)}: the loss or its gradient is not finite"
            + (f"; the batch held {', '.join(sources[:16])}" if mine else "; the batch of another rank is at fault")
            + f". The last sound checkpoint is {last_checkpoint(self.args.output_dir)}; a lower --lr or "
            "--grad-clip may help"
        )

    def log_training(self, values: dict[str, float | Tensor]) -> None:
        """Means over ranks of the scalars of a step, the share of each source so far, and the speed."""
        tensors = {name: full(value).detach().float() for name, value in values.items() if isinstance(value, Tensor)}
        means = tensor(self.accelerator.reduce(torch.stack([*tensors.values()]), "mean")).tolist()
        record: dict[str, Any] = values | dict(zip(tensors, means, strict=True))
        record |= self.mixture.shares(self.step * self.samples_per_step)
        num_ranks = self.accelerator.num_processes
        if self.clock.stopwatch is not None:
            steps = self.clock.samples * num_ranks / self.samples_per_step
            mine = torch.tensor([[self.clock.waited, self.clock.stopwatch.read()]], device=self.device)
            if line := stragglers(tensor(self.accelerator.gather(mine)).cpu() / steps):
                self.print(line)
        record |= self.clock.speed(num_ranks, (self.args.steps - self.step) * self.samples_per_step)
        if self.intake.num_broken:
            record["broken"] = self.intake.num_broken
        self.clock.restart()
        self.output.write("train", record, self.step)

    def log(self, split: str, values: dict[str, float]) -> None:
        """Scalars of this step that are no training, which takes no part in the speed of it."""
        self.clock.restart()
        self.output.write(split, values, self.step)

    def log_report(self, report: dict, findings: Findings, alarms: list[str]) -> None:
        """Keeps the report of a validation for the checkpoints, logs its figures, and prints findings and alarms."""
        self.report = report
        self.log("val", scalars(report))
        self.print(findings_table(f"validation after step {self.step}", findings))
        for alarm in alarms:
            self.print(f"ALARM: {alarm}")
        release_freed_memory()

    def is_due(self, freq: int) -> bool:
        """Every `freq` optimizer steps; never between the forward passes of one."""
        return self.has_stepped and self.step % freq == 0

    def must_validate(self) -> bool:
        return self.is_due(self.args.eval_freq) or (self.has_stepped and self.step == self.args.steps)

    def must_save(self) -> bool:
        """At `save_freq`, at the last step, and once any rank has been asked to stop. All ranks must call it."""
        if not self.has_stepped:
            return False
        if self.step % self.check_freq == 0:
            flag = torch.tensor(self.stop_signal, device=self.device)
            if dist.is_initialized():
                dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.must_stop = bool(flag)
        return self.must_stop or self.step % self.args.save_freq == 0 or self.step == self.args.steps

    @property
    def samples_per_step(self) -> int:
        """Samples of all ranks in one optimizer step."""
        return self.batch_size * self.accumulation * self.accelerator.num_processes

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        average: "AveragedModel | None" = None,
        write: Callable[..., None] | None = None,
        **provenance,
    ) -> None:
        """Writes checkpoints/<step> whole, then points checkpoints/last at it.

        average: of the model, which is then what is saved. write(folder, weights, **provenance): saves a model, by
        default its own `save_pretrained`.
        """
        self.refuse_faults()
        folder = self.args.output_dir / "checkpoints" / f"{self.step:06d}"
        bare: Any = self.accelerator.unwrap_model(model)
        weights = full_copies(bare.state_dict(), self.is_main)
        state = full_copies(moments(optimizer), self.is_main)
        turns = self.intake.next_turns(self.device)
        if self.is_main and not folder.is_dir():
            with whole_folder(folder) as partial:
                (partial / "pretrained_model").mkdir()
                (partial / "training_state").mkdir()
                provenance |= {"step": self.step, "report": self.report}
                if average is not None:
                    save_tensors(partial / "training_state" / WEIGHTS, weights)
                    weights = average.module.state_dict()
                (write or bare.save_pretrained)(partial / "pretrained_model", weights, **provenance)
                save_optimizer(partial / "training_state", optimizer, state)
                step = {"step": self.step, "report": self.report, "turns": turns}
                write_json(partial / "training_state" / "training_step.json", step)
            link_last(folder)
        wait_for_all()

    def __exit__(self, kind, error, trace) -> None:
        self.watchdog.stopped.set()
        if not self.has_started:
            return
        for number, handler in self.handlers.items():  # a further warning is not to kill what is about to end
            signal.signal(number, handler if number == signal.SIGINT else signal.SIG_IGN)
        is_over = error is None or (kind is SystemExit and self.must_stop)
        peaks = peak_memory(self.device)
        ended = {"state": "done" if error is None else "interrupted", "step": self.step} | peaks
        if is_over:
            most = [f"{value:.1f} GB" for value in peaks.values()]
            self.print(f"memory    at most {', and on the device '.join(most)}")
        else:
            ended |= {"state": "failed", "reason": traceback.format_exception_only(error)[-1].strip()}
        record = self.args.output_dir / "run.json"
        try:
            if self.is_main if is_over else fails_first() and record.is_file():
                write_json(record, json.loads(record.read_text()) | ended)
        finally:
            self.output.close(exit_code=0 if is_over else 1)
            if self.is_main:
                self.lock.close()

    def wait_for_all(self) -> None:
        """Returns once every rank is here; the work of one may take long."""
        wait_for_all()

    def show(self, files: Iterable[Path]) -> None:
        self.output.show(files, self.step)

    def print(self, text: str) -> None:
        """One line above the progress bar, from the main process."""
        self.output.print(text)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes torch's random numbers a function of (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
