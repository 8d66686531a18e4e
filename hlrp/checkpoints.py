"""Checkpoint folders: config.json + model.safetensors, written whole or not at all, read strictly, no pickle."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
STEP = "training_state/training_step.json"  # in a checkpoint that a run can go on from
# of a file system that lacks what was asked for, other than one that fails
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
HASHED = 2**26  # of a set of files, the part that its hash reads [byte]


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
    """Flushes a file or a folder to the disk; some file systems do so for files alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
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
    """Points the link `last` beside a checkpoint at it, in one step. Without links, `last` is a copy."""
    last, partial = checkpoint.with_name("last"), checkpoint.with_name("last.partial")
    remove(partial)
    try:
        partial.symlink_to(checkpoint.name)
    except OSError as error:
        logger.warning("no link in %s (%s): %s is a copy of the checkpoint", last.parent, error.strerror, last.name)
        shutil.copytree(checkpoint, partial)
    if not last.is_symlink() or not partial.is_symlink():
        remove(last)
    partial.replace(last)


def remove(path: Path) -> None:
    """Removes a link, a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def save_pretrained(folder: Path, model: nn.Module, config: dict, weights: dict[str, Tensor] | None = None) -> None:
    """Writes a model and the config that rebuilds it. The folder must exist.

    weights: its state in full, where the model lies in shards.
    """
    save_tensors(folder / WEIGHTS, model.state_dict() if weights is None else weights)
    write_json(folder / CONFIG, config)


MAKERS = {"laq": "run train_laq.py first, or give --laq", "vla": "run train_vla.py first, or give --policy.vla"}


def load_config(folder: Path | str, kind: str, settings: type | None = None) -> dict:
    """The config of a checkpoint folder, which must be of `kind` (its "type" entry).

    settings: the dataclass that the entry under its kind is of.

    Raises ValueError where the folder is none, holds another model, or settings that are not known here.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        inner = Path(folder) / "checkpoints" / "last" / "pretrained_model"
        hint = f"; did you mean {inner}?" if (inner / CONFIG).is_file() else f"; {MAKERS[kind]}"
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


def contents_hash(paths: Sequence[Path | str]) -> str:
    """16 hex digits of what is in some files or URLs, in their order, whatever their names and places.

    All of it is read; of more than `HASHED` [byte] blocks, evenly spread over each file. Raises ValueError for what
    cannot be read.
    """
    paths = [str(path) for path in paths]
    try:
        if any("://" in path for path in paths):
            from fsspec.core import url_to_fs

            files, names = url_to_fs(paths[0])[0], [url_to_fs(path)[1] for path in paths]
            sizes = [files.size(name) for name in names]
            blocks = _blocks(sizes)
            ranges = [(name, *block) for name, found in zip(names, blocks, strict=True) for block in found]
            data = iter(files.cat_ranges(*map(list, zip(*ranges, strict=True)), on_error="raise"))
            digests = [hashlib.sha256(b"".join(next(data) for _ in found)).hexdigest() for found in blocks]
        else:
            sizes = [os.stat(path).st_size for path in paths]
            with ThreadPoolExecutor(max_workers=8) as threads:  # which wait for the disk together
                digests = list(threads.map(_local_digest, paths, _blocks(sizes)))
    except OSError as error:
        raise ValueError(f"{paths[0]} or another of {len(paths)} files cannot be read: {error}") from error
    return hashlib.sha256(repr((sizes, digests)).encode()).hexdigest()[:16]


def _blocks(sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Begin and end of what is read of each file of these sizes [byte]."""
    share = HASHED / max(1, sum(sizes))
    block = min(max(HASHED // (3 * max(1, len(sizes))), 2**12), 2**16)
    blocks = []
    for size in sizes:
        count = max(3, round(size * share / block)) | 1  # odd: the middle is among them
        if share >= 1 or count * block >= size:
            blocks.append([(0, size)])
        else:
            starts = [(size - block) * i // (count - 1) for i in range(count)]
            blocks.append([(start, start + block) for start in starts])
    return blocks


def _local_digest(path: str, blocks: Sequence[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for start, end in blocks:
            file.seek(start)
            while start < end and (data := file.read(min(end - start, 2**20))):
                digest.update(data)
                start += len(data)
    return digest.hexdigest()


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
