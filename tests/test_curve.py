"""The table of label efficiency, over runs that a stand-in finishes at once."""

import json
import re
import shutil
from pathlib import Path

import pytest

from hlrp import curve
from hlrp.curve import Args, Cell, cells_of, gain, main
from hlrp.rollout import write_episodes

# labels of the other video that a method learns, and what they are read from
LABELS = {"idm": "pixels", "pca": "pca", "labels": "laq", "hlrp": "laq", "random": "random", "shuffled": "shuffled"}
FEATURES = {"pixels": "pixels", "pca": "pca", "laq": "laq", "random": "laq", "shuffled": "laq"}


@pytest.fixture
def runs(monkeypatch):
    """What would be run, each command as its flags; success is the method's."""
    done = []
    success = {"hlrp": 9, "bc": 4, "bc_long": 5, "oracle": 10, "idm": 7, "pca": 6, "labels": 8, "latents": 4}
    success |= {"random": 4, "shuffled": 3}

    def run(command, flags):
        flags = {name.lstrip("-"): value for name, value in flags.items()}
        script = next(Path(part).name for part in command if part.endswith(".py") or part.startswith("hlrp."))
        done.append((script, flags | {"more": command}))
        folder = Path(flags["output-dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"state": "done"}))
        if script == "train_vla.py":
            checkpoint = folder / curve.LAST
            checkpoint.mkdir(parents=True)
            vlm = {"vlm": "owner/name", "image_size": 96}
            (checkpoint / "config.json").write_text(json.dumps({"type": "vla", "vla": {"vlm": vlm}}))
        if script == "hlrp.rollout":
            wins = success[re.split("_(k[0-9]|all)", folder.name)[0]]
            row = {
                "suite": "s",
                "task": "door",
                "init_state": "",
                "return": 0.0,
                "max_reward": 0.0,
                "length": 9,
                "video": "",
            }
            rows = [row | {"episode": i, "seed": 1000 + i, "success": i < wins} for i in range(10)]
            write_episodes(folder, {"door": rows})
            (folder / "rollout.json").write_text("{}")

    monkeypatch.setattr(curve, "run", run)
    return done


def test_each_cell_is_trained_and_rolled_out_once_and_stages_are_shared(runs, tmp_path, capsys):
    args = Args(demonstrations=(1, 5), seeds=(0, 1), output_dir=tmp_path)
    main(args)
    scripts = [script for script, _ in runs]
    assert scripts.count("finetune_policy.py") == scripts.count("hlrp.rollout") == 2 * 2 * 9 + 2  # oracle: all labels
    assert scripts.count("hlrp.inverse") == 4 * 5  # for each number of demonstrations and seed; labels and hlrp share
    assert scripts.count("train_laq.py") == 2 and scripts.count("train_vla.py") == 3
    main(args)
    assert len(runs) == len(scripts)
    text = (tmp_path / "curve.md").read_text()
    assert "| 5 | 0.90 (0.70 to 0.97; 20) | 0.40 (0.22 to 0.61; 20) |" in text and text in capsys.readouterr().out
    assert (tmp_path / "curve.png").stat().st_size > 1000
    episodes = json.loads((tmp_path / "curve.json").read_text())
    assert len(episodes) == 38 * 10
    assert episodes[0] == {
        "method": "hlrp",
        "demonstrations": 1,
        "seed": 0,
        "task": "door",
        "episode_seed": 1000,
        "success": 1,
    }
    elsewhere = tmp_path / "elsewhere"  # from the episodes alone
    elsewhere.mkdir()
    shutil.copy(tmp_path / "curve.json", elsewhere)
    with pytest.raises(ValueError, match="curve.json is there without settings.json"):
        main(Args(demonstrations=(1, 5), seeds=(0, 1), output_dir=elsewhere))
    shutil.copy(tmp_path / "settings.json", elsewhere)
    main(Args(demonstrations=(1, 5), seeds=(0, 1), output_dir=elsewhere))
    assert len(runs) == len(scripts) and (elsewhere / "curve.md").read_text() == text
    main(Args(demonstrations=(1,), seeds=(0,), methods=("bc",), output_dir=elsewhere))  # a part of it loses nothing
    kept = json.loads((elsewhere / "curve.json").read_text())
    assert len(kept) == len(episodes) and all(row in kept for row in episodes)


def test_the_environment_gets_its_settings_and_a_table_has_one_of_them(runs, tmp_path):
    args = {"demonstrations": (1,), "seeds": (0,), "methods": ("bc",), "output_dir": tmp_path}
    main(Args(**args, env_settings={"distractors": "true", "fps": "10"}))
    assert runs[-1][1]["more"][-5:] == ["--env-settings", "distractors", "true", "fps", "10"]
    with pytest.raises(ValueError, match="env_settings was {'distractors': 'true', 'fps': '10'} and is None"):
        main(Args(**args))


def test_methods_are_compared_in_the_episodes_that_both_tried():
    """Two seeds of four episodes: hlrp wins three that bc loses, and loses one that bc wins."""

    def result(cell, successes):
        rows = [{"task": "door", "episode_seed": i, "success": x} for i, x in enumerate(successes)]
        return {cell: [cell._asdict() | row for row in rows]}

    results = result(Cell("hlrp", 5, 0), [1, 1, 1, 0]) | result(Cell("bc", 5, 0), [0, 0, 1, 0])
    results |= result(Cell("hlrp", 5, 1), [1, 0, 0, 0]) | result(Cell("bc", 5, 1), [0, 1, 0, 0])
    results |= result(Cell("bc", 5, 2), [1, 1, 1, 1])  # which hlrp has not tried
    found = gain(results, "hlrp", "bc", 5)
    assert found.episodes == 8 and found.mean == pytest.approx(0.25)  # +1 +1 0 0, +1 -1 0 0
    assert found.error == pytest.approx(0.25)  # the seeds' means are .5 and 0
    assert found.z == pytest.approx(0.25 / (0.7071068 / 8**0.5))
    assert gain(results, "hlrp", "bc", 1) is None


def test_rivals_get_what_makes_them_rivals(runs, tmp_path):
    main(Args(demonstrations=(5,), seeds=(2,), output_dir=tmp_path))
    policies = {Path(f["output-dir"]).name.split("_k5_")[0]: f for s, f in runs if s == "finetune_policy.py"}
    oracle = policies.pop("oracle_all_seed2")
    stage2 = {name: str(flags["policy.vla"]) for name, flags in policies.items()}
    assert stage2["bc"] == stage2["idm"] == "None" and "vla_hlrp" in stage2["hlrp"]
    assert "laq_random" in str(policies["random"]["laq"]) and "vla_random" in stage2["random"]
    assert "vla_shuffled" in stage2["shuffled"] and "vla_hlrp" in stage2["latents"]
    assert "demonstrations" not in oracle and oracle["policy.vla"] == "None"
    sizes = {name: flags["batch-size"] for name, flags in policies.items()} | {"oracle": oracle["batch-size"]}
    assert {name: size for name, size in sizes.items() if size != 32} == {"bc_long": 64, "oracle": 64}
    for rival in ("bc", "bc_long", "idm", "pca", "labels"):
        assert (policies[rival]["policy.vlm"], policies[rival]["policy.image-size"]) == ("owner/name", 96)
    labels = {name: Path(f["pseudo-actions"]).name for name, f in policies.items() if "pseudo-actions" in f}
    assert labels.pop("latents") == "None" and labels == {name: f"inverse_{of}_k5_seed2" for name, of in LABELS.items()}
    inverse = {Path(f["output-dir"]).name.split("_")[1]: f for s, f in runs if s == "hlrp.inverse"}
    assert {name: flags["features"] for name, flags in inverse.items()} == FEATURES
    assert "laq_random" in str(inverse["random"]["laq"]) and "--shuffle-latents" in inverse["shuffled"]["more"]
    assert all(flags["demonstrations"] == 5 and flags["seed"] == 2 for flags in policies.values())
    assert [f["more"][-1] for s, f in runs if s == "train_vla.py"].count("--shuffle-latents") == 1
    (rollout,) = [f for s, f in runs if s == "hlrp.rollout" and "bc_k5" in str(f["output-dir"])]
    assert "--env-settings" not in rollout["more"]
    (random,) = [f for s, f in runs if s == "train_laq.py" and "laq_random" in str(f["output-dir"])]
    assert {"--steps", "1", "1e-12"} <= set(random["more"])


def test_a_cell_alone_is_run_for_a_job_array(runs, tmp_path, capsys):
    args = Args(demonstrations=(1,), seeds=(0,), methods=("hlrp", "bc"), output_dir=tmp_path)
    args.cell = 1
    main(args)
    names = [Path(f["output-dir"]).name for _, f in runs]
    assert names == ["laq", "vla_hlrp", "bc_k1_seed0", "bc_k1_seed0"]  # whose vlm it gets
    assert "| 1 | – | 0.40" in capsys.readouterr().out
    args.list = True
    main(args)
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()] == [
        ["hlrp_k1_seed0", "to", "run"],
        ["bc_k1_seed0", "done"],
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"demonstrations": ()}, "demonstrations=\\(\\)"),
        ({"demonstrations": (0,)}, "demonstrations=\\(0,\\), episodes=5, batch_size=32; expected 1 or more"),
        ({"seeds": (1, 1)}, "seeds=\\(1, 1\\); expected one or more different"),
        ({"cell": 220}, "cell=220; expected 0 to 219"),
    ],
)
def test_settings_that_make_no_table_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        cells_of(Args(**settings))


def test_a_table_of_other_settings_is_refused(runs, tmp_path):
    main(Args(demonstrations=(1,), seeds=(0,), methods=("bc",), output_dir=tmp_path))
    with pytest.raises(ValueError, match="episodes was 5 and is 9.*give another folder"):
        main(Args(demonstrations=(1,), seeds=(0,), methods=("bc",), output_dir=tmp_path, episodes=9))
