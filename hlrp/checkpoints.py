"""Checkpoint folders: config.json + model.safetensors, written whole or not at all, read strictly, no pickle."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


@contextmanager
def whole_folder(folder: Path):
    """Yields an empty folder that takes the name `folder`, which must be free, once all of it is on the disk.

    A process killed at any moment leaves the whole folder, or a `.partial` that the next writer removes.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    partial.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once: a reader sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def link_last(checkpoint: Path) -> None:
    """Points the link `last` beside a checkpoint at it, in one step."""
    link = checkpoint.with_name("last.partial")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    link.replace(checkpoint.with_name("last"))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def save_pretrained(folder: Path, model: nn.Module, config: dict, weights: dict[str, Tensor] | None = None) -> None:
    """Writes a model and the config that rebuilds it. The folder must exist.

    weights: its state in full, where the model lies in shards.
    """
    save_tensors(folder / WEIGHTS, model.state_dict() if weights is None else weights)
    write_json(folder / CONFIG, config)


def load_config(folder: Path | str, kind: str, settings: type | None = None) -> dict:
    """The config of a checkpoint folder, which must be of `kind` (its "type" entry).

    settings: the dataclass that the entry under its kind is of.

    Raises ValueError where the folder is none, holds another model, or settings that are not known here.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        inner = Path(folder) / "checkpoints" / "last" / "pretrained_model"
        hint = f"; did you mean {inner}?" if (inner / CONFIG).is_file() else ""
        raise ValueError(f"{folder} holds no {CONFIG}: expected a checkpoint's pretrained_model folder{hint}")
    config = json.loads(path.read_text())
    if config.get("type") != kind:
        raise ValueError(f"{path} is of type {config.get('type')!r}; expected a checkpoint of type {kind!r}")
    if settings is not None and (unknown := set(config[kind]) - {field.name for field in fields(settings)}):
        written = f"it is of hlrp {config['hlrp_version']}, this is {version('lerobot_policy_hlrp')}"
        raise ValueError(f"{path}: unknown settings {', '.join(sorted(unknown))}; {written}")
    return config


def load_weights(folder: Path | str, model: nn.Module) -> None:
    """Loads model.safetensors strictly.

    Raises ValueError that names missing, unexpected and misshapen tensors.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is not whole")
    loaded, expected = load_file(path), model.state_dict()
    faults = [f"missing {name}" for name in expected if name not in loaded]
    faults += [f"unexpected {name}" for name in loaded if name not in expected]
    faults += [
        f"{name} is {tuple(loaded[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in loaded and loaded[name].shape != expected[name].shape
    ]
    if faults:
        raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(faults[:8])} ({len(faults)} faults in all)")
    for name, tensor in expected.items():
        tensor.copy_(loaded[name])


def weights_hash(model: nn.Module, *facts) -> str:
    """16 hex digits of the facts and the tensors, whatever the tensors' names and order."""
    tensors = [tensor.cpu().flatten().view(torch.uint8).numpy() for tensor in model.state_dict().values()]
    hashes = sorted(hashlib.sha256(tensor).hexdigest() for tensor in tensors)
    return hashlib.sha256(repr((facts, hashes)).encode()).hexdigest()[:16]


class Frozen(nn.Module):
    """A module that never trains and lies in no checkpoint: the files that it was loaded from define it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.requires_grad_(False).eval()

    def forward(self, *args):
        with torch.no_grad():
            return self.module(*args)

    def train(self, mode: bool = True):
        return super().train(False)

    def state_dict(self, *args, destination: dict | None = None, **kwargs) -> dict:
        return {} if destination is None else destination
