"""The environment that is the built-in world."""

import json

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from test_policy import META

from hlrp.envs import SEED, HLRPWorld, WorldEnv
from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors
from hlrp.rollout import Args, main
from hlrp.world import KINDS, World, simulate


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_the_actions_of_an_episode_lead_through_its_frames_to_success(kind):
    env, scene = WorldEnv(kind), simulate(SEED, 7)
    i = int(np.argmax(scene.kind == kind))
    source = World("clean", episodes=1)
    observation, _ = env.reset(seed=7)
    assert env.task_description == scene.task[i]
    for t in range(scene.length[i]):
        np.testing.assert_allclose(env.tip[0], scene.tip[i, t], atol=1e-3)
        np.testing.assert_allclose(env.blocks[0], scene.blocks[i, t], atol=1e-3)
        observation, _, terminated, truncated, info = env.step(scene.action[i, t])
        if terminated or truncated:
            break
    assert terminated == info["is_success"] and (terminated or t == 47)
    assert observation["pixels"].shape == (64, 64, 3) and source.camera == ""


def test_experts_do_most_tasks_in_time_and_standing_still_does_none():
    done = {kind: [] for kind in set(KINDS)}
    for seed in range(20):
        for kind, outcomes in done.items():
            env, scene = WorldEnv(kind), simulate(SEED, seed)
            env.reset(seed=seed)
            actions = scene.action[env.i]
            outcomes.append(any(env.step(actions[t])[2] for t in range(48)))
            env.reset(seed=seed)
            assert not env.step(np.zeros(2, np.float32))[2] or kind in ("move", "touch")
    assert all(np.mean(outcomes) >= 0.7 for outcomes in done.values())


def test_environments_of_a_kind_run_side_by_side():
    (env, other) = HLRPWorld("touch,edge", embodiments="hand").create_envs(2)["hlrp_world"].values()
    assert env.call("task") == ("touch", "touch") and other.call("task")[0] == "edge"
    observation, _ = env.reset(seed=[1, 2], options={NEW_ROLLOUT_OPTION: True})
    assert observation["pixels"].shape == (2, 64, 64, 3) and observation["agent_pos"].shape == (2, 2)
    assert len(set(env.call("task_description"))) == 2
    env.close()


@pytest.mark.parametrize("settings", [{"task": "dance"}, {"embodiments": "octopus"}, {"task": ""}, {"fps": 30}])
def test_settings_that_do_not_fit_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"env.{name}={value!r}"):
        HLRPWorld(**settings)


def test_a_policy_of_the_worlds_data_is_rolled_out_in_it(tmp_path):
    config = HLRPConfig(device="cpu", push_to_hub=False, image_size=32, chunk_size=4, n_action_steps=4)
    config.expert_dim, config.expert_depth = 32, 1
    config.input_features = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    policy = HLRPPolicy(config, dataset_meta=META)
    stats = {"action": {"mean": torch.zeros(2), "std": torch.ones(2)}}
    for part in (policy, *make_hlrp_pre_post_processors(config, stats)):
        part.save_pretrained(tmp_path / "policy")
    main(Args(str(tmp_path / "policy"), "hlrp_world", ("move", "touch"), 3, output_dir=tmp_path, batch_size=2))
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert {name: row["episodes"] for name, row in result["tasks"].items()} == {"move": 3, "touch": 3}
    assert len(list((tmp_path / "videos").rglob("*.mp4"))) == 2
