"""A run of several processes: what the launcher asks for, waiting, models in shards, failures, and a watchdog.

Shards: FSDP2 (Zhao et al. 2023, arXiv:2304.11277), by the config file of accelerate that slurm/fsdp.yaml shows.
"""

import ctypes
import functools
import itertools
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver as server
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hlrp.cli import mistake
from hlrp.quantizers import Codebook

logger = logging.getLogger(__name__)
COLLECTIVE = timedelta(minutes=10)  # ranks that compute must meet within this time, or the run ends
WAIT = timedelta(hours=12)  # how long ranks wait for one that renders, rolls out or writes
PARENT = os.getppid()  # as early as it can be known


def under_launcher() -> bool:
    """Whether accelerate launch or torchrun started this process."""
    return any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))


def choose_threads(num_processes: int) -> None:
    """Sets how many threads compute on a CPU: OMP_NUM_THREADS, or a share of the cores that this process may use.

    A launcher sets OMP_NUM_THREADS to 1 where the user did not, so there that counts as not given."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not given or (under_launcher() and given == "1"):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))


def die_with_launcher() -> None:
    """Asks the kernel to send this process SIGTERM when the launcher that started it dies, for any reason.

    Slurm's SIGUSR1 and kill -9 kill a launcher at once. Its ranks then save and stop; they do not train on.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl") and under_launcher():
        pr_set_pdeathsig = 1
        libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != PARENT:  # a parent of id 1 proves nothing: it is the launcher where that starts a container
            sys.exit("the launcher has gone")


def make_accelerator(args):
    """accelerate's Accelerator for the settings that all scripts share; it uses the CPU where there is no GPU.

    Raises ValueError for settings of the launcher that contradict the script's, or that hlrp does not support.
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
    """The precision of the flag; where the flag is "auto", the launcher's. The launcher's default "no" counts as unset.

    Raises ValueError for settings of the launcher that contradict the flag, or that hlrp does not support.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={launched} of the launcher; expected bf16 or no")
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(f"use_{name.lower()} of the launcher; expected DDP, or FSDP as in slurm/fsdp.yaml")
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        raise ValueError(
            f"dynamo_backend={backend.lower()} of the launcher; expected no, and --compile of the script instead"
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
    """Forward passes per optimizer step, as the flag says; where the flag is 1, its default, as the launcher says."""
    launched = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", flag))
    if flag not in (1, launched):
        raise ValueError(f"grad_accumulation={flag}, but the launcher says {launched}; leave one of them out")
    return launched


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks. By default it returns them to the system and gets them back page by page."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def release_freed_memory() -> None:
    """Makes glibc return freed blocks to the system, so that a long run does not grow by what it has kept of them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process and its device have held at once [GB]."""
    peaks = {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device.type == "cuda":
        peaks["device_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peaks


_waits = itertools.count()  # the number of the next wait, the same on all ranks


def wait_for_all() -> None:
    """Returns once every rank has called it. It waits on the host, so a rank may work longer than `COLLECTIVE`."""
    if dist.is_initialized():
        store, name = dist.distributed_c10d._get_default_store(), f"hlrp/wait/{next(_waits)}"
        if store.add(name, 1) == dist.get_world_size():
            store.set(f"{name}/over", "")
        store.wait([f"{name}/over"], WAIT)


@contextmanager
def first_alone():
    """Runs the body on the first rank, then on the others."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if not is_first:
        wait_for_all()
    yield
    if is_first:
        wait_for_all()


def sharding():
    """The plugin that `accelerate launch --config_file slurm/fsdp.yaml` describes; None for any other launch.

    Raises ValueError for settings of the plugin that hlrp does not support.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version}; expected 2, as in slurm/fsdp.yaml")
    refused = {
        "cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "activation_checkpointing": plugin.activation_checkpointing,  # --gradient-checkpointing is the VLM's own
        "offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    }
    for name in (name for name, is_set in refused.items() if is_set):
        raise ValueError(f"fsdp_{name}=true; expected false, as in slurm/fsdp.yaml")
    return plugin


def distribute(model: nn.Module, blocks: set[type[nn.Module]], accelerator) -> nn.Module:
    """The model on its device: whole on each rank (DDP), or in shards where the launch asks for them (FSDP2).

    Build the optimizer on the parameters of the returned model. In shards, a module of a class in `blocks` is gathered
    while it computes, and the rest from the start of the forward to the end of the backward pass. With bf16, blocks are
    gathered in bf16, gradients are summed in float32, and autocast chooses the precision as under DDP.
    It calls torch's `fully_shard`: accelerate shards on GPUs only, and its bf16 rounds activations, gradients and loss.
    """
    plugin = sharding()
    wait_for_all()  # some nodes load a model slowly, and the collectives below wait only for `COLLECTIVE`
    if plugin is None:
        return accelerator.prepare_model(model)
    if any(isinstance(module, Codebook) and not module.ema for module in model.modules()):
        raise ValueError(
            "this quantizer restarts its codes in place, which shards do not keep; expected quantizer=vq-ema or fsq"
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device, is_bf16 = accelerator.device.type, accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy()
    if is_bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device, (accelerator.num_processes,))
    units = [module for module in model.modules() if type(module) in blocks]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=bool(plugin.reshard_after_forward), mp_policy=policy)
    fully_shard(model, mesh=mesh)
    if is_bf16:
        for module in (*units, model):  # validation calls other methods than the model's forward
            module.forward = torch.autocast(device, torch.bfloat16)(module.forward)
    return model


@contextmanager
def gathered(model: nn.Module):
    """In this context each rank holds all of a model in shards, and may call any of its methods without the others."""
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    plugin = sharding()
    for unit in units:
        is_resharded = unit is not model and plugin is not None and bool(plugin.reshard_after_forward)
        unit.set_reshard_after_forward(is_resharded, recurse=False)
        unit.reshard()


def full(tensor: Tensor) -> Tensor:
    """Gathers a tensor in shards from all ranks, which must all call it; returns any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def full_copies(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gathers tensors one by one onto the CPU. A rank with `keep` false takes part, but gets none."""
    whole = ((name, full(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in whole if keep}


@functools.cache
def fails_first() -> bool:
    """Whether this rank, which fails, is the first one to fail."""
    try:
        return not dist.is_initialized() or dist.distributed_c10d._get_default_store().add("hlrp/failures", 1) == 1
    except (RuntimeError, ValueError):  # the store is gone with the first rank's machine
        return True


def tell_failure(kind, error, trace) -> None:
    """In place of sys.excepthook: the first rank that fails prints the reason; the others, which follow, one line."""
    name = f"rank {dist.get_rank()} on {socket.gethostname()}" if dist.is_initialized() else "a rank"
    is_first = fails_first()
    reason = traceback.format_exception_only(error)[-1].strip()
    if not is_first:
        text = f"{name} stops, since another one has failed ({reason[:80]})"
    elif isinstance(error, dist.DistError) or any(word in reason for word in ("by peer", "gloo", "NCCL")):
        text = f"{name} has lost another one, which failed or was killed, most often for lack of memory: see its output"
        text += f" and its launcher's ({reason})"
    else:
        why = mistake(error) or "".join(traceback.format_exception(error))
        text = f"{name} failed first:\n{why}"
    print(text, file=sys.stderr, flush=True)


class Watchdog:
    """Logs a line once this process has done the same thing for `patience` [s]: what, since when, where in the code.

    It logs again after twice the time, and so on. It ends nothing: the timeout of a collective does.
    faulthandler.dump_traceback_later would not do: it knows neither what a process does nor since when, repeats at one
    interval, and writes to a file of its own, past the log.
    """

    def __init__(self, rank: int, patience: float = 300.0):
        self.name = f"rank {rank} on {socket.gethostname()}"
        self.patience, self.main = patience, threading.get_ident()
        self.stopped = threading.Event()
        self.begins("starts")
        threading.Thread(target=self.watch, daemon=True).start()

    def begins(self, what: str) -> None:
        self.what, self.since, self.next_report = what, time.monotonic(), self.patience

    def watch(self) -> None:
        while not self.stopped.wait(self.patience / 10):
            if (seconds := time.monotonic() - self.since) >= self.next_report:
                self.next_report *= 2
                logger.warning("%s %s since %.0f s: %s", self.name, self.what, seconds, self.where())

    def where(self) -> str:
        """The innermost calls of the thread that trains."""
        calls = traceback.extract_stack(sys._current_frames()[self.main])[-6:]
        return " > ".join(f"{'/'.join(c.filename.split('/')[-2:])}:{c.lineno} {c.name}" for c in calls)


def forkserver() -> ForkServerContext:
    """Processes of environments are forked from a server that has imported what they need: a fork of this process would
    share its threads and graphics. The server starts at the first call, and imports beside what this process does."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["hlrp.envs", "hlrp.rollout"])
    server.ensure_running()
    return context
