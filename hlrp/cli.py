"""How a command ends: a user's mistake in one message and exit code 1, a bug in its traceback.

HLRP_TRACEBACK=1 shows the traceback of a mistake too.
"""

import dis
import os
import re
import sys
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent
SCRIPTS = ("train_laq.py", "train_vla.py", "finetune_policy.py")
MISTAKES = (ValueError, RuntimeError, FloatingPointError, ImportError, OSError)  # what hlrp raises for its user


def tell_mistakes() -> None:
    """From here on, what ends this process is told by `tell`."""
    sys.excepthook = tell


def tell(kind, error, trace) -> None:
    """In place of sys.excepthook: the message of a mistake alone, from one of the ranks that make it together."""
    message = mistake(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def mistake(error: BaseException) -> str | None:
    """The message of an error that a user can mend: one that hlrp raises itself, or the file system; None: a bug."""
    if os.environ.get("HLRP_TRACEBACK", "0") != "0" or not isinstance(error, MISTAKES):
        return None
    if str(error).startswith(f"Caught {type(error).__name__} in DataLoader worker"):
        return mistake_of_worker(str(error), type(error).__name__)
    if isinstance(error, OSError) and error.filename is not None:
        return f"Error: {error}"
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    is_raised = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # and not what a builtin complains of
    return f"Error: {error}" if is_raised and is_ours(code.co_filename) else None


def mistake_of_worker(text: str, kind: str) -> str | None:
    """The same of an error in a loader process, of which torch hands over the traceback as text."""
    *_, (file, line) = re.findall(r'^ *File "(.+)", line \d+, in .*\n *(.*)', text, re.MULTILINE)
    message = text.rsplit(f"\n{kind}: ", 1)[-1].strip()
    return f"Error: {message}" if line.startswith("raise ") and is_ours(file) else None


def is_ours(file: str) -> bool:
    path = Path(file).resolve()
    return path.parent == LIBRARY or path.parent == LIBRARY.parent and path.name in SCRIPTS
