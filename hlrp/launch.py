"""What the training scripts do before a run: settings are checked, processes and device are set up by accelerate."""

import ctypes
import functools
import itertools
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from hlrp.cli import mistake

COLLECTIVE = timedelta(minutes=10)  # ranks that compute meet within this time, or the run ends
WAIT = timedelta(hours=12)  # for one rank that renders, rolls out or writes


INTERVALS = {"warmup_steps": (6, 100), "log_freq": (12, 50), "eval_freq": (2, 300), "save_freq": (2, 300)}


def check_loop(args) -> None:
    """Raises ValueError for settings of a training script that no run can have."""
    counts = "steps batch_size grad_accumulation log_freq eval_freq save_freq val_samples".split()
    for name in counts:
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}; expected 1 or more")
    if args.max_broken < 0:
        raise ValueError(f"max_broken={args.max_broken}; expected 0 or more")
    for name in ("lr", "grad_clip", "temperature"):
        if (value := getattr(args, name, None)) is not None and value <= 0:
            raise ValueError(f"{name}={value}; expected a positive number")
    for name in ("label_fraction", "action_free", "ema_decay"):
        if not 0 <= getattr(args, name, 0) <= 1:
            raise ValueError(f"{name}={getattr(args, name)}; expected 0 to 1")
    if (count := args.demonstrations) is not None:
        if count < 1 or getattr(args, "label_fraction", 1) != 1:
            raise ValueError(f"demonstrations={count}; expected 1 or more, and no --label-fraction beside it")
    if not 0 <= args.warmup_steps <= args.steps:
        raise ValueError(f"warmup_steps={args.warmup_steps}; expected 0 to steps={args.steps}")


def set_intervals(args, **others: tuple[int, int]) -> None:
    """Sets each interval that is None to steps // parts, at least 1 (a warm-up: 0) and at most `most`.

    others: (parts, most) where they are not those of `INTERVALS`.
    """
    for name, (parts, most) in (INTERVALS | others).items():
        if getattr(args, name) is None:
            setattr(args, name, min(most, max(args.steps // parts, int(name != "warmup_steps"))))


def keep_freed_memory() -> None:
    """Makes glibc reuse large freed blocks, which it would give back to the system and get again page by page."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


PARENT = os.getppid()  # as early as it can be known


def under_launcher() -> bool:
    """Whether accelerate launch or torchrun started this process."""
    return any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))


def die_with_launcher() -> None:
    """Has the kernel warn this process by SIGTERM when the launcher that started it has died, of whatever.

    A launcher dies at once of Slurm's SIGUSR1 or of kill -9. Its ranks then save and stop, and do not train on.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl") and under_launcher():
        pr_set_pdeathsig = 1
        libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != PARENT:  # that it is process 1 proves nothing: a container may begin with the launcher
            sys.exit("the launcher has gone")


def make_accelerator(args):
    """accelerate's Accelerator for the settings that all scripts share; without a GPU, on the CPU.

    Raises ValueError for settings of the launcher that contradict those of the script, or that nothing here follows.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    torch.set_float32_matmul_precision("high")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision(args.mixed_precision),
        gradient_accumulation_steps=accumulation(args.grad_accumulation),
        log_with=[name for name in ("wandb", "tensorboard") if getattr(args, name)] or None,
        project_dir=args.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=COLLECTIVE),
        ],
    )
    if accelerator.num_processes > 1:
        sys.excepthook = tell_failure
    return accelerator


def precision(flag: str) -> str:
    """That of the flag, or of the launcher where the flag is "auto". The launcher's "no" is its default, and says
    nothing."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={launched} of the launcher; expected bf16 or no")
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(f"use_{name.lower()} of the launcher; expected DDP, or FSDP as in slurm/fsdp.yaml")
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        raise ValueError(
            f"dynamo_backend={backend.lower()} of the launcher; expected no: --compile is the script's own"
        )
    if flag == "no" and launched == "bf16":
        raise ValueError(
            "mixed_precision=no, but the launcher says bf16; leave the flag out, or launch with --mixed_precision no"
        )
    if flag != "auto":
        return flag
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    return "bf16" if on_gpu else launched


def accumulation(flag: int) -> int:
    """Forward passes per optimizer step: of the flag, or of the launcher where the flag is 1, its default."""
    launched = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", flag))
    if flag not in (1, launched):
        raise ValueError(f"grad_accumulation={flag}, but the launcher says {launched}; leave one of them out")
    return launched


_waits = itertools.count()


def wait_for_all() -> None:
    """Returns once every rank is here. It waits on the host, so that the work of one may outlast any collective."""
    if dist.is_initialized():
        store, name = dist.distributed_c10d._get_default_store(), f"hlrp/wait/{next(_waits)}"
        if store.add(name, 1) == dist.get_world_size():
            store.set(f"{name}/over", "")
        store.wait([f"{name}/over"], WAIT)


@contextmanager
def first_alone():
    """The body runs on the first rank, and then on the others."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if not is_first:
        wait_for_all()
    yield
    if is_first:
        wait_for_all()


_open_runs: list[ExitStack] = []


def ends_its_run(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a function that makes a `hlrp.training.Run`, so that run.json says how the run ended, whatever happens."""

    @functools.wraps(main)
    def wrapped(*args, **settings) -> None:
        with ExitStack() as runs:
            _open_runs.append(runs)
            runs.callback(_open_runs.remove, runs)
            return main(*args, **settings)

    return wrapped


def watch_over(run) -> None:
    """Has the innermost function that `ends_its_run` wraps end a run."""
    if _open_runs:
        _open_runs[-1].push(run)


@functools.cache
def fails_first() -> bool:
    """Called by a rank that fails: whether it is the first one."""
    try:
        return not dist.is_initialized() or dist.distributed_c10d._get_default_store().add("hlrp/failures", 1) == 1
    except (RuntimeError, ValueError):  # it went with the first rank's machine
        return True


def tell_failure(kind, error, trace) -> None:
    """In place of sys.excepthook: the first rank that fails says why, the others, which then fail too, just that."""
    name = f"rank {dist.get_rank()} on {socket.gethostname()}" if dist.is_initialized() else "a rank"
    is_first = fails_first()
    reason = traceback.format_exception_only(error)[-1].strip()
    if not is_first:
        text = f"{name} stops, since another one has failed ({reason[:80]})"
    elif isinstance(error, dist.DistError) or any(word in reason for word in ("by peer", "gloo", "NCCL")):
        text = f"{name} has lost another one, which failed, or was killed, most often for want of memory: see its lines"
        text += f" and those of its launcher ({reason})"
    else:
        why = mistake(error) or "".join(traceback.format_exception(error))
        text = f"{name} failed first:\n{why}"
    print(text, file=sys.stderr, flush=True)
