"""A run: its folder, its log, its checkpoints, and the ways in which it ends.

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
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

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
    write_text,
)
from hlrp.distributed import (
    Stopwatch,
    Watchdog,
    fails_first,
    full,
    full_copies,
    keep_freed_memory,
    sharding,
    stragglers,
    under_launcher,
    wait_for_all,
    watch_over,
)
from hlrp.optimizers import load_optimizer, moments, save_optimizer
from hlrp.training_log import Intake

# exit code: saved and stopped by a signal, the same command goes on; 75, or as slurm/common.sh wants it
INTERRUPTED = int(os.environ.get("HLRP_INTERRUPTED", os.EX_TEMPFAIL))
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # save and stop


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes torch's random numbers a function of (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


class Run:
    """One output folder from the first step to the last, shared by all ranks of an `accelerate.Accelerator`.

    settings: plain values, recorded in run.json; a resume with others is refused. data: the parts of the mixture.
    As a context, or in a function that `hlrp.distributed.ends_its_run` wraps, run.json says how the run ended, whatever
    happens: done, interrupted, or failed and why.
    """

    def __init__(self, accelerator, output_dir: Path, settings: dict, data: list[dict]):
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != accelerator.num_processes:
            raise ValueError(
                f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}: each would be a "
                "run of its own in one folder. Launch with torchrun or with accelerate launch --multi_gpu"
            )
        self.accelerator, self.output_dir = accelerator, output_dir
        if accelerator.device.type == "cpu":  # accelerate launch leaves one thread
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
            keep_freed_memory()
        self.settings = settings | {
            "num_processes": accelerator.num_processes,
            "grad_accumulation": accelerator.gradient_accumulation_steps,  # the launcher may have set these two
            "mixed_precision": accelerator.mixed_precision,
        }
        self.steps, self.seed = settings["steps"], settings["seed"]
        self.check_freq = 1 if accelerator.device.type == "cpu" else 10  # what waits for the device [optimizer step]
        self.watchdog, self.stopwatch = Watchdog(accelerator.process_index), None
        if accelerator.is_main_process:
            self.lock = lock(output_dir)
            check_output_dir(output_dir)
        wait_for_all()
        self.checkpoint = last_checkpoint(output_dir)
        record = output_dir / "run.json"
        self.before = json.loads(record.read_text()) if self.checkpoint and record.is_file() else None
        self.record = {"settings": self.settings, "contents": contents(self.settings), "data": data}
        if self.before is not None and (found := changes(self.before, self.record)):
            raise ValueError(
                f"{self.output_dir} holds a run with other settings ({'; '.join(found)}). Give the old ones to resume "
                "it, or another --output-dir to start anew"
            )
        self.step = int(self.checkpoint.name) if self.checkpoint else 0
        self.report = None  # of the last validation, kept in every checkpoint
        self.intake = Intake(settings["num_workers"], settings["max_broken"])
        self.first_fault = torch.full((), math.inf, device=accelerator.device)
        self.stop_signal, self.stop_asked, self.is_over = 0, 0.0, False
        self.restart_clock()
        self.bar = None
        if accelerator.is_main_process:
            self.start_log()
        self.handlers = {number: signal.signal(number, self.request_stop) for number in STOP}
        watch_over(self)
        wait_for_all()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.is_over:
            return
        if error is None:
            self.finish()
            return
        record = self.output_dir / "run.json"
        try:
            if fails_first() and record.is_file():
                reason = traceback.format_exception_only(error)[-1].strip()
                ended = {"state": "failed", "step": self.step, "reason": reason}
                write_json(record, json.loads(record.read_text()) | ended)
        finally:
            self.close(exit_code=1)

    def start_log(self) -> None:
        metrics = self.output_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        write_text(metrics, "".join(line + "\n" for line in whole if self.step))
        self.metrics = metrics.open("a")
        self.record |= {
            "state": "running",
            "started": self.before["started"] if self.before else time.strftime("%Y%m%d-%H%M%S"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "device": str(self.accelerator.device),
            "mixed_precision": self.accelerator.mixed_precision,
            "in_shards": sharding() is not None,
            "versions": {name: version(name) for name in ("lerobot_policy_hlrp", "torch", "accelerate", "numpy")},
            "git": git_state(),
        }
        wandb = {
            "id": re.sub(r"[^\w.-]", "-", f"{self.output_dir.name}-{self.record['started']}"),
            "resume": "allow",
            "dir": self.output_dir,
        }
        plain = {name: x if isinstance(x, int | float | str) else str(x) for name, x in self.settings.items()}
        project = os.environ.get("WANDB_PROJECT", "hlrp")
        self.accelerator.init_trackers(project, config=plain, init_kwargs={"wandb": wandb})
        write_json(self.output_dir / "run.json", self.record)
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True)

    def request_stop(self, number: int, frame) -> None:
        """Has the run save and stop after its step; a second Ctrl-C ends it at once."""
        if number == signal.SIGINT:
            # a launcher passes the terminal's Ctrl-C on to its ranks, which have had it already
            patience = 2.0 if under_launcher() else 0.0
            if self.stop_signal == number and time.monotonic() - self.stop_asked >= patience:
                signal.signal(number, signal.SIG_DFL)
                raise KeyboardInterrupt("a second Ctrl-C: ended at once, without saving")
            if self.stop_signal != number:
                self.stop_asked = time.monotonic()
                if self.accelerator.is_main_process:  # print() may not be called twice at a time
                    os.write(2, b"\nCtrl-C: saves and stops after this step; Ctrl-C again ends at once\n")
        self.stop_signal = number

    def load(self, model: nn.Module, optimizer: Optimizer, average: AveragedModel | None = None) -> None:
        """Continues from the last checkpoint, if there is one."""
        if dist.is_initialized():
            self.stopwatch = Stopwatch(model, self.accelerator.device)
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
            self.print(f"resumed {self.output_dir} at step {self.step}")
            for name, turn in self.intake.turns.items():
                self.print(
                    f"{name} is a stream: it goes on at the beginning of shard {turn} since its start; what was read "
                    "of it and of later ones is seen again"
                )
        wait_for_all()  # some disks are slow

    def batches(self, loader: Iterable[dict]) -> Iterator[dict]:
        """The loader's batches on the device, with torch's random numbers set for each; endless loaders only.

        The time that the training waits for data is measured here.
        """
        iterator, accumulation = iter(loader), self.accelerator.gradient_accumulation_steps
        is_first = True
        while self.step < self.steps:
            before = time.monotonic()
            self.watchdog.begins(f"waits for data of step {self.step + 1}")
            batches = [next(iterator) for _ in range(accumulation)]
            if is_first:
                wait_for_all()  # workers start, and streams fill their buffers, within times of their own
            is_first = False
            self.watchdog.begins(f"computes step {self.step + 1}")
            self.waited += time.monotonic() - before
            labelled = self.share_of_labelled(batches)
            for i, batch in enumerate(batches):
                self.intake.take(batch, self.step + 1)
                self.samples += len(batch["dataset"])
                batch = {
                    k: v.to(self.accelerator.device, non_blocking=True) if torch.is_tensor(v) else v
                    for k, v in batch.items()
                }
                seed_step(self.seed, self.step * accumulation + i, self.accelerator.process_index)
                yield batch | labelled | {"step": self.step}

    def share_of_labelled(self, batches: list[dict]) -> dict[str, Tensor]:
        """How many samples of an optimizer step, on all ranks, have actions, how many have latent actions, and of how
        many the point is known, for each of its batches: the counts by which `hlrp.transformer.masked_mean` is exact."""
        counts = {}
        if "action_is_pad" in batches[0]:
            counts["num_labelled"] = sum((~batch["action_is_pad"]).any(1).sum() for batch in batches)
        if "latent_is_pad" in batches[0]:
            counts["num_latent"] = sum((~batch["latent_is_pad"]).any(1).sum() for batch in batches)
        if self.settings.get("point_weight"):  # a batch may have no point at all, and not so on each rank
            points = [batch["point"] for batch in batches if "point" in batch]
            counts["num_points"] = torch.cat([torch.zeros(0, 2), *points]).isfinite().all(1).sum()
        for name, count in counts.items():
            count = count.to(self.accelerator.device, torch.float32)
            counts[name] = self.accelerator.reduce(count, "mean") / len(batches)
        return counts

    def advance(self, loss: Tensor, grad_norm: Tensor) -> int:
        """Counts an optimizer step and returns its number. Raises FloatingPointError for a non-finite loss or
        gradient, naming the step and what the batch was made of."""
        self.step += 1
        self.watchdog.begins(f"has done step {self.step}, and no other")
        sound = torch.isfinite(loss.detach() + full(grad_norm))
        self.first_fault = torch.where(sound, self.first_fault, self.first_fault.clamp(max=self.step))
        if self.bar is not None:
            self.bar.update()
        if self.step % self.check_freq == 0 or self.step == self.steps:
            self.refuse_faults()
        return self.step

    def refuse_faults(self) -> None:
        first = self.accelerator.reduce(self.first_fault, "min") if dist.is_initialized() else self.first_fault
        if math.isinf(first := float(first)):
            self.intake.seen.clear()
            return
        mine = float(self.first_fault) == first
        sources = sorted(set(self.intake.seen.get(int(first), [])))
        raise FloatingPointError(
            f"step {int(first)}: the loss or its gradient is not finite"
            + (f"; the batch held {', '.join(sources[:16])}" if mine else "; the batch of another rank is at fault")
            + f". The last sound checkpoint is {last_checkpoint(self.output_dir)}; a lower --lr or --grad-clip may help"
        )

    def must_stop(self) -> bool:
        """True on all ranks at the same step, once any has received SIGTERM or SIGUSR1."""
        if self.step % self.check_freq:
            return False
        if not dist.is_initialized():
            return bool(self.stop_signal)
        flag = torch.tensor(self.stop_signal, device=self.accelerator.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def log(self, split: str, values: dict[str, float | Tensor], step: int) -> None:
        """Means over ranks of training scalars, to metrics.jsonl, the terminal, and TensorBoard or W&B if asked."""
        if split != "train":
            self.restart_clock()  # validation takes no part in the speed of training
        else:
            names = [name for name, value in values.items() if torch.is_tensor(value)]
            means = torch.stack([full(values[name]).detach().float() for name in names])
            means = self.accelerator.reduce(means, "mean").tolist()
            self.tell_stragglers()
            values = values | dict(zip(names, means, strict=True)) | self.speed(step)
            if self.intake.num_broken:
                values["broken"] = self.intake.num_broken
        if not self.accelerator.is_main_process:
            return
        self.metrics.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self.metrics.flush()
        self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step)
        if split == "train":
            rate, wait = values["samples_per_s"], values["data_wait"]
            shown = f"loss {values['loss']:.4f}  {rate:.0f} samples/s  data {wait:.0%}"
            if self.bar is not None:
                self.bar.set_postfix_str(shown)
            else:
                eta = timedelta(seconds=round(values["eta_s"]))
                self.print(f"step {step}/{self.steps}  {shown}  lr {values['lr']:.1e}  eta {eta}")

    def show(self, files: Iterable[Path], step: int) -> None:
        """Pictures and videos of a step, to W&B if asked: by the names of their files, without the step."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                import wandb

                media = {}
                for file in sorted(files):
                    name = str(file.relative_to(self.output_dir).with_suffix(""))
                    name = name.replace(f"/step_{step:06d}", "").removesuffix(f"_{step:06d}")
                    is_video = file.suffix == ".mp4"
                    media[name] = wandb.Video(str(file), format="mp4") if is_video else wandb.Image(str(file))
                tracker.tracker.log(media, step=step)

    def speed(self, step: int) -> dict[str, float]:
        """Samples per second of all ranks, and the share of time that training waited for data, since the last call."""
        now = time.monotonic()
        elapsed, rate = now - self.since, self.samples * self.accelerator.num_processes / (now - self.since)
        speed = {
            "samples_per_s": rate,
            "data_wait": self.waited / elapsed,
            "eta_s": (self.steps - step) * self.samples_per_step / rate,
        }
        self.restart_clock()
        return speed

    def tell_stragglers(self) -> None:
        """Names the ranks that others wait for, by what each needs in a step before they meet."""
        if self.stopwatch is not None:
            steps = self.samples * self.accelerator.num_processes / self.samples_per_step
            mine = torch.tensor([[self.waited, self.stopwatch.read()]], device=self.accelerator.device)
            if line := stragglers(self.accelerator.gather(mine).cpu() / steps):
                self.print(line)

    def restart_clock(self) -> None:
        """Speed counts from here: what came before was no training."""
        self.waited, self.samples, self.since = 0.0, 0, time.monotonic()
        if self.stopwatch is not None:
            self.stopwatch.spans.clear()

    @property
    def samples_per_step(self) -> int:
        """Samples of all ranks in one optimizer step."""
        per_rank = self.settings["batch_size"] * self.accelerator.gradient_accumulation_steps
        return per_rank * self.accelerator.num_processes

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        average: AveragedModel | None = None,
        write: Callable[..., None] | None = None,
        **provenance,
    ) -> None:
        """Writes checkpoints/<step> whole, then points checkpoints/last at it.

        average: of the model, which is then what is saved. write(folder, weights, **provenance): saves a model, by
        default its own `save_pretrained`.
        """
        self.refuse_faults()
        folder = self.output_dir / "checkpoints" / f"{self.step:06d}"
        model, is_main = self.accelerator.unwrap_model(model), self.accelerator.is_main_process
        weights = full_copies(model.state_dict(), is_main)
        state = full_copies(moments(optimizer), is_main)
        turns = self.intake.next_turns(self.accelerator.device)
        if is_main and not folder.is_dir():
            with whole_folder(folder) as partial:
                (partial / "pretrained_model").mkdir()
                (partial / "training_state").mkdir()
                provenance |= {"step": self.step, "report": self.report}
                if average is not None:
                    save_tensors(partial / "training_state" / WEIGHTS, weights)
                    weights = average.module.state_dict()
                (write or model.save_pretrained)(partial / "pretrained_model", weights, **provenance)
                save_optimizer(partial / "training_state", optimizer, state)
                step = {"step": self.step, "report": self.report, "turns": turns}
                write_json(partial / "training_state" / "training_step.json", step)
            link_last(folder)
        wait_for_all()

    def interrupt(self) -> None:
        """Ends the process with the exit code that asks for the same command again."""
        self.finish("interrupted")
        self.print(f"stopped by a signal at step {self.step}, saved; the same command goes on")
        sys.exit(INTERRUPTED)

    def finish(self, state: str = "done") -> None:
        if self.accelerator.is_main_process:
            write_json(self.output_dir / "run.json", self.record | {"state": state, "step": self.step})
        self.close()
        self.accelerator.end_training()

    def close(self, exit_code: int = 0) -> None:
        """Ends what watches, logs and holds the folder. exit_code: for W&B."""
        self.is_over = True
        self.watchdog.stopped.set()
        for number, handler in self.handlers.items():  # a further warning is not to kill what is about to end
            signal.signal(number, handler if number == signal.SIGINT else signal.SIG_IGN)
        if not self.accelerator.is_main_process:
            return
        self.metrics.close()
        self.lock.close()
        if self.bar is not None:
            self.bar.close()
        for tracker in self.accelerator.trackers if exit_code else ():
            if tracker.name == "wandb":
                tracker.tracker.finish(exit_code=exit_code)
            else:
                tracker.finish()

    def print(self, text: str) -> None:
        """One line above the progress bar, from the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)
