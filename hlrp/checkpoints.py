"""Checkpoints: config.json + model.safetensors, written whole or not at all, read strictly, without pickle.

OUTPUT_DIR/run.lock                          held while a process trains there
OUTPUT_DIR/checkpoints/STEP/pretrained_model config.json, model.safetensors
OUTPUT_DIR/checkpoints/STEP/training_state   what a resume needs
OUTPUT_DIR/checkpoints/last                  link to the newest STEP
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
STEP = "training_state/training_step.json"  # every checkpoint from which a run can go on has it
# errors of a file system that does not support a call, as opposed to one where the call fails
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
HASHED = 2**26  # how much of a set of files a hash reads [byte]
# settings that may change between a start and a resume, since the weights do not depend on them
FREE = {"output_dir", "num_workers", "log_freq", "eval_freq", "save_freq", "val_samples", "max_broken", "buckets"}
FREE |= {"pictures", "wandb", "tensorboard", "env", "env_eval_freq", "eval"}


@contextmanager
def whole_folder(folder: Path):
    """Yields an empty folder to write to, and renames it to `folder` once its files are on the disk.

    `folder` must not exist. A process killed at any moment leaves the whole folder, or a `.partial` that the next
    writer removes.
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
    """Flushes a file or a folder to the disk. Some file systems cannot flush folders; these are skipped."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)


def write_json(path: Path, content: dict | list) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def link_last(checkpoint: Path) -> None:
    """Points the link `last` beside a checkpoint at it, in one step. On a file system without links it is a copy."""
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

    weights: the whole state of a model in shards.
    """
    save_tensors(folder / WEIGHTS, model.state_dict() if weights is None else weights)
    write_json(folder / CONFIG, config)


MAKERS = {"laq": "run train_laq.py first, or give --laq", "vla": "run train_vla.py first, or give --policy.vla"}


def load_config(folder: Path | str, kind: str, settings: type | None = None) -> dict:
    """The config of a checkpoint folder, which must be of `kind` (its "type" entry).

    settings: the dataclass of the entry named like the kind.

    Raises ValueError where the folder holds no checkpoint, another kind of model, or unknown settings.
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
        raise ValueError(f"{path} is missing; expected config.json and {WEIGHTS} in a checkpoint")
    loaded, expected = load_file(path), model.state_dict()
    faults = [f"missing {name}" for name in expected if name not in loaded]
    faults += [f"unexpected {name}" for name in loaded if name not in expected]
    faults += [
        f"{name} is {tuple(loaded[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in loaded and loaded[name].shape != expected[name].shape
    ]
    if faults:
        raise ValueError(f"{path} contradicts its {CONFIG}: {'; '.join(faults[:8])} ({len(faults)} faults in all)")
    for name, tensor in expected.items():
        tensor.copy_(loaded[name])


def weights_hash(model: nn.Module, *facts) -> str:
    """A hash (16 hex digits) of facts and of a model's tensors. Names and order of the tensors do not count."""
    tensors = [tensor.cpu().flatten().view(torch.uint8).numpy() for tensor in model.state_dict().values()]
    hashes = sorted(hashlib.sha256(tensor).hexdigest() for tensor in tensors)
    return hashlib.sha256(repr((facts, hashes)).encode()).hexdigest()[:16]


def contents_hash(paths: Sequence[Path | str]) -> str:
    """A hash (16 hex digits) of the contents of files or URLs, in their order. Names and places do not count.

    Files of more than `HASHED` [byte] together are read in blocks that are spread evenly over each file.
    Raises ValueError where a file cannot be read.
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
            with ThreadPoolExecutor(max_workers=8) as threads:  # they wait for the disk at the same time
                digests = list(threads.map(_local_digest, paths, _blocks(sizes)))
    except OSError as error:
        raise ValueError(f"{paths[0]} or another of {len(paths)} files cannot be read: {error}") from error
    return hashlib.sha256(repr((sizes, digests)).encode()).hexdigest()[:16]


def _blocks(sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Begin and end of the blocks to read of each file, for files of these sizes [byte]."""
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


class Frozen[M: nn.Module](nn.Module):
    """A module that never trains and is not saved in checkpoints: it is loaded from files of its own."""

    module: M

    def __init__(self, module: M):
        super().__init__()
        self.module = module.requires_grad_(False).eval()

    def forward(self, *args):
        with torch.no_grad():
            return self.module(*args)

    def train(self, mode: bool = True):
        return super().train(False)

    def state_dict(self, *args, destination: dict | None = None, **kwargs) -> dict:
        return {} if destination is None else destination


def lock(output_dir: Path, patience: float = 5.0):
    """Makes the folder and locks it for as long as this process lives.

    Raises ValueError where another process holds the lock for longer than `patience` [s]: a process whose launcher was
    killed saves and ends within that time. On a file system without locks it logs a warning and goes on.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file, deadline = (output_dir / "run.lock").open("a"), time.monotonic() + patience
    except OSError as error:
        raise ValueError(f"output_dir={output_dir}: {error}; expected a folder that can be written") from error
    while not hold(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if time.monotonic() > deadline:
            raise ValueError(f"a process that is alive trains in output_dir={output_dir}; give another one")
        time.sleep(0.05)
    return file


def hold(file, how: int = fcntl.LOCK_EX) -> bool:
    """Locks an open file for this process, not its children; returns False where another process holds the lock.

    On a file system without locks it logs a warning and returns True.
    """
    try:
        fcntl.lockf(file, how)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning(
            "%s cannot be locked (%s); make sure that no other process works there", file.name, error.strerror
        )
    return True


def check_output_dir(output_dir: Path) -> None:
    """Raises ValueError where no checkpoint can be written to a run folder, or the newest one has no readable step.

    A copy or a download may turn the link `last` into a folder: it gets the name of its step, and `last` is made anew.
    """
    probe = output_dir / "probe"
    try:
        with whole_folder(probe) as partial:
            (partial / "file").write_text("")
        remove(probe)
    except OSError as error:
        raise ValueError(
            f"output_dir={output_dir}: checkpoints are written and renamed, and that fails there ({error.strerror}); "
            "expected a folder on another file system"
        ) from error
    last = output_dir / "checkpoints" / "last"
    if last.is_dir() and not last.is_symlink():
        folder = last.with_name(f"{step_of(last):06d}")
        if not folder.exists():
            last.rename(folder)
    if (checkpoint := last_checkpoint(output_dir)) is not None:
        step_of(checkpoint)
        if not last.exists() or step_of(last) != int(checkpoint.name):
            link_last(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint. Raises ValueError where it cannot be read."""
    try:
        return json.loads((checkpoint / STEP).read_text())["step"]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} holds no readable {STEP}, so no run can go on from it ({error}); "
            "move it away, or give another --output-dir"
        ) from error


def last_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint folder of the highest step, which is whole, since only whole folders get such a name."""
    folders = [path for path in (output_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
    return max(folders, key=lambda path: int(path.name), default=None)


def contents(settings: dict) -> dict[str, str]:
    """For each setting that is a path to weights: a hash of them, of their config and of their tokenizer."""
    hashes = {}
    for name, value in settings.items():
        if not isinstance(value, str) or name in FREE:
            continue
        path = Path(value)
        if path.suffix == ".safetensors" and path.is_file():
            hashes[name] = contents_hash([path])
        elif path.is_dir() and (weights := sorted(path.glob("*.safetensors"))):
            config = json.loads((path / CONFIG).read_text()) if (path / CONFIG).is_file() else {}
            config.pop("data", None)  # a place
            tokenizer = sorted(path.glob("tokenizer*.json"))
            facts = contents_hash([*weights, *tokenizer]) + json.dumps(config, sort_keys=True)
            hashes[name] = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return hashes


def changes(before: dict, now: dict) -> list[str]:
    """The differences between two records of a run that forbid a resume, one line each.

    A record holds the settings, the `contents` of the ones that are paths, and the parts of the data. Data and weights
    are compared by their contents, wherever they lie.
    """
    if "data" not in before:
        return ["it is of an older hlrp, which told data apart by their sizes alone; go on with that one"]
    found = []
    was, new = before["settings"], now["settings"]
    for name in sorted((was | new).keys() - FREE - {"data"}):
        old_content, content = before["contents"].get(name), now["contents"].get(name)
        if old_content and content:
            if old_content != content:
                found.append(f"{name} was {was[name]!r} and is {new[name]!r}, which holds other weights")
        elif was.get(name) != new.get(name):
            found.append(f"{name} was {was.get(name)!r} and is {new.get(name)!r}")
    settings_changed, nothing = bool(found), {"uri": "nothing", "content": "", "clips": "", "count": 0}
    for old, part in zip_longest(before["data"], now["data"], fillvalue=nothing):
        if old["content"] != part["content"]:
            found.append(f"data content was {old['uri']} ({old['content']}) and is {part['uri']} ({part['content']})")
        elif old["count"] != part["count"]:
            found.append(f"{part['uri']} was drawn {old['count']} times in a block and is {part['count']} times")
        elif old["clips"] != part["clips"] and not settings_changed:
            found.append(f"other clips of {part['uri']} are trained on")
    return list(dict.fromkeys(found))


def git_state() -> dict[str, str | bool] | None:
    """Commit of the working directory and whether it has changes; None outside a repository, and without git."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    status = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True)
    return {"commit": head.stdout.strip(), "changed": bool(status.stdout.strip())}
