"""train_vla.py on two processes, whole on each (DDP) and in shards (FSDP2), against one process.

As a script it is what the processes run: train_vla.py, with an eye on what each of them holds and gets.
"""

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from toys import FLAGS, one_cpu, rank_of

import train_vla
from hlrp import laq_validation as validation
from hlrp import pictures
from hlrp.distributed import Watchdog, choose_threads, distribute
from hlrp.laq import LAQ, LAQConfig
from hlrp.training import Run
from hlrp.vla import VLA, VLAConfig

ROOT = Path(train_vla.__file__).parent
DATA = ("world:clean?episodes=6", "world:human?episodes=6@0.6")  # with and without actions


@pytest.mark.parametrize(
    ("given", "launched", "threads"),
    [(None, False, 3), ("2", False, 2), ("1", False, 1), ("1", True, 3), ("2", True, 2)],
)
def test_the_threads_that_the_user_gives_are_kept(given, launched, threads, monkeypatch):
    """Six cores, two processes; torch itself reads OMP_NUM_THREADS when it is loaded."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("hlrp.distributed.under_launcher", lambda: launched)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    chosen = [int(given or 6)]
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    choose_threads(num_processes=2)
    assert chosen[-1] == threads


@pytest.mark.parametrize(
    ("script", "given", "spins"),
    [
        ("train_laq.py", {}, "1000"),
        ("train_laq.py", {"GOMP_SPINCOUNT": "70"}, "70"),
        ("train_vla.py", {}, "1000"),
        ("finetune_policy.py", {}, "1000"),
    ],
)
def test_threads_that_wait_leave_their_core_to_others_unless_the_user_says_so(script, given, spins):
    """OpenMP itself tells what it has read, once torch has loaded it."""
    unset = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    variables = unset | {"OMP_DISPLAY_ENV": "verbose"} | given
    command = [sys.executable, ROOT / script, "--help"]
    process = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in process.stderr


def train(folder, name, batch_size):
    train_vla.main(
        train_vla.Args(
            laq=folder / "laq",
            data=DATA,
            val_samples=9,
            model=VLAConfig(head="parallel", action_weight=0.5),
            output_dir=folder / name,
            steps=4,
            batch_size=batch_size,
            warmup_steps=2,
            num_workers=0,
            log_freq=1,
            eval_freq=4,
            save_freq=2,
            pictures=("reconstructions",),
        )
    )


def launch(folder, *names):
    """Trains under these names on two processes; those called ddp and slow in no shards."""
    options = ["--config_file", ROOT / "slurm/fsdp.yaml", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, __file__, folder, *names]
    variables = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, timeout=300, env=os.environ | variables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs ddp, fsdp and slow behind a LAQ whose codes are as random as its weights."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "laq").mkdir()
    torch.manual_seed(0)
    laq = LAQ(LAQConfig(image_size=32, patch_size=8, codebook_size=8, num_tokens=4))
    nn.init.normal_(laq.to_change.weight)
    laq.save_pretrained(folder / "laq", data=DATA, step=0, report=None)
    launch(folder, "ddp", "fsdp", "slow")
    return folder


def logged(output_dir, name) -> list[float]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["split"] == "train"]


def tensors(output_dir) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's state of the last checkpoint."""
    last = output_dir / "checkpoints" / "last"
    weights = load_file(last / "pretrained_model" / "model.safetensors")
    return weights | load_file(last / "training_state" / "optimizer_state.safetensors")


def observed(folder, name) -> list[dict]:
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.usefixtures("fresh_process")
def test_two_processes_train_what_one_trains_however_unevenly_labels_lie(folder):
    train(folder, "one", batch_size=8)
    for name in ("ddp", "fsdp"):
        first, second = (ranks["labelled"] for ranks in observed(folder, name))
        assert len(first) == 4 and any(a != b for a, b in zip(first, second, strict=True))
        for value in ("loss", "action_loss", "grad_norm"):
            assert logged(folder / name, value) == pytest.approx(logged(folder / "one", value), rel=1e-3)
    found, expected = tensors(folder / "fsdp"), tensors(folder / "one")
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    VLA.from_pretrained(folder / "fsdp/checkpoints/last/pretrained_model")


def test_a_rank_holds_its_shard_of_parameters_gradients_and_optimizer_state(folder):
    (whole, _), shards = ([rank["bytes"] for rank in observed(folder, name)] for name in ("ddp", "fsdp"))
    assert max(shards) <= 1.1 / 2 * whole


@pytest.mark.slow
def test_a_killed_run_of_shards_continues_to_the_bit(folder):
    shutil.copytree(folder / "fsdp", folder / "killed", ignore=lambda *_: ["000004"], symlinks=True)
    launch(folder, "killed")
    found, expected = tensors(folder / "killed"), tensors(folder / "fsdp")
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_a_rank_that_draws_or_validates_for_longer_than_a_collective_may_take_loses_no_other(folder):
    assert json.loads((folder / "slow/run.json").read_text())["state"] == "done"
    assert logged(folder / "slow", "loss") == logged(folder / "ddp", "loss")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version=1; expected 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading=true; expected false"),
        ({}, "restarts its codes in place"),
    ],
)
def test_what_shards_cannot_do_is_named(variables, message, monkeypatch):
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | variables
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distribute(LAQ(LAQConfig(image_size=32, patch_size=8, quantizer="vq")), set(), None)


def slowed(function, rank, seconds=8):
    def slow(*args, **settings):
        if int(os.environ["RANK"]) == rank:
            time.sleep(seconds)
        return function(*args, **settings)

    return slow


def main(folder: Path, names: list[str]) -> None:
    step, counts, seen = AcceleratedOptimizer.step, Run.counts, {}

    def observed_step(optimizer, *args):
        step(optimizer, *args)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [x for state in optimizer.optimizer.state.values() for x in state.values()]
        held = [*parameters, *(p.grad for p in parameters), *states]
        held = [x.to_local() if isinstance(x, DTensor) else x for x in held]
        seen["bytes"] = sum(x.numel() * x.element_size() for x in held)

    def observed_share(run, batches):
        seen["labelled"].append(int(sum((~batch["action_is_pad"]).any(1).sum() for batch in batches)))
        return counts(run, batches)

    AcceleratedOptimizer.step, Run.counts = observed_step, observed_share
    AcceleratorState.destroy_process_group = lambda _: None  # the store would give a second one the first's addresses
    for name in names:
        seen["labelled"] = []
        os.environ["ACCELERATE_USE_FSDP"] = str(name not in ("ddp", "slow")).lower()
        if name == "slow":
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5), dist.group.WORLD)
            pictures.draw_pictures = slowed(pictures.draw_pictures, rank=0)
            validation.Share.tasks = slowed(validation.Share.tasks, rank=1)
        train(folder, name, batch_size=4)
        (folder / f"{name}_{os.environ['RANK']}.json").write_text(json.dumps(seen))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_a_process_that_gets_no_further_says_where_it_is(caplog):
    watchdog = Watchdog(rank=3, patience=0.1)
    watchdog.begins("waits for data of step 7")
    deadline = time.monotonic() + 60
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.01)
    watchdog.stopped.set()
    (record,) = caplog.records[:1]
    assert record.levelno == logging.WARNING and "waits for data of step 7 since" in record.message
    assert record.message.startswith("rank 3 on ") and "tests/test_distributed.py" in record.message


@pytest.mark.timing
def test_a_process_that_goes_on_says_nothing(caplog):
    watchdog = Watchdog(rank=0, patience=0.4)
    for step in range(20):
        watchdog.begins(f"computes step {step}")
        time.sleep(0.04)
    watchdog.stopped.set()
    assert not caplog.messages


WORLDS = ("world:clean?episodes=6", "world:human?episodes=6")
LAQ_FLAGS = [*FLAGS, "--steps", "4", "--eval-freq", "4", "--save-freq", "4", "--log-freq", "1"]
VLA_FLAGS = """--val-samples 8 --head parallel --steps 4 --warmup-steps 2 --num-workers 0 --log-freq 1 --eval-freq 4
    --save-freq 4""".split()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Of stages 1 and 2, the script with its flags and the batch that one process takes; stage 2 needs a LAQ."""
    folder = tmp_path_factory.mktemp("laq")
    torch.manual_seed(0)
    laq = LAQ(LAQConfig(image_size=32, patch_size=8, codebook_size=8, num_tokens=4))
    nn.init.normal_(laq.to_change.weight)
    laq.save_pretrained(folder, data=WORLDS, step=0, report=None)
    vla = ["train_vla.py", "--laq", str(folder), "--data", *WORLDS, *VLA_FLAGS]
    return {"laq": ["train_laq.py", *LAQ_FLAGS], "vla": vla}


def start_nodes(command: list[str], config: str) -> list[subprocess.Popen]:
    job = next(job for job in iter(lambda: random.randrange(15000), None) if is_free(15000 + job))
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": str(job), "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    slurm |= {"PROCESSES": "1", "VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
    line = 'source slurm/common.sh; launch --config_file "$@"'
    return [
        subprocess.Popen(
            [*one_cpu(node), "bash", "-c", line, "_", f"slurm/{config}.yaml", *command],
            cwd=ROOT,
            env=os.environ | slurm | {"SLURM_NODEID": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]


def is_free(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def one(scripts, tmp_path_factory):
    """The same by one process that takes the batches of both."""
    runs = {stage: tmp_path_factory.mktemp("one") / stage for stage in scripts}
    for stage, run in runs.items():
        command = [*one_cpu(0), sys.executable, *scripts[stage], "--batch-size", "4", "--output-dir", run]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage", ["laq", "vla"])
def test_two_nodes_train_what_one_process_trains(stage, config, scripts, one, tmp_path):
    nodes = start_nodes([*scripts[stage], "--batch-size", "2", "--output-dir", str(tmp_path)], config)
    for node in nodes:
        text, _ = node.communicate(timeout=400)
        assert node.returncode == 0, text
    for name in ("loss", "grad_norm"):
        assert logged(tmp_path, name) == pytest.approx(logged(one[stage], name), rel=1e-3)
    assert json.loads((tmp_path / "run.json").read_text())["in_shards"] == (config == "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_with_the_reason(rank, scripts, tmp_path):
    nodes = start_nodes([*scripts["laq"], "--steps", "5000", "--output-dir", str(tmp_path)], "ddp")
    while not (tmp_path / "metrics.jsonl").is_file() or not logged(tmp_path, "loss"):
        assert not any(node.poll() for node in nodes)
        time.sleep(0.2)
    os.kill(rank_of(tmp_path, rank), signal.SIGKILL)
    texts = [node.communicate(timeout=60)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "Signal 9 (SIGKILL) received" in texts[rank]
    assert "has lost another one" in texts[1 - rank]


@pytest.mark.slow
def test_the_first_rank_that_fails_says_why_and_the_others_one_line(scripts, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder is to be")
    nodes = start_nodes([*scripts["laq"], "--output-dir", str(tmp_path)], "ddp")
    texts = [node.communicate(timeout=200)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "rank 0 on" in texts[0] and "failed first:\nTraceback" in texts[0] and "NotADirectoryError" in texts[0]
    assert "stops, since another one has failed" in texts[1] or "has lost another one" in texts[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
