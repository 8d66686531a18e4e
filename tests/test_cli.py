"""The command line: what its help says, and how a user's mistake ends."""

import ast
import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro

import finetune_policy
import train_laq
import train_vla
from hlrp.cli import LIBRARY, mistake, report_launch
from hlrp.data import Loader
from hlrp.metaworld import render
from hlrp.quantizers import make_quantizer
from hlrp.transformer import masked_mean

COMMANDS = "curve inverse label probe rollout runs shards".split()
DERIVED = {
    "--action-dim",
    "--action-sources",
    "--feature-dim",
    "--policy.stage2",
    "--policy.device",
    "--policy.optimizer-lr",
}


def test_the_list_of_commands_names_each_with_a_line():
    listed = subprocess.run(
        [sys.executable, "-m", "hlrp"], cwd=LIBRARY.parent, check=True, capture_output=True, text=True
    ).stdout
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in listed.splitlines()[:-2])
    assert {f"python -m hlrp.{name}" for name in COMMANDS} | {"python train_laq.py"} < set(lines)
    assert lines["python train_laq.py"].startswith("Stage 1: ") and "python -m hlrp.cli" not in lines
    readme = (LIBRARY.parent / "README.md").read_text()
    assert not [call for call in lines if call.removeprefix("python ") not in readme]


def help_of(parsed, config=()) -> dict[str, str]:
    """The help of each flag, without its default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # until tyro has another way to a parser
        parser = tyro.extras.get_parser(parsed, config=config)
    names = {action.option_strings[0] if action.option_strings else action.dest: action for action in parser._actions}
    return {
        name: re.sub(r"\s*\((default|required).*", "", action.help or "", flags=re.S) for name, action in names.items()
    }


@pytest.mark.parametrize(
    ("parsed", "config"),
    [
        (train_laq.Args, ()),
        (train_vla.Args, ()),
        (finetune_policy.Args, (tyro.conf.AvoidSubcommands,)),
        (render, ()),
        *((importlib.import_module(f"hlrp.{name}").Args, ()) for name in COMMANDS),
    ],
    ids=["train_laq", "train_vla", "finetune_policy", "metaworld", *COMMANDS],
)
def test_every_flag_has_help_of_its_own_and_derived_values_are_no_flags(parsed, config):
    texts = help_of(parsed, config)
    assert not [name for name, text in texts.items() if len(text) < 8]
    shared = {text: [name for name in texts if texts[name] == text] for text in texts.values()}
    assert not [names for names in shared.values() if len(names) > 1]
    assert not DERIVED & texts.keys()


def test_the_help_of_every_script_and_command_waits_for_no_library_but_torch():
    names = ["train_laq", "train_vla", "finetune_policy", *(f"hlrp.{name}" for name in [*COMMANDS, "metaworld"])]
    slow = {"lerobot.configs", "lerobot.policies", "transformers", "torchvision", "datasets", "matplotlib", "pandas"}
    command = f"import sys, {', '.join(names)}; print(*({slow} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", command], cwd=LIBRARY.parent, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr


def unknown_quantizer(*_):
    make_quantizer("nonsense", 8, 8, 4)


def error_of(act) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011  of any kind
        act()
    return caught.value


class Faulty(torch.utils.data.Dataset):
    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 1

    __getitem__ = __getitems__ = lambda self, index: self.act()


def through_a_builtin():
    exec(compile("int('x')", str(LIBRARY / "x.py"), "exec"))


def through_torch():
    masked_mean(torch.zeros(2), torch.zeros(3, dtype=torch.bool))


def in_a_worker(act):
    return lambda: next(iter(Loader(Faulty(act), batch_size=1, num_workers=1)))


@pytest.mark.parametrize("wrap", [lambda act: act, in_a_worker], ids=["here", "in a worker"])
def test_what_hlrp_raises_is_told_in_its_message_and_what_others_raise_is_a_bug(wrap, monkeypatch):
    monkeypatch.delenv("HLRP_TRACEBACK", raising=False)
    message = mistake(error_of(wrap(unknown_quantizer)))
    assert message == f"Error: {error_of(unknown_quantizer)}"
    assert mistake(error_of(wrap(through_a_builtin))) is None
    assert mistake(error_of(wrap(through_torch))) is None
    assert mistake(ValueError("never raised")) is None
    monkeypatch.setenv("HLRP_TRACEBACK", "1")
    assert mistake(error_of(wrap(unknown_quantizer))) is None


def test_what_the_file_system_says_of_a_file_is_a_mistake_wherever_it_is_raised(tmp_path):
    assert str(tmp_path / "none") in mistake(error_of((tmp_path / "none").read_text))


def test_under_accelerate_launch_a_mistake_is_one_message_and_no_traceback(tmp_path):
    root = LIBRARY.parent
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path], cwd=root, check=True)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{root}", "COLUMNS": "200"}  # where the entry point is found
    mistakes = {
        ("train_laq.py", "--lr", "-1"): "lr=-1.0; expected a positive number",
        ("train_vla.py", "--laq", "nowhere"): "run train_laq.py first, or give --laq",
        ("train_laq.py", "--learning-rate", "1"): "--learning-rate",
    }
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    pipes = {"stderr": subprocess.STDOUT, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*launch, *words], cwd=root, env=env, **pipes) for words in mistakes]
    for process, message in zip(started, mistakes.values(), strict=True):
        output, _ = process.communicate()
        assert message in output and "Traceback" not in output, output
        assert process.returncode == 1


def test_every_process_that_imports_torch_can_afford_to_import_cli():
    tree = ast.parse((LIBRARY / "cli.py").read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert names and {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_launcher_tells_of_a_process_that_did_not_end_by_itself(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "__excepthook__", lambda *error: told.append(error))
    for code in (1, 2, 75, -9):
        error = subprocess.CalledProcessError(code, ["python", "train_laq.py"])
        report_launch(type(error), error, None)
    failed = type("ChildFailedError", (Exception,), {})()
    failed.failures = {0: SimpleNamespace(exitcode=1), 1: SimpleNamespace(exitcode=-15)}
    report_launch(type(failed), failed, None)
    report_launch(KeyError, KeyError(), None)
    assert [error[0].__name__ for error in told] == ["CalledProcessError", "ChildFailedError", "KeyError"]
