"""The probe card as its users make it, on the built-in world."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hlrp.card_subjects import trained_on_shuffled_futures, untrained, with_shuffled_futures
from hlrp.card_verdict import faults
from hlrp.checkpoints import write_json
from hlrp.laq import LAQ, LAQConfig
from hlrp.probe import Args, main, parse_groups
from hlrp.world import World

DATA = "world:default?episodes=40&seed=3"
SETTINGS = {"data": (DATA,), "pairs": 200, "num_workers": 0, "val_fraction": 0.4}


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Networks that read little, where a test is not of what they read."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("hlrp.metrics.FEW_SHOT_STEPS", 20)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """True actions, as another program writes them: plain numpy."""
    world, rows = World("default", episodes=40, seed=3), []
    for episode in range(40):
        actions = world.actions(episode, range(world.lengths[episode])).numpy()
        rows += [(episode, i / 10, *actions[i : i + 2].mean(0)) for i in range(0, world.lengths[episode] - 2, 3)]
    rows = np.array(rows)
    path = tmp_path_factory.mktemp("latents") / "true.npz"
    np.savez(path, episode=rows[:, 0].astype(int), time=rows[:, 1], vector=rows[:, 2:], delta=0.2)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LAQ whose decoder has learned nothing, and so says the same whatever the code."""
    folder = tmp_path_factory.mktemp("laq")
    laq = untrained(LAQConfig(image_size=32, num_tokens=4, codebook_size=8), seed=0)
    laq.save_pretrained(folder, data=[DATA], step=0, report=None)
    return folder


def card_of(folder: Path) -> dict:
    return json.loads((folder / "card.json").read_text())


def test_a_file_of_plain_numpy_gets_its_card(latents, tmp_path, capsys):
    main(Args(latents=latents, output_dir=tmp_path, groups=("x=0", "both=0-1"), **SETTINGS))
    card = card_of(tmp_path)
    figures = card["sources"]["world-default"]
    assert card["passed"] and card["delta"] == 0.2
    assert figures["information"]["r2"] > 0.99
    assert [*figures["information"]["probes"]["z"]["ridge"]["groups"]] == ["x", "both"]
    assert "use" not in figures and "algebra" not in figures
    assert {"motion of distractor", "motion of camera shift", "embodiment"} <= set(figures["leakage"])
    assert figures["transfer"]["ratio"] > 0.9
    printed = capsys.readouterr().out
    assert "R2 of the actions, ridge" in printed and f"{latents}: passed" in printed
    assert not (latents.parent / "probe.json").exists()

    page = (tmp_path / "card.html").read_text()
    assert len(page) < 10e6
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)|https?://|url\(|<script', page)
    assert page.count("data:image/png") == 6  # information, scatter, map, leakage, transfer, and neighbours


def test_a_checkpoint_whose_decoder_ignores_the_code_is_rejected_by_name(checkpoint, tmp_path, capsys):
    main(Args(latents=checkpoint, output_dir=tmp_path, train_shuffled=2, **SETTINGS | {"data": ()}))
    card = card_of(tmp_path)
    assert not card["passed"]
    assert json.loads((checkpoint / "probe.json").read_text()) == card
    assert LAQ.from_pretrained(checkpoint).fingerprint == card["fingerprint"]  # a card changes no model
    found = faults(checkpoint)
    assert any(fault.startswith("world-default: The decoder ignores the code.") for fault in found)
    figures = card["sources"]["world-default"]
    assert figures["use"]["shuffled_over_true"] == {"pixels": 1}
    assert figures["algebra"]["zero_transition"] is None  # an untrained one says the same of nearly all pairs
    assert {"z", "observation", "change of pixels", "random encoder", "shuffled futures"} <= set(
        figures["information"]["probes"]
    )
    assert (tmp_path / "shuffled_futures/model.safetensors").is_file()
    assert "One code on many frames" in (tmp_path / "card.html").read_text()
    assert f"{checkpoint}: FAILED" in capsys.readouterr().out


def test_a_card_on_other_data_is_no_verdict_on_the_checkpoint(checkpoint, tmp_path, capsys):
    own = (checkpoint / "probe.json").read_text() if (checkpoint / "probe.json").exists() else None
    main(Args(latents=checkpoint, output_dir=tmp_path, **SETTINGS | {"data": ("world:hand?episodes=24",)}))
    assert set(card_of(tmp_path)["sources"]) == {"world-hand"}
    assert own == ((checkpoint / "probe.json").read_text() if (checkpoint / "probe.json").exists() else None)
    assert "this one is of other data than it learned from" in capsys.readouterr().out


def test_labels_are_compared_with_a_model_of_the_labels_alone(tmp_path):
    folder = tmp_path / "checkpoints/000000/pretrained_model"
    folder.mkdir(parents=True)
    laq = untrained(LAQConfig(image_size=32, num_tokens=4, action_weight=1.0, action_dim=2, action_sources=1), seed=0)
    laq.save_pretrained(folder, data=[DATA], step=0, report=None)
    args = Args(latents=folder, output_dir=tmp_path / "card", label_steps=2, **SETTINGS)
    with pytest.raises(ValueError, match="give --label-fraction"):
        main(args)
    write_json(tmp_path / "run.json", {"settings": {"label_fraction": 0.5, "seed": 0}})
    main(args)
    assert "labels only" in card_of(tmp_path / "card")["sources"]["world-default"]["information"]["gains"]


def test_cards_stand_side_by_side(latents, tmp_path, capsys):
    main(Args(latents=latents, output_dir=tmp_path / "a", **SETTINGS))
    card = card_of(tmp_path / "a")
    del card["sources"]["world-default"]["transfer"]
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b/probe.json", card | {"passed": False})
    capsys.readouterr()
    main(Args(compare=(tmp_path / "a", tmp_path / "b"), output_dir=tmp_path / "both"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["Verdict", "passed", "FAILED"]
    (line,) = [x for x in printed if "fitted on embodiment 0, scored on embodiment 1" in x]
    assert line.endswith("-")
    assert "FAILED" in (tmp_path / "both/compare.html").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compare": (Path("a"),)}, "give --latents"),
        ({"pairs": 3}, "pairs=3"),
        ({"data": ()}, "is of one source; --data names 0"),
        ({"train_shuffled": 5}, "is a file of latents"),
        ({"groups": ("x=5",)}, "dimension 5, but the actions of .* have 2"),
        ({"groups": ("x",)}, "'x'; expected a name and dimensions"),
    ],
)
def test_settings_that_make_no_card_are_named(settings, message, latents, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(Args(**{"latents": latents, "output_dir": tmp_path, **SETTINGS, **settings}))


def test_what_is_no_card_cannot_be_compared(tmp_path):
    with pytest.raises(ValueError, match="has neither card.json nor probe.json"):
        main(Args(compare=(tmp_path,)))


def test_groups_are_spans_and_lists():
    assert parse_groups(("a=0-2", "b=6,8-9")) == {"a": [0, 1, 2], "b": [6, 8, 9]}


def test_no_second_frame_follows_its_first_among_shuffled_futures():
    frames = torch.arange(4, dtype=torch.uint8)[:, None].expand(4, 2)
    first, second = with_shuffled_futures({"frames": frames})["frames"].unbind(1)
    assert torch.equal(first, torch.arange(4)) and not (first == second).any()


def test_a_checkpoint_without_a_card_has_no_faults(tmp_path):
    assert faults(tmp_path) == []


@pytest.mark.slow
def test_a_healthy_checkpoint_passes_and_one_of_shuffled_futures_is_called_useless(tmp_path):
    """Seven minutes."""
    from hlrp.card_subjects import train
    from hlrp.clips import Clips

    clips = Clips(World("clean"), range(2700), (0.0, 0.2), image_size=32)
    config, passed, settings = LAQConfig(image_size=32), {}, SETTINGS | {"pairs": 2000, "val_fraction": 0.1}
    models = {"true": train(untrained(config, 0), [clips], 1000)}
    models["shuffled"] = trained_on_shuffled_futures(config, [clips], 1000, "cpu")
    for name, laq in models.items():
        (tmp_path / name).mkdir()
        laq.save_pretrained(tmp_path / name, data=["world:clean"], step=1000, report=None)
        main(Args(latents=tmp_path / name, output_dir=tmp_path / "card", **settings | {"data": ()}))
        passed[name] = card_of(tmp_path / "card")["passed"]
    assert passed == {"true": True, "shuffled": False}
    assert any("useless" in fault for fault in faults(tmp_path / "shuffled"))
