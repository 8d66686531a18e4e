"""Optimizers: AdamW, and Muon beside it; the learning rate of a step; the optimizer's state on the disk."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hlrp.checkpoints import save_tensors, write_json

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic whose slope at 0 is the largest


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal before each step (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon).

    Its updates are scaled to the size of AdamW's, so that both share a learning rate (Liu et al. 2025,
    arXiv:2502.16982, Eq. 4). Matrices of one shape are made orthogonal together.
    """

    def __init__(self, params: list[dict], lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            updates: dict[tuple, list[tuple[nn.Parameter, Tensor]]] = {}  # by shape
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                # a matrix in shards stays by itself
                key = (p.shape, p.device) if type(p.data) is Tensor else (id(p),)
                updates.setdefault(key, []).append((p, p.grad.lerp(buffer, momentum)))  # Nesterov's momentum
            for same in updates.values():
                matrices = [update for _, update in same]
                whole = torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]
                scale = lr * 0.2 * max(same[0][0].shape) ** 0.5
                for (p, _), update in zip(same, orthogonal(whole), strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-scale)


def orthogonal(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """About U V' of each matrix (b, n, m) = U S V', by a Newton-Schulz iteration.

    In bfloat16 on a GPU, where it suffices; in float32 on a CPU, since many have no instructions for bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class MuonAdamW(Optimizer):
    """One optimizer: Muon for the matrices of the hidden layers, AdamW for all other parameters."""

    def __init__(self, matrices: list[dict], others: list[dict], lr: float):
        """matrices, others: parameter groups, each with its weight_decay."""
        self.parts = [Muon(matrices, lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), fused=True)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.link()

    def link(self) -> None:
        """Lets both parts work on the groups and the state of this optimizer."""
        muon, adamw = self.parts
        num_muon = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:num_muon], self.param_groups[num_muon:]
        muon.state = adamw.state = self.state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.link()

    def step(self, closure=None) -> None:
        assert closure is None
        for part in self.parts:
            part.step()


def make_optimizer(
    name: str, model: nn.Module, hidden: set[type[nn.Module]], lr: float, weight_decay: float
) -> Optimizer:
    """The optimizer of that name: "muon" or "adamw".

    hidden: classes of the modules whose matrices, except embeddings, Muon trains. Matrices have weight decay; biases,
    gains and single vectors have none. Raises ValueError for another name, and where Muon has nothing to train.
    """
    if name == "adamw":
        groups = parameter_groups(model, weight_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    if name != "muon":
        raise ValueError(f"optimizer={name!r}; expected one of muon, adamw")
    layers = [module for module in model.modules() if isinstance(module, tuple(hidden))]  # in shards: subclasses
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [p for layer in layers for p in layer.parameters() if id(p) not in embeddings]
    matrices = [p for p in parameters if p.requires_grad and p.ndim == 2]
    if not matrices:
        raise ValueError("optimizer='muon', but no matrix of the hidden layers trains; expected optimizer='adamw'")
    others = parameter_groups(model, weight_decay, without=matrices)
    return MuonAdamW([{"params": matrices, "weight_decay": weight_decay}], others, lr)


def parameter_groups(model: nn.Module, weight_decay: float, without: Sequence[nn.Parameter] = ()) -> list[dict]:
    """Two groups: matrices, with weight decay, and biases, gains and single vectors, without."""
    left_out = {id(p) for p in without}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def cosine_lr(step: int, lr: float, warmup_steps: int, steps: int, final_ratio: float = 0.1) -> float:
    """Learning rate of an optimizer step (from 0): it rises linearly to lr, then falls to a tenth by a cosine."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return lr * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def moments(optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimizer's state: "number of the parameter/name" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{name}": value for i, values in state.items() for name, value in values.items()}


def save_optimizer(folder: Path, optimizer: Optimizer, tensors: dict[str, Tensor] | None = None) -> None:
    """Writes optimizer_state.safetensors and optimizer_param_groups.json, LeRobot's layout.

    tensors: the whole `moments` of an optimizer in shards.
    """
    save_tensors(folder / "optimizer_state.safetensors", moments(optimizer) if tensors is None else tensors)
    groups = optimizer.state_dict()["param_groups"]
    write_json(folder / "optimizer_param_groups.json", {"param_groups": groups})


def load_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Loads what `save_optimizer` wrote. Raises ValueError where it belongs to other parameters."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer_state.safetensors").items():
        index, name = key.split("/")
        owner = parameters.get(int(index))
        if owner is not None and hasattr(owner, "device_mesh") and tensor.shape == owner.shape:
            from torch.distributed.tensor import distribute_tensor

            tensor = distribute_tensor(tensor, owner.device_mesh, owner.placements, src_data_rank=None)
        state.setdefault(int(index), {})[name] = tensor
    groups = json.loads((folder / "optimizer_param_groups.json").read_text())["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
