"""The folder of a run: who holds it, what it was begun with, its last checkpoint, and the code that writes it."""

import errno
import fcntl
import hashlib
import json
import logging
import subprocess
import time
from itertools import zip_longest
from pathlib import Path

from hlrp.checkpoints import CONFIG, STEP, UNSUPPORTED, contents_hash, link_last, remove, whole_folder

logger = logging.getLogger(__name__)
FREE = {  # settings that may change between a start and a resume: the weights do not depend on them
    *(
        "output_dir",
        "num_workers",
        "log_freq",
        "eval_freq",
        "save_freq",
        "val_samples",
        "max_broken",
        "buckets",
        "pictures",
        "wandb",
        "tensorboard",
        "env",
        "env_eval_freq",
        "eval",
    )
}


def lock(output_dir: Path, patience: float = 5.0):
    """Makes the folder and holds it for as long as this process lives.

    Raises ValueError where another process holds it and goes on for `patience` [s], in which one whose launcher
    was killed has saved and gone. A file system without locks holds nothing, and a warning says so.
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
    """Locks an open file for this process, which no child inherits; False where another one holds it.

    A file system without locks holds nothing, and a warning says so.
    """
    try:
        fcntl.lockf(file, how)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning(
            "%s cannot be locked (%s): see to it that no other process works there", file.name, error.strerror
        )
    return True


def check_output_dir(output_dir: Path) -> None:
    """Raises ValueError where no checkpoint can be written to a run folder, or none of it goes on.

    A plain folder `last`, as a copy or a download leaves it, gets the name of its step, and `last` is made anew.
    """
    probe = output_dir / "probe"
    try:
        with whole_folder(probe) as partial:
            (partial / "file").write_text("")
        remove(probe)
    except OSError as error:
        raise ValueError(
            f"output_dir={output_dir}: no folder can be written and renamed there ({error.strerror}), "
            "as every checkpoint is; expected a folder on another file system"
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
    """Raises ValueError where no run can go on from a checkpoint."""
    try:
        return json.loads((checkpoint / STEP).read_text())["step"]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} holds no readable {STEP}, so no run can go on from it ({error}); "
            "move it away, or give another --output-dir"
        ) from error


def last_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint folder of the highest step; each that has its name is whole."""
    folders = [path for path in (output_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
    return max(folders, key=lambda path: int(path.name), default=None)


def contents(settings: dict) -> dict[str, str]:
    """A hash of the weights, and of what says how to use them, for each setting that is the path of some."""
    found = {}
    for name, value in settings.items():
        if not isinstance(value, str) or name in FREE:
            continue
        path = Path(value)
        if path.suffix == ".safetensors" and path.is_file():
            found[name] = contents_hash([path])
        elif path.is_dir() and (weights := sorted(path.glob("*.safetensors"))):
            config = json.loads((path / CONFIG).read_text()) if (path / CONFIG).is_file() else {}
            config.pop("data", None)  # a place
            tokenizer = sorted(path.glob("tokenizer*.json"))
            facts = contents_hash([*weights, *tokenizer]) + json.dumps(config, sort_keys=True)
            found[name] = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return found


def changes(before: dict, now: dict) -> list[str]:
    """In what two records of a run differ that a resume must keep. Data and weights are compared by what they are,
    wherever they lie.

    record: settings; contents, of those settings that are paths; data, the parts of the mixture.
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
