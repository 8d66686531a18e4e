"""The list of commands: python -m hlrp"""

import ast
from pathlib import Path

LIBRARY = Path(__file__).parent
SCRIPTS = ("train_laq.py", "train_vla.py", "finetune_policy.py")


def commands() -> dict[str, str]:
    """How each script and command is called, and the first line of what it says of itself."""
    calls = {f"python {name}": LIBRARY.parent / name for name in SCRIPTS}
    modules = [path for path in sorted(LIBRARY.glob("*.py")) if not path.stem.startswith("_")]
    is_command = {path: '\nif __name__ == "__main__":' in path.read_text() for path in modules}
    calls |= {f"python -m hlrp.{path.stem}": path for path in modules if is_command[path]}
    docstrings = {call: ast.get_docstring(ast.parse(path.read_text())) or "" for call, path in calls.items()}
    return {call: text.partition("\n")[0] for call, text in docstrings.items()}


if __name__ == "__main__":
    for call, line in commands().items():
        print(f"{call:25}  {line}")
    print("\n--help tells the settings of each.")
