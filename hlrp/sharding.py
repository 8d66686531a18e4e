"""Models in shards on several ranks: FSDP2 (Zhao et al. 2023, arXiv:2304.11277) behind accelerate's config file."""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hlrp.launch import wait_for_all
from hlrp.running import Codebook


def sharding():
    """The plugin that `accelerate launch --config_file slurm/fsdp.yaml` describes; None for any other launch.

    Raises ValueError for settings of it that nothing here follows.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    from accelerate import FullyShardedDataParallelPlugin

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

    The optimizer is to be built on what this leaves. Of a model in shards, each of the blocks is gathered for as long
    as it computes, and the rest from the start of the forward to the end of the backward pass. bf16: blocks are
    gathered in it, gradients summed in float32, and autocast chooses what computes in which, as under DDP.
    torch shards, since accelerate does so on GPUs alone, and its bf16 rounds activations, gradients and loss.
    """
    plugin = sharding()
    wait_for_all()  # a model loads slowly on some nodes, and what follows has little patience
    if plugin is None:
        return accelerator.prepare_model(model)
    if any(isinstance(module, Codebook) and not module.ema for module in model.modules()):
        raise ValueError(
            "this quantizer restarts its codes in place, which shards do not keep: quantizer=vq-ema or fsq would fit"
        )
    device, is_bf16 = accelerator.device.type, accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy()
    if is_bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device, (accelerator.num_processes,))
    units = [module for module in model.modules() if type(module) in blocks]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    if is_bf16:
        for module in (*units, model):  # validation enters by other methods than the model's forward
            module.forward = torch.autocast(device, torch.bfloat16)(module.forward)
    return model


@contextmanager
def gathered(model: nn.Module):
    """In here each rank holds all of a model that lies in shards, may call any method of it, and waits for no other."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        is_block = unit is not model
        unit.set_reshard_after_forward(is_block and sharding().reshard_after_forward, recurse=False)
        unit.reshard()


def full(tensor: Tensor) -> Tensor:
    """The shards of all ranks, each of which must call it, put together; what is no shard passes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_copies(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The full tensors, gathered one by one, on the CPU of the ranks that keep them."""
    found = ((name, full(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in found if keep}
