"""The folder of a run: who holds it, its last checkpoint, and the code that writes it."""

import fcntl
import subprocess
import time
from pathlib import Path


def lock(output_dir: Path, patience: float = 5.0):
    """Makes the folder and holds it for as long as this process lives.

    Raises ValueError where another process holds it and goes on for `patience` [s], in which one whose launcher
    was killed has saved and gone.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    file, deadline = (output_dir / "run.lock").open("a"), time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: no loader's worker inherits it
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"a process that is alive trains in output_dir={output_dir}; give another one"
                ) from None
            time.sleep(0.05)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint folder of the highest step; each that has its name is whole."""
    folders = [path for path in (output_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
    return max(folders, key=lambda path: int(path.name), default=None)


def git_state() -> dict[str, str | bool] | None:
    """Commit of the working directory and whether it has changes; None outside a repository."""
    root = Path(__file__).parents[1]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    status = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True)
    return {"commit": head.stdout.strip(), "changed": bool(status.stdout.strip())}
