"""Rollouts in LeRobot's own environment, cut to a few steps."""

import json
import os
import subprocess
import sys
from collections import deque

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from toys import META

from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors
from hlrp.rollout import Args, main, summary, table

STATS = {key: {"mean": torch.zeros(4), "std": torch.ones(4)} for key in ("observation.state", "action")}


@pytest.fixture
def short_episodes(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")  # MuJoCo reads it when it is imported
    from lerobot.envs import metaworld

    init = metaworld.MetaworldEnv.__init__

    def cut(env, *args, **kwargs):
        init(env, *args, **kwargs)
        env._max_episode_steps = 4

    monkeypatch.setattr(metaworld.MetaworldEnv, "__init__", cut)


@pytest.fixture
def saved(tmp_path):
    config = HLRPConfig(device="cpu", push_to_hub=False, image_size=32, chunk_size=4, n_action_steps=1)
    config.expert_dim, config.expert_depth = 32, 1
    config.input_features = {
        "observation.images.corner2": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    policy = HLRPPolicy(config, dataset_meta=META)
    for part in (policy, *make_hlrp_pre_post_processors(config, STATS)):
        part.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_a_policy_is_rolled_out_in_seeded_episodes_of_each_task(short_episodes, saved, tmp_path, capsys):
    args = Args(
        str(saved), env="metaworld", tasks=("reach-v3", "door-open-v3"), episodes=2, seed=7, output_dir=tmp_path / "out"
    )
    args.rename_map = {"observation.image": "observation.images.corner2"}
    main(args)
    result = json.loads((tmp_path / "out/rollout.json").read_text())
    assert set(result["tasks"]) == {"reach-v3", "door-open-v3"} and result["all"]["episodes"] == 4
    assert result["latency_ms"]["chunks"] == 16 and result["latency_ms"]["p50"] > 0
    assert len([*(tmp_path / "out/videos").rglob("*.mp4")]) == 2
    assert "observation to chunk: p50" in capsys.readouterr().out


def test_a_camera_that_the_policy_does_not_know_is_named(short_episodes, saved, tmp_path):
    with pytest.raises(ValueError, match="observation.images.corner2"):
        main(Args(str(saved), env="metaworld", tasks=("reach-v3",), episodes=1, output_dir=tmp_path / "out"))


def test_the_summary_counts_each_task_and_all():
    result = summary({"a": [True] * 8 + [False] * 2, "b": [False] * 10}, [0.01, 0.02, 0.03])
    assert result["tasks"]["a"]["success"] == 0.8 and result["all"]["successes"] == 8
    assert result["tasks"]["a"]["interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert result["latency_ms"] == pytest.approx({"p50": 20, "p99": 29.8, "chunks": 3})
    assert deque(table(result).splitlines(), maxlen=2)[0].split() == ["all", "0.40", *"0.22 to 0.61 20".split()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"episodes": 0}, "episodes=0"), ({"episodes": 2, "batch_size": 3}, "batch_size=3 is more than episodes=2")],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        main(Args("nowhere", **settings))


def test_lerobot_eval_counts_the_same_successes(saved, tmp_path):
    flags = {"policy.path": saved, "env.type": "hlrp_metaworld", "env.task": "drawer-close-v3", "seed": 7}
    flags |= {"eval.n_episodes": 2, "eval.batch_size": 2, "output_dir": tmp_path / "theirs"}
    main_of_lerobot = "from lerobot.scripts.lerobot_eval import main; main()"
    command = [sys.executable, "-c", main_of_lerobot, *(f"--{name}={value}" for name, value in flags.items())]
    variables = {"HF_HUB_OFFLINE": "1", "MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=os.environ | variables)
    (info,) = json.loads((tmp_path / "theirs/eval_info.json").read_text())["per_task"]

    args = {"tasks": ("drawer-close-v3",), "episodes": 2, "batch_size": 2, "seed": 7, "videos": 0}
    main(Args(str(saved), output_dir=tmp_path / "ours", **args))
    ours = json.loads((tmp_path / "ours/rollout.json").read_text())["tasks"]["drawer-close-v3"]
    assert ours["successes"] == sum(info["metrics"]["successes"])
