import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hlrp import distributed as launch
from hlrp.checkpoints import last_checkpoint, save_tensors, step_of, write_json
from hlrp.training import INTERRUPTED, Run, RunArgs, seed_step


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    def draw(*key):
        seed_step(*key)
        return torch.rand(1).item()

    draws = [draw(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len(set(draws)) == 4 and draw(0, 0, 0) == draws[0]


def test_the_last_checkpoint_is_the_highest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for name in ("000900", "001000", "001100.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "last").symlink_to("000900")  # killed between the folder and its link
    assert last_checkpoint(tmp_path).name == "001000"


SETTINGS = {"steps": 9, "num_workers": 0, "max_broken": 0, "batch_size": 2, "lr": 0.1}
PART = {"name": "videos-a", "uri": "videos:/old/a", "content": "c0", "clips": "k0", "count": 1}


def mixture_of(**part):
    return SimpleNamespace(parts=[PART | part], shares=lambda num_samples: {})


@contextmanager
def begin(output_dir, part=None, **settings):
    """A run that has started: what a script does up to its model."""
    args = RunArgs(output_dir=output_dir, **SETTINGS).resolved()
    with Run(args) as run:
        run.start(SETTINGS | settings, mixture_of(**part or {}))
        yield run


def record(output_dir) -> dict:
    return json.loads((output_dir / "run.json").read_text())


def save(run, model):
    optimizer = torch.optim.AdamW(model.parameters())
    run.save(model, optimizer, write=lambda folder, weights, **_: save_tensors(folder / "model.safetensors", weights))


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt(), SystemExit(3)])
def test_run_json_says_how_a_run_ended_whatever_happened(error, tmp_path):
    with pytest.raises(type(error)), begin(tmp_path) as run:
        run.step = 4
        raise error
    found = record(tmp_path)
    assert found["state"] == "failed" and type(error).__name__ in found["reason"] and str(error) in found["reason"]
    assert found["step"] == 4
    with begin(tmp_path):
        assert record(tmp_path)["state"] == "running"
    ended = record(tmp_path)
    assert ended["state"] == "done" and "reason" not in ended
    with pytest.raises(type(error)), Run(RunArgs(output_dir=tmp_path, **SETTINGS).resolved()):
        raise error  # before the run has taken the folder: what is in it is another run's
    assert record(tmp_path) == ended


@pytest.mark.usefixtures("fresh_process")
def test_a_run_that_a_signal_stopped_saves_says_so_and_asks_for_the_same_command(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    with pytest.raises(SystemExit) as stop, begin(tmp_path) as run:
        optimizer = torch.optim.AdamW(model.parameters())
        run.load(model, optimizer)
        batch = {"dataset": ["a"], "place": ["1"], "turns": [], "skipped": []}
        monkeypatch.setattr("hlrp.training.loader", lambda *args, **settings: (dict(batch) for _ in range(9)))
        for _ in run.batches(optimizer):
            assert run.advance(torch.tensor(1.0), torch.tensor(1.0), 0.1, {}) is None
            if run.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if run.must_save():
                save(run, model)
    assert stop.value.code == INTERRUPTED and record(tmp_path)["state"] == "interrupted"
    assert record(tmp_path)["step"] == 3 and step_of(tmp_path / "checkpoints/last") == 3


@pytest.mark.usefixtures("fresh_process")
def test_ctrl_c_asks_to_save_and_a_second_one_ends_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), begin(tmp_path) as run:
        run.has_stepped = True
        os.kill(os.getpid(), signal.SIGINT)
        assert run.must_save() and run.must_stop and "saves and stops" in capfd.readouterr().err
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        os.kill(os.getpid(), signal.SIGINT)  # the launcher passes the first one on
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        os.kill(os.getpid(), signal.SIGINT)
    assert record(tmp_path)["state"] == "failed" and "second Ctrl-C" in record(tmp_path)["reason"]
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.usefixtures("fresh_process")
def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with begin(tmp_path / "run"):
        assert record(tmp_path / "run")["git"] is None


def test_a_launcher_that_is_the_first_process_of_a_container_is_alive(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(launch, "PARENT", 1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    launch.die_with_launcher()
    monkeypatch.setattr(launch, "PARENT", 77)
    with pytest.raises(SystemExit, match="launcher has gone"):
        launch.die_with_launcher()


@pytest.mark.usefixtures("fresh_process")
def test_a_file_system_without_links_locks_and_folder_fsync_trains(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "symlink", unsupported)
    monkeypatch.setattr(fcntl, "lockf", unsupported)
    monkeypatch.setattr(os, "fsync", fsync)
    for last in (2, 4):
        with begin(tmp_path) as run:
            assert run.step == last - 2
            for run.step in (last - 1, last):
                save(run, nn.Linear(2, 2))
        assert step_of(tmp_path / "checkpoints/last") == last
    assert "cannot be locked" in caplog.text and "is a copy" in caplog.text
    assert not list(tmp_path.rglob("*partial*")) and record(tmp_path)["state"] == "done"


@pytest.mark.usefixtures("fresh_process")
def test_a_folder_in_which_nothing_can_be_renamed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "Invalid cross-device link"))
    )
    with (
        pytest.raises(
            ValueError, match="output_dir=.*are written and renamed, and that fails there .*another file system"
        ),
        begin(tmp_path),
    ):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="output_dir=.*file.*expected a folder that can be written"),
        begin(tmp_path / "file"),
    ):
        pass


@pytest.mark.usefixtures("fresh_process")
def test_a_plain_folder_last_is_the_checkpoint_of_its_step_and_one_without_a_state_is_refused(tmp_path):
    with begin(tmp_path / "run") as run:
        for run.step in (1, 2):
            save(run, nn.Linear(2, 2))
    shutil.copytree(tmp_path / "run", tmp_path / "all")  # what links led to
    shutil.copytree(tmp_path / "run", tmp_path / "one", ignore=lambda *_: ["000001", "000002"])
    shutil.copytree(tmp_path / "run", tmp_path / "model", ignore=lambda *_: ["000001", "000002", "training_state"])
    (tmp_path / "run/checkpoints/last").unlink()  # killed between the folder and its link
    for name in ("all", "one", "run"):
        with begin(tmp_path / name) as run:
            assert run.step == 2 and step_of(tmp_path / name / "checkpoints/last") == 2
            run.step = 3
            save(run, nn.Linear(2, 2))
        assert (tmp_path / name / "checkpoints/last").readlink() == Path("000003")
    with (
        pytest.raises(ValueError, match="last holds no readable training_state.*so no run can go on"),
        begin(tmp_path / "model"),
    ):
        pass
    assert (tmp_path / "model/checkpoints/last/pretrained_model/model.safetensors").is_file()


@pytest.mark.usefixtures("fresh_process")
def test_the_same_data_and_weights_at_another_place_resume_and_others_are_named(tmp_path):
    for name in ("laq", "copied", "other"):
        (tmp_path / name).mkdir()
        save_tensors(tmp_path / name / "model.safetensors", {"x": torch.full((3,), float(name == "other"))})
        write_json(tmp_path / name / "config.json", {"type": "laq", "data": [f"videos:{name}"]})
    moved = {"name": "videos-b", "uri": "videos:/new/b"}

    def resume(laq="laq", part=None, **settings):
        return begin(tmp_path / "run", part, laq=str(tmp_path / laq), data=[(PART | (part or {}))["uri"]], **settings)

    with resume() as run:
        run.step, run.intake.reached = 1, {"videos-a": {0: 5}}
        model = nn.Linear(2, 2)
        save(run, model)
    with resume("copied", moved) as run:
        run.load(model, torch.optim.AdamW(model.parameters()))
        assert run.step == 1 and run.intake.turns == {"videos-b": 5}  # where a stream goes on
    for settings, message in [
        ({"laq": "other"}, "laq was .*copied' and is .*other', which holds other weights"),
        (
            {"part": {"content": "c1", "clips": "k1"}},
            r"data content was videos:/new/b \(c0\) and is videos:/old/a \(c1\)",
        ),
        ({"part": {"count": 2}}, "videos:/old/a was drawn 1 times"),
        ({"part": {"clips": "k1"}}, "other clips of videos:/old/a"),
        ({"part": {"clips": "k1"}, "lr": 1.0}, r"other settings \(lr was 0.1 and is 1.0\)"),
    ]:
        with pytest.raises(ValueError, match=message), resume(**settings):
            pass
    old = record(tmp_path / "run")
    del old["data"]
    write_json(tmp_path / "run/run.json", old)
    with pytest.raises(ValueError, match="of an older hlrp"), resume():
        pass


@pytest.mark.parametrize(
    ("flags", "variables", "expected"),
    [
        ({}, {}, ("no", 1)),
        ({}, {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4"}, ("bf16", 4)),
        ({"mixed_precision": "bf16"}, {"MIXED_PRECISION": "no"}, ("bf16", 1)),  # the launcher's default
        ({"grad_accumulation": 4}, {"GRADIENT_ACCUMULATION_STEPS": "4", "DYNAMO_BACKEND": "NO"}, ("no", 4)),
        ({"mixed_precision": "no"}, {"MIXED_PRECISION": "bf16"}, "mixed_precision=no, but the launcher says bf16"),
        ({}, {"MIXED_PRECISION": "fp16"}, "mixed_precision=fp16 of the launcher"),
        (
            {"grad_accumulation": 2},
            {"GRADIENT_ACCUMULATION_STEPS": "4"},
            "grad_accumulation=2, but the launcher says 4",
        ),
        ({}, {"DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend=inductor of the launcher"),
        ({}, {"USE_DEEPSPEED": "true"}, "use_deepspeed of the launcher"),
    ],
)
@pytest.mark.usefixtures("fresh_process")
def test_what_the_launcher_sets_is_taken_and_recorded_or_refused(flags, variables, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    args = RunArgs(output_dir=tmp_path, batch_size=2, **flags).resolved()
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            Run(args)
        return
    with Run(args) as run:
        run.start(args.settings(), mixture_of())
        assert run.samples_per_step == 2 * expected[1]
    settings = record(tmp_path)["settings"]
    assert (settings["mixed_precision"], settings["grad_accumulation"]) == expected


@pytest.mark.parametrize(
    ("steps", "given", "expected"),
    [
        (600, {}, (100, 50, 600, 300)),
        (100_000, {}, (100, 50, 600, 300)),
        (20, {}, (3, 1, 20, 10)),
        (1, {}, (0, 1, 1, 1)),
        (20, {"warmup_steps": 0, "save_freq": 7}, (0, 1, 20, 7)),
    ],
)
def test_intervals_follow_the_number_of_steps_unless_given(steps, given, expected):
    names = ("warmup_steps", "log_freq", "eval_freq", "save_freq")
    args = RunArgs(steps=steps, **given)
    resolved = args.resolved()
    assert tuple(getattr(resolved, name) for name in names) == expected
    assert args == RunArgs(steps=steps, **given)  # nothing is written back
