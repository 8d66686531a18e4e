"""Two nodes: two launchers on this machine, by the launch line of slurm/common.sh. Slurm itself: test_slurm.py."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_slurm import FLAGS, one_cpu, rank_of
from torch import nn

from hlrp.laq import LAQ, LAQConfig

ROOT = Path(__file__).parents[1]
DATA = ("world:clean?episodes=6", "world:human?episodes=6")
LAQ_FLAGS = [*FLAGS, "--steps", "4", "--eval-freq", "4", "--save-freq", "4", "--log-freq", "1"]
VLA_FLAGS = """--val-samples 8 --head parallel --steps 4 --warmup-steps 2 --num-workers 0 --log-freq 1 --eval-freq 4
    --save-freq 4""".split()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Of stages 1 and 2, the script with its flags and the batch that one process takes; stage 2 needs a LAQ."""
    folder = tmp_path_factory.mktemp("laq")
    torch.manual_seed(0)
    laq = LAQ(LAQConfig(image_size=32, patch_size=8, codebook_size=8))
    nn.init.normal_(laq.to_change.weight)
    laq.save_pretrained(folder, data=DATA, step=0, report=None)
    vla = ["train_vla.py", "--laq", str(folder), "--data", *DATA, *VLA_FLAGS]
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


def logged(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def one(scripts, tmp_path_factory):
    """The same by one process that takes the batches of both."""
    runs = {stage: tmp_path_factory.mktemp("one") / stage for stage in scripts}
    for stage, run in runs.items():
        command = [*one_cpu(0), sys.executable, *scripts[stage], "--batch-size", "4", "--output-dir", run]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return runs


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_with_the_reason(rank, scripts, tmp_path):
    nodes = start_nodes([*scripts["laq"], "--steps", "5000", "--output-dir", str(tmp_path)], "ddp")
    while not (tmp_path / "metrics.jsonl").is_file() or not logged(tmp_path, "loss"):
        assert not any(node.poll() for node in nodes)
        time.sleep(0.2)
    before = time.monotonic()
    os.kill(rank_of(tmp_path, rank), signal.SIGKILL)
    texts = [node.communicate(timeout=60)[0] for node in nodes]
    assert time.monotonic() - before < 30 and all(node.returncode for node in nodes)
    assert "Signal 9 (SIGKILL) received" in texts[rank]
    assert "has lost another one" in texts[1 - rank]


def test_the_first_rank_that_fails_says_why_and_the_others_one_line(scripts, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder is to be")
    nodes = start_nodes([*scripts["laq"], "--output-dir", str(tmp_path)], "ddp")
    texts = [node.communicate(timeout=200)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "rank 0 on" in texts[0] and "failed first:\nTraceback" in texts[0] and "NotADirectoryError" in texts[0]
    assert "stops, since another one has failed" in texts[1] or "has lost another one" in texts[1]
