"""train_laq.py as its users run it, on the built-in world."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from toys import Waits, assert_equal_to_the_bit, waits_of_ordinary_steps, weights

import train_laq
from hlrp.laq import LAQ, LAQConfig
from hlrp.metrics import code_health
from hlrp.training import Run

SCRIPT = Path(train_laq.__file__)
SETTINGS = {
    "data": ("world:default?episodes=12", "world:human?episodes=6@0.5"),
    "val_samples": 16,
    "steps": 12,
    "batch_size": 4,
    "warmup_steps": 2,
    "num_workers": 0,
    "log_freq": 2,
    "eval_freq": 12,
    "save_freq": 3,
    "buckets": ("hands: embodiment=1",),
    "pictures": ("reconstructions", "sources:all", "actions:hands"),
}
MODEL = {
    "image_size": 32,
    "patch_size": 8,
    "codebook_size": 8,
    "num_tokens": 4,
    "quantizer": "vq-ema",
}  # a quantizer with state


pytestmark = pytest.mark.usefixtures("fresh_process")


def train(output_dir, model=None, **settings):
    model = LAQConfig(**MODEL | (model or {}))
    train_laq.main(train_laq.Args(**SETTINGS | settings, model=model, output_dir=output_dir))


def command(output_dir, num_processes=None, **settings) -> list[str]:
    """num_processes: below a launcher, where it is given."""
    flags = SETTINGS | MODEL | settings | {"output_dir": output_dir}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    launch = launch if num_processes else []
    values = [
        [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [str(value)])]
        for name, value in flags.items()
    ]
    return [sys.executable, *launch, str(SCRIPT), *itertools.chain(*values)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, by the command line."""
    output_dir = tmp_path_factory.mktemp("whole")
    subprocess.run(command(output_dir), check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"})
    return output_dir


def test_a_run_leaves_checkpoints_log_record_and_pictures(whole):
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [
        *("000003", "000006", "000009", "000012", "last")
    ]
    config = json.loads((whole / "checkpoints/last/pretrained_model/config.json").read_text())
    assert config["step"] == 12 and set(config["report"]) == {"world-default", "world-human"}
    assert LAQ.from_pretrained(whole / "checkpoints/last/pretrained_model").config.delta == 0.2
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "pixels_loss", "lr", "grad_norm", "samples_per_s", "data_wait"} <= set(logged[0])
    assert logged[0]["lr"] == pytest.approx(3e-3)
    record = json.loads((whole / "run.json").read_text())
    assert 0.1 < record["memory_gb"] < 10
    assert record["state"] == "done" and record["settings"]["lr"] == 3e-3 and record["versions"]["torch"]
    drawn = {str(path.relative_to(whole / "grids")) for path in (whole / "grids").rglob("*.png")}
    assert {f"{name}_000012.png" for name in ("reconstructions", "hands/reconstructions", "sources")} <= drawn
    assert "reconstructions_000012.png" in (whole / "grids/index.html").read_text()
    figures = [line for line in lines if line["split"] == "pictures"][-1]
    assert 0 <= figures["all/sources/apart"] <= 1


def test_a_short_run_needs_no_other_flag_and_records_its_intervals(tmp_path, capfd):
    flags = ["--data", "world:clean?episodes=4", "--steps", "4", "--batch-size", "8", "--num-workers", "0"]
    for _ in range(2):  # the same command is the same run
        train_laq.main(tyro.cli(train_laq.Args, args=[*flags, "--output-dir", str(tmp_path)]))
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert [settings[name] for name in ("warmup_steps", "log_freq", "eval_freq", "save_freq")] == [0, 1, 4, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000002", "000004", "last"]
    told = capfd.readouterr().err
    assert "data      world-clean: 3 episodes, " in told and "100% of the samples, 3 episodes with actions\n" in told
    assert "training  4 steps of 8 samples, learning rate 0.003\n" in told and f"folder    {tmp_path}\n" in told
    assert "validation after step 4\n  world-clean\n    error of pixels / error of the first frame" in told
    assert told.index("next      python -m hlrp.probe --latents") > told.index("validation after step 4")
    assert re.search(r"\nmemory    at most \d\.\d GB\n", told)


def test_a_killed_run_continues_to_the_bit(whole, tmp_path):
    kill_until_done(command(tmp_path, num_processes=1), tmp_path, kills=1, seed=0)
    assert_equal_to_the_bit(tmp_path, whole)


def kill_until_done(command, output_dir, kills, seed):
    """Starts a command, kills it with -9 at random moments `kills` times, then lets it finish."""
    moments = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        record = output_dir / "run.json"
        before = record.stat().st_mtime_ns if record.is_file() else 0
        while process.poll() is None and not (record.is_file() and record.stat().st_mtime_ns > before):
            time.sleep(0.01)  # until it trains
        time.sleep(moments.uniform(0, 1.5))
        process.kill()  # the launcher, where there is one, which takes its ranks along
        process.wait()
    subprocess.run(command, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_twenty_kills_change_no_bit(num_processes, tmp_path):
    settings = {"steps": 120, "save_freq": 5, "eval_freq": 40}
    subprocess.run(command(tmp_path / "whole", num_processes, **settings), check=True)
    killed = command(tmp_path / "killed", num_processes, **settings)
    kill_until_done(killed, tmp_path / "killed", kills=20, seed=num_processes)
    assert_equal_to_the_bit(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_asks_for_the_same_command_again(number, whole, tmp_path, monkeypatch):
    advance = Run.advance

    def advance_and_signal(run, *args):
        if run.step == 4:
            os.kill(os.getpid(), number)
        return advance(run, *args)

    monkeypatch.setattr(Run, "advance", advance_and_signal)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == 75
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "interrupted"
    assert (tmp_path / "checkpoints/last").readlink() == Path("000005")
    train(tmp_path)
    assert_equal_to_the_bit(tmp_path, whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12, 12, 12]


def test_a_warning_to_all_processes_of_a_job_stops_it_in_order_and_until_then_nobody_else_trains_there(tmp_path):
    running = subprocess.Popen(command(tmp_path, steps=2000, num_workers=2), start_new_session=True)
    while not (tmp_path / "checkpoints/last").exists():
        assert running.poll() is None
        time.sleep(0.05)
    with pytest.raises(ValueError, match="a process that is alive trains in"):
        train(tmp_path, steps=2000)
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(timeout=60) == 75
    saved = (tmp_path / "checkpoints/last").readlink()
    assert json.loads((tmp_path / "run.json").read_text())["step"] == int(str(saved))


def losses(output_dir) -> list[float]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.mark.slow
def test_two_processes_train_what_one_trains_with_the_batch_of_both(tmp_path):
    settings = {"steps": 4, "log_freq": 1, "eval_freq": 4}
    subprocess.run(command(tmp_path / "two", 2, **settings, quantizer="fsq", batch_size=2), check=True)
    train(tmp_path / "one", {"quantizer": "fsq"}, **settings)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    two, one = (report(tmp_path / name) for name in ("two", "one"))
    for name in ("world-default", "world-human"):
        assert two[name]["pairs"] == one[name]["pairs"] == 16
        assert two[name]["true_over_copy"] == pytest.approx(one[name]["true_over_copy"], rel=1e-2)


def report(output_dir) -> dict:
    return json.loads((output_dir / "checkpoints/last/pretrained_model/config.json").read_text())["report"]


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    model = {"quantizer": "none"}
    train(tmp_path / "large", model, steps=4, log_freq=4, batch_size=4)
    train(tmp_path / "accumulated", model, steps=4, log_freq=4, batch_size=2, grad_accumulation=2, tensorboard=True)
    norms = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"]
        for name in ("accumulated", "large")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert list((tmp_path / "accumulated").rglob("events.out.tfevents.*"))


def test_gradients_are_clipped_when_the_optimizer_steps(tmp_path, monkeypatch):
    from accelerate.optimizer import AcceleratedOptimizer

    norms, step = [], AcceleratedOptimizer.step

    def observed_step(optimizer, *args):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        step(optimizer, *args)

    monkeypatch.setattr(AcceleratedOptimizer, "step", observed_step)
    train(tmp_path, steps=3, grad_clip=1e-3)
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)


def test_a_resume_with_other_settings_names_them(tmp_path):
    train(tmp_path, steps=3)
    with pytest.raises(ValueError, match="batch_size was 4 and is 8; lr was 0.003 and is 0.01"):
        train(tmp_path, steps=3, lr=0.01, batch_size=8, log_freq=1)
    with pytest.raises(ValueError, match="data content was"):
        train(tmp_path, steps=3, data=("world:default?episodes=12&seed=1", "world:human?episodes=6@0.5"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_source(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step [2-9]: .* not finite; the batch held world-default episode"):
        train(tmp_path, lr=1e30, save_freq=100)
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"
    assert not (tmp_path / "checkpoints").exists()


def test_true_actions_supervise_the_share_of_episodes_that_was_asked_for(tmp_path):
    train(tmp_path, {"action_weight": 1.0, "quantizer": "gaussian"}, steps=2, label_fraction=0.25)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["action_loss"] < 100
    found = weights(tmp_path)
    robot, human = found["to_action.weight"]
    assert found["to_action.mean"].shape == (2, 2) and robot.any() and not human.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"warmup_steps": 99}, "warmup_steps=99; expected 0 to steps=12"),
        ({"data": ("film:x",)}, "film:x"),
        ({"label_fraction": 1.5}, "label_fraction=1.5"),
        ({"demonstrations": 0}, "demonstrations=0; expected 1 or more"),
        ({"demonstrations": 1, "label_fraction": 0.5}, "and no --label-fraction beside it"),
        ({"demonstrations": 999}, "demonstrations=999, but world:default.* training episodes of"),
    ],
)
def test_settings_that_no_run_can_have_are_named_before_it_starts(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **settings)
    assert not (tmp_path / "run.json").exists()


def test_help_imports_nothing_heavy():
    heavy = ("lerobot", "transformers", "wandb", "matplotlib", "mujoco", "accelerate")
    script = f"""
import runpy, sys
sys.argv = ["train_laq.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
finally:
    print("imported", [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "imported []" in process.stderr
    for flag in ("--delta", "--quantizer", "--data", "--output-dir", "--num-tokens"):
        assert flag in process.stdout


def test_a_named_size_brings_its_frames_on_the_command_line():
    def model(*flags):
        return tyro.cli(train_laq.Args, args=flags).model.resolved()

    assert (model().image_size, model().patch_size) == (64, 8)
    base = model("--size", "base", "--patch-size", "16")
    assert (base.image_size, base.patch_size) == (256, 16)


@pytest.mark.slow
def test_default_codes_tell_the_actions_of_the_clean_world(tmp_path):
    train(
        tmp_path,
        {"image_size": 64, "quantizer": "fsq"},
        data=("world:clean",),
        val_samples=1024,
        steps=1000,
        batch_size=32,
        warmup_steps=100,
        num_workers=2,
        log_freq=100,
        eval_freq=1000,
        save_freq=1000,
        seed=1,
    )
    figures = report(tmp_path)["world-clean"]
    assert figures["action_r2"] >= 0.8
    assert abs(figures["action_r2_random"]) <= 0.05


def test_an_ordinary_step_waits_for_no_device(tmp_path, monkeypatch):
    with Waits() as waits:
        code_health(torch.tensor([[0], [1]]), codebook_size=2)
    assert any(wait.startswith("_local_scalar_dense at") and "metrics.py" in wait for wait in waits.found)

    train_it = partial(train, tmp_path, pictures=("usage",))
    assert waits_of_ordinary_steps(monkeypatch, train_it) == []
