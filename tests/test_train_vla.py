"""train_vla.py as its users run it, behind a LAQ, on the built-in world."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from toys import waits_of_ordinary_steps, weights

import train_laq
import train_vla
from hlrp.checkpoints import write_json
from hlrp.laq import LAQ, LAQConfig
from hlrp.training import Run
from hlrp.vla import VLA, VLAConfig
from hlrp.vlm import VLMConfig
from hlrp.world import World

pytestmark = pytest.mark.usefixtures("fresh_process")

SCRIPT = Path(train_vla.__file__)
DATA = ("world:default?episodes=12", "world:human?episodes=6@0.5")
SETTINGS = {
    "accept_failed_laq": True,
    "val_samples": 16,
    "steps": 4,
    "batch_size": 4,
    "warmup_steps": 2,
    "num_workers": 0,
    "log_freq": 2,
    "eval_freq": 4,
    "save_freq": 2,
    "pictures": ("reconstructions", "many-codes"),
}


@pytest.fixture(scope="module")
def laq_folder(tmp_path_factory):
    """A LAQ of two steps, whose report says that it has failed."""
    output_dir = tmp_path_factory.mktemp("laq")
    flags = {"image-size": 32, "num-tokens": 4, "codebook-size": 8, "steps": 2, "batch-size": 4, "warmup-steps": 1}
    flags |= {"val-samples": 16, "num-workers": 0, "eval-freq": 2, "output-dir": output_dir}
    flags["pictures"] = "usage"
    values = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, train_laq.__file__, "--data", *DATA, *values], check=True)
    return output_dir / "checkpoints/last/pretrained_model"


def train(output_dir, laq_folder, model=None, **settings):
    values = SETTINGS | {"laq": laq_folder, "output_dir": output_dir} | settings
    train_vla.main(train_vla.Args(**values, model=VLAConfig(**model or {}, vlm=VLMConfig())))


def test_the_default_of_stage_2_takes_up_what_stage_1_left(laq_folder, tmp_path):
    train(tmp_path, laq_folder)
    folder = tmp_path / "checkpoints/last/pretrained_model"
    vla, laq = VLA.from_pretrained(folder), LAQ.from_pretrained(laq_folder)
    assert (vla.space.delta, vla.space.num_tokens, vla.space.codebook_size) == (0.2, 4, 8)
    assert vla.space.fingerprint == laq.fingerprint and vla.vlm.image_size == laq.config.image_size == 32
    config = json.loads((folder / "config.json").read_text())
    assert config["data"] == list(DATA)
    assert set(config["report"]) == {"world-default", "world-human"}
    robot, human = config["report"].values()
    assert {"accuracy", "majority", "accuracy_shuffled_text", "accuracy_blank_image", "action_r2"} <= set(robot)
    assert "action_r2" not in human
    images = torch.randint(256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    assert vla.generate(images, ["push", "pull"]).indices.shape == (2, 1, 4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 4]
    assert {"loss", "latent_loss", "accuracy", "lr", "samples_per_s"} <= set(lines[0])
    assert {path.name for path in (tmp_path / "grids").iterdir()} == {
        *("index.html", "reconstructions_000004.png", "many-codes_000004.png")
    }


@pytest.mark.parametrize("head", [pytest.param("tokens", marks=pytest.mark.slow), "parallel", "flow"])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_bit(head, laq_folder, tmp_path, monkeypatch):
    model = {"head": head, "chunk_size": 2, "action_weight": 0.5}
    train(tmp_path / "whole", laq_folder, model)
    advance = Run.advance

    def advance_and_signal(run, *args):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(run, *args)

    monkeypatch.setattr(Run, "advance", advance_and_signal)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "cut", laq_folder, model)
    assert stop.value.code == 75
    train(tmp_path / "cut", laq_folder, model)
    found, expected = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_accumulated_batches_with_uneven_labels_are_one_larger_batch(laq_folder, tmp_path, monkeypatch):
    read = World.read

    def with_few_points(world, episode, indices):
        sample = read(world, episode, indices)
        return sample | {"point": sample["point"] * (1 if episode % 2 else torch.nan)}

    monkeypatch.setattr(World, "read", with_few_points)

    def grad_norm(name, **settings):
        train(tmp_path / name, laq_folder, {"action_weight": 1.0, "point_weight": 2.0}, steps=2, **settings)
        return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"]

    large = grad_norm("large", batch_size=4)
    assert grad_norm("accumulated", batch_size=1, grad_accumulation=4) == pytest.approx(large, rel=2e-3)


def test_a_laq_that_failed_is_refused_by_its_own_report(laq_folder, tmp_path):
    with pytest.raises(
        ValueError, match="has failed: world-default: the decoder ignores the code.*--accept-failed-laq"
    ):
        train(tmp_path, laq_folder, accept_failed_laq=False)
    assert not list(tmp_path.iterdir())


def test_a_laq_whose_probe_card_failed_is_refused(tmp_path):
    folder = tmp_path / "laq"
    folder.mkdir()
    LAQ(LAQConfig(image_size=32)).save_pretrained(folder, data=DATA, step=0, report=None)
    lines = [{"level": "fail", "text": "The latent actions are useless."}, {"level": "good", "text": "All else."}]
    write_json(folder / "probe.json", {"type": "card", "sources": {"world-default": {"verdict": lines}}})
    with pytest.raises(ValueError, match="failed: world-default: The latent actions are useless. --accept"):
        train(tmp_path / "run", folder, accept_failed_laq=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"steps": 0}, {}, "steps=0"),
        ({"laq": Path("nowhere")}, {}, "nowhere holds no config.json"),
        ({}, {"head": "words"}, "head='words'; expected one of tokens, parallel, flow"),
        ({}, {"chunk_size": 0}, "chunk_size=0"),
        ({}, {"chunk_size": 99}, "clips last"),
        ({"data": ("world:human",)}, {"action_weight": 1.0}, "no source in the data has actions"),
    ],
)
def test_settings_that_no_run_can_have_are_named_before_it_starts(settings, model, message, laq_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", laq_folder, model, **settings)
    assert not (tmp_path / "run").exists()


def test_points_are_asked_for_only_of_data_that_have_them(laq_folder, tmp_path, monkeypatch):
    model = {"point_weight": 1.0}
    train(tmp_path / "run", laq_folder, model, steps=2)
    assert "point_loss" in json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    read = World.read
    monkeypatch.setattr(World, "read", lambda *args: {k: v for k, v in read(*args).items() if k != "point"})
    with pytest.raises(ValueError, match="point_weight=1.0, but no source in the data has a point"):
        train(tmp_path / "other", laq_folder, model)


@pytest.fixture(scope="module")
def clean_laq(tmp_path_factory):
    """The LAQ of docs/experiments.md, "Stage 2 on the built-in world"."""
    folder = tmp_path_factory.mktemp("clean_laq")
    flags = ["--data", "world:clean", "--steps", "1000", "--pictures", "usage", "--output-dir", folder]
    subprocess.run([sys.executable, train_laq.__file__, *flags], check=True)
    return folder / "checkpoints/last/pretrained_model"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["parallel", "tokens", "flow"])
def test_every_head_looks_and_reads_and_tells_the_actions_of_the_world(head, clean_laq, tmp_path):
    flags = ["--laq", clean_laq, "--data", "world:clean?episodes=20000", "--head", head, "--seed", "2"]
    flags += ["--chunk-size", "4", "--point-weight", "4", "--feature-weight", "3", "--steps", "1250"]
    flags += ["--mixed-precision", "bf16", "--num-workers", "0", "--pictures", "usage"]
    flags += ["--code-dropout", "0.5"] if head == "tokens" else []
    subprocess.run([sys.executable, SCRIPT, *flags, "--output-dir", tmp_path], check=True)
    config = json.loads((tmp_path / "checkpoints/last/pretrained_model/config.json").read_text())
    figures = config["report"]["world-clean"]
    assert figures["action_r2"] >= 0.6 and abs(figures["action_r2_random"]) < 0.05
    assert min(figures["loss_shuffled_text"], figures["loss_blank_image"]) > 1.1 * figures["loss"]


def test_continuous_latents_want_the_flow_head(tmp_path):
    LAQ(LAQConfig(image_size=32, quantizer="gaussian")).save_pretrained(tmp_path, data=DATA, step=0, report=None)
    with pytest.raises(ValueError, match="expected head=flow"):
        train(tmp_path / "run", tmp_path)
    train(tmp_path / "run", tmp_path, {"head": "flow"}, steps=2)
    figures = json.loads((tmp_path / "run/checkpoints/last/pretrained_model/config.json").read_text())["report"]
    assert "accuracy" not in figures["world-default"] and figures["world-default"]["action_r2"] is not None


def test_help_is_light():
    heavy = ("lerobot", "transformers", "wandb", "matplotlib", "mujoco", "accelerate", "peft")
    script = f"""
import runpy, sys
sys.argv = ["train_vla.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
finally:
    print("imported", [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "imported []" in process.stderr
    for flag in ("--laq", "--head", "--vlm", "--lora-rank", "--freeze-layers", "--accept-failed-laq"):
        assert flag in process.stdout


def test_an_ordinary_step_waits_for_no_device(laq_folder, tmp_path, monkeypatch):
    train_it = partial(train, tmp_path, laq_folder, pictures=("usage",))
    assert waits_of_ordinary_steps(monkeypatch, train_it) == []
