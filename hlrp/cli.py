"""How a command ends: a user's mistake prints one message, a bug its traceback; the exit code is 1 for both. And the
type of a setting that follows from others.

HLRP_TRACEBACK=1 prints the traceback of a mistake too. torch imports this module wherever it is imported itself (the
entry point in setup.py), so it imports the standard library alone.
"""

import dis
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

LIBRARY = Path(__file__).resolve().parent
SCRIPTS = {"train_laq.py", "train_vla.py", "finetune_policy.py"}
LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun"}
if TYPE_CHECKING:
    Interval = int
else:
    Interval = int | None  # None on the command line stands for a part of --steps; `RunArgs.resolved` fills it in
NOT_GIVEN: Any = None
MISTAKES = (ValueError, RuntimeError, FloatingPointError, ImportError, OSError)  # what hlrp raises for its user


def tell_mistakes() -> None:
    """From here on, a mistake ends this process with its message alone."""
    sys.excepthook = report


def report(kind, error, trace) -> None:
    """In place of sys.excepthook: prints a mistake's message, or a bug's traceback. Of the ranks that make the same
    mistake together, the first one of a machine prints it."""
    message = mistake(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def mistake(error: BaseException) -> str | None:
    """The message of an error that a user can mend, which hlrp raises itself or the file system; None for a bug."""
    if os.environ.get("HLRP_TRACEBACK", "0") != "0" or not isinstance(error, MISTAKES):
        return None
    if str(error).startswith(f"Caught {type(error).__name__} in DataLoader worker"):
        return mistake_of_worker(str(error), type(error).__name__)
    if isinstance(error, OSError) and error.filename is not None:
        return f"Error: {error}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:  # it was never raised
        return None
    code = trace.tb_frame.f_code
    is_raised = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # by a `raise`, not inside a builtin
    return f"Error: {error}" if is_raised and is_ours(code.co_filename) else None


def mistake_of_worker(text: str, kind: str) -> str | None:
    """The same for an error in a loader process: torch hands over its traceback as text."""
    *_, (file, line) = re.findall(r'^ *File "(.+)", line \d+, in .*\n *(.*)', text, re.MULTILINE)
    message = text.rsplit(f"\n{kind}: ", 1)[-1].strip()
    return f"Error: {message}" if line.startswith("raise ") and is_ours(file) else None


def is_ours(file: str) -> bool:
    path = Path(file).resolve()
    return path.parent == LIBRARY or (path.parent == LIBRARY.parent and path.name in SCRIPTS)


def be_brief() -> None:
    """In the process of a launcher that runs one of our scripts, leaves out the launcher's own traceback.

    The script has said why it ends; the launcher's traceback below says nothing, and hides it. A launcher imports
    nothing of a script, but it imports torch, which calls this function. In any other process it does nothing.
    """
    names = {Path(word).name for word in sys.argv}
    if names & LAUNCHERS and names & SCRIPTS:
        sys.excepthook = report_launch


def report_launch(kind, error, trace) -> None:
    """In place of a launcher's sys.excepthook: prints nothing where each failed process ended by itself, not by a
    signal."""
    codes = {
        "CalledProcessError": lambda: [error.returncode],
        "ChildFailedError": lambda: [failure.exitcode for failure in error.failures.values()],
    }
    if kind.__name__ not in codes or min(codes[kind.__name__]()) < 0:
        sys.__excepthook__(kind, error, trace)
