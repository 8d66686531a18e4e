"""The commands in the README, the docs, the tour and the docstrings: each one's own parser takes it. Nothing is run."""

import ast
import functools
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from hlrp.sources import expand, parse_uri

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_laq", "train_vla", "finetune_policy")
BENCHMARKS = ("bakeoff", "gpu", "shards")  # those that take settings
NOT_OURS = ("hlrp.serve",)  # its flags are LeRobot's
ACCELERATES = "--config_file"  # a leading flag of the files in slurm/


def texts() -> dict[str, str]:
    """The shell commands of each file: in blocks and cells of bash, and indented in the docstring of a module."""
    found = {}
    for file in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        found[file.name] = "\n".join(re.findall(r"^```bash\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL))
    for file in sorted(ROOT.glob("docs/*.ipynb")):
        cells = ["".join(cell["source"]) for cell in json.loads(file.read_text())["cells"]]
        found[file.name] = "\n".join(cell.removeprefix("%%bash\n") for cell in cells if cell.startswith("%%bash\n"))
    for file in sorted(file for folder in ("*.py", "hlrp/*.py", "tests/benchmarks/*.py") for file in ROOT.glob(folder)):
        lines = re.findall(r"^    (.*)$", ast.get_docstring(ast.parse(file.read_text())) or "", re.MULTILINE)
        found[file.name] = "\n".join(line for line in lines if " -m hlrp." in line or ".py" in line)
    return found


def commands(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """The module and the arguments of each of our commands in a text of shell.

    `.venv/bin/python train_laq.py --lr 1` -> ("train_laq", ("--lr", "1")). A variable stands for 0.
    """
    found = []
    line = ""
    for part in re.sub(r"\$\w+", "0", text.replace("\\\n", " ").replace(" ...", "")).splitlines():
        line += part
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation goes on in the next line
            line += "\n"
            continue
        line = ""
        while words:  # what stands before && is a command of its own
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            for i, word in enumerate(command):
                name, kind = Path(word).stem, Path(word).suffix
                if word == "--wrap":  # of sbatch: a command in one word
                    found += commands(command[i + 1])
                    break
                if word == "-m" and command[i + 1].startswith("hlrp."):
                    found.append((command[i + 1], tuple(command[i + 2 :])))
                    break
                if word.startswith("tests/benchmarks/") and name in BENCHMARKS:
                    found.append((f"benchmarks.{name}", tuple(command[i + 1 :])))
                    break
                if name in SCRIPTS and kind in (".py", ".sbatch"):
                    rest = command[i + 1 :]
                    found.append((name, tuple(rest[2:] if rest[:1] == [ACCELERATES] else rest)))
                    break
    assert not line, f"no closing quotation: {line}"
    return found


def parsed(module: str, argv: tuple[str, ...]) -> list:
    """What the command line of a module makes of these arguments, by the code that the module runs as a command.

    Its `main` is replaced by one that keeps the settings. Raises SystemExit where an argument is refused.
    """
    source = importlib.import_module(module)
    *_, last = ast.parse(Path(source.__file__).read_text()).body
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    kept: list = []
    names = vars(source) | {"main": kept.append, "tell_mistakes": lambda: None}
    if "render" in names:
        names["render"] = functools.wraps(source.render)(lambda **settings: kept.append(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *argv])
        try:
            exec(compile(ast.Module(last.body, []), module, "exec"), names)
        except SystemExit as end:
            if end.code:
                raise
    return kept


FOUND = {
    (file, *command): None for file, text in texts().items() for command in commands(text) if command[0] not in NOT_OURS
}


@pytest.mark.parametrize(("file", "module", "argv"), FOUND, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_command_is_taken_by_its_own_parser(file, module, argv):
    (args,) = parsed(module, argv)
    if module in SCRIPTS:
        args.resolved()  # which checks values
    if isinstance(data := getattr(args, "data", ()), tuple):
        for uri in expand(data):
            parse_uri(uri)
    if module == "hlrp.curve":
        for script, flags in zip(SCRIPTS, (args.laq_flags, args.vla_flags, args.policy_flags), strict=True):
            assert len(parsed(script, tuple(shlex.split(flags)))) == 1


def test_the_commands_of_every_text_are_found():
    files = {file for file, *_ in FOUND}
    assert files >= {*"README.md data.md stage1.md stage2.md stage3.md judging.md slurm.md probe.py".split()}
    assert {module for _, module, _ in FOUND} >= {*SCRIPTS, "hlrp.shards", "hlrp.curve", "hlrp.label", "hlrp.rollout"}
    text = "a && .venv/bin/python train_laq.py --lr 1 \\\n --steps 2  # why\nsbatch --wrap 'python -m hlrp.x -y'\n"
    text += "python -m hlrp.z 'a\nb'  # a quotation over two lines\n"
    text += "sbatch --nodes=2 slurm/train_vla.sbatch --config_file slurm/fsdp.yaml --lr 1"
    expected = [("train_laq", ("--lr", "1", "--steps", "2")), ("hlrp.x", ("-y",))]
    expected += [("hlrp.z", ("a\nb",)), ("train_vla", ("--lr", "1"))]
    assert commands(text) == expected


@pytest.mark.parametrize(
    ("module", "argv"),
    [("train_laq", ("--learning-rate", "1")), ("hlrp.metaworld", ("--episode", "x")), ("hlrp.runs", ("--sort",))],
)
def test_a_flag_that_is_gone_or_a_value_that_does_not_fit_is_refused(module, argv, capsys):
    with pytest.raises(SystemExit):
        parsed(module, argv)


def test_the_table_of_layers_has_each_module_once_and_imports_point_up_it():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (?:leaves|models|data|judgement|runs|edge) \| (.+) \|$", text, re.MULTILINE)
    layer = {name: i for i, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(
        path.stem for path in ROOT.glob("hlrp/*.py") if not path.stem.startswith("__")
    )
    downward = []
    for name in layer:
        lines = (ROOT / "hlrp" / f"{name}.py").read_text().splitlines()
        imported = {found[1] for line in lines if (found := re.match(r"from hlrp\.(\w+) import", line))}
        downward += [(name, other) for other in imported if layer[other] > layer[name]]
    assert not downward
