"""The table of label efficiency, over runs that a stand-in finishes at once."""

import json
from pathlib import Path

import pytest

from hlrp import curve
from hlrp.curve import Args, cells_of, main


@pytest.fixture
def runs(monkeypatch):
    """What would be run, each command as its flags; success is the method's."""
    done, success = [], {"hlrp": 9, "bc": 4, "idm": 7, "random": 4, "shuffled": 3}

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
            count = {"successes": success[folder.name.split("_")[0]], "episodes": 10}
            (folder / "rollout.json").write_text(json.dumps({"all": count}))

    monkeypatch.setattr(curve, "run", run)
    return done


def test_each_cell_is_trained_and_rolled_out_once_and_stages_are_shared(runs, tmp_path, capsys):
    args = Args(demonstrations=(1, 5), seeds=(0, 1), output_dir=tmp_path)
    main(args)
    scripts = [script for script, _ in runs]
    assert scripts.count("finetune_policy.py") == scripts.count("hlrp.rollout") == 20
    assert scripts.count("hlrp.inverse") == 4  # of each number of demonstrations and seed
    assert scripts.count("train_laq.py") == 2 and scripts.count("train_vla.py") == 3
    main(args)
    assert len(runs) == len(scripts)
    text = (tmp_path / "curve.md").read_text()
    assert "| 5 | 0.90 (0.70 to 0.97; 20) | 0.40 (0.22 to 0.61; 20) |" in text and text in capsys.readouterr().out
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_rivals_get_what_makes_them_rivals(runs, tmp_path):
    main(Args(demonstrations=(5,), seeds=(2,), output_dir=tmp_path))
    policies = {Path(f["output-dir"]).name.split("_")[0]: f for s, f in runs if s == "finetune_policy.py"}
    stage2 = {name: str(flags["policy.vla"]) for name, flags in policies.items()}
    assert stage2["bc"] == stage2["idm"] == "None" and "vla_hlrp" in stage2["hlrp"]
    assert "laq_random" in str(policies["random"]["laq"]) and "vla_random" in stage2["random"]
    assert "vla_shuffled" in stage2["shuffled"] and "--shuffle-latents" in policies["shuffled"]["more"]
    for rival in ("bc", "idm"):
        assert (policies[rival]["policy.vlm"], policies[rival]["policy.image-size"]) == ("owner/name", 96)
    assert "inverse_k5_seed2" in str(policies["idm"]["pseudo-actions"])
    assert all(flags["demonstrations"] == 5 and flags["seed"] == 2 for flags in policies.values())
    assert [f["more"][-1] for s, f in runs if s == "train_vla.py"].count("--shuffle-latents") == 1
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
        ({"demonstrations": (0,)}, "demonstrations=\\(0,\\), episodes=5; expected 1 or more"),
        ({"seeds": (1, 1)}, "seeds=\\(1, 1\\); expected one or more different"),
        ({"cell": 90}, "cell=90; expected 0 to 89"),
    ],
)
def test_settings_that_make_no_table_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        cells_of(Args(**settings))


def test_a_table_of_other_settings_is_refused(runs, tmp_path):
    main(Args(demonstrations=(1,), seeds=(0,), methods=("bc",), output_dir=tmp_path))
    with pytest.raises(ValueError, match="episodes was 5 and is 9.*give another folder"):
        main(Args(demonstrations=(1,), seeds=(0,), methods=("bc",), output_dir=tmp_path, episodes=9))
