"""What hlrp does in the process of `accelerate launch` and torchrun: it leaves out the launcher's own traceback.

A training script has said why it ends; the traceback of the launcher below that says nothing, and hides it. A launcher
imports nothing of a script, but it imports torch, which calls `be_brief` as an entry point of torch.backends (setup.py)
wherever it is imported. In any other process this does nothing.
"""

import sys
from pathlib import Path

LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun"}
SCRIPTS = {"train_laq.py", "train_vla.py", "finetune_policy.py"}


def be_brief() -> None:
    names = {Path(word).name for word in sys.argv}
    if names & LAUNCHERS and names & SCRIPTS:
        sys.excepthook = tell


def tell(kind, error, trace) -> None:
    """In place of sys.excepthook: nothing where each failed process ended by itself, and not of a signal."""
    codes = {
        "CalledProcessError": lambda: [error.returncode],
        "ChildFailedError": lambda: [failure.exitcode for failure in error.failures.values()],
    }
    if kind.__name__ not in codes or min(codes[kind.__name__]()) < 0:
        sys.__excepthook__(kind, error, trace)
