"""The environments show what the data show."""

import json
import os

import numpy as np
import pytest
import torch

os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it when it is imported
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from toys import META

from hlrp.envs import SEED, HLRPMetaWorld, HLRPWorld, MetaWorld, WorldEnv
from hlrp.metaworld import Setting, lerobot_config, render_episode
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
def test_wrong_settings_of_the_world_are_named(settings):
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
    main(Args(str(tmp_path / "policy"), "hlrp_world", ("move", "touch"), episodes=3, output_dir=tmp_path, batch_size=2))
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert {name: row["episodes"] for name, row in result["tasks"].items()} == {"move": 3, "touch": 3}
    assert len(list((tmp_path / "videos").rglob("*.mp4"))) == 2


TASK = "door-open-v3"


def make(task=TASK, size=32, distractors=False) -> MetaWorld:
    return MetaWorld(task, camera="corner2", image_size=size, fps=20, distractors=distractors)


def test_the_actions_of_a_rendered_episode_lead_through_its_frames_to_success():
    setting = Setting(("corner2",), 32, action_repeat=4, noise=0.0, seed=0)
    episode = render_episode(setting, TASK, 0)
    rng = np.random.default_rng([setting.seed, lerobot_config()["TASK_NAME_TO_ID"][TASK], 0, 0])
    env = make()
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    for t, action in enumerate(episode.action):
        assert np.array_equal(observation["pixels"]["corner2"], episode.frames["corner2"][t])
        np.testing.assert_allclose(observation["agent_pos"], episode.state[t], atol=1e-6)
        observation, _, terminated, truncated, info = env.step(action)
    assert terminated and info["is_success"] and not truncated
    env.close()


def test_a_seed_places_objects_as_in_lerobots_own_environment():
    from lerobot.envs.metaworld import MetaworldEnv

    theirs = MetaworldEnv(TASK, obs_type="pixels_agent_pos", observation_width=32, observation_height=32)
    ours, places = make(), []
    for seed in (3, 4):
        ours.reset(seed=seed)
        theirs.reset(seed=seed)
        assert np.array_equal(ours.env._target_pos, theirs._env._target_pos)
        assert np.array_equal(ours.env.data.qpos, theirs._env.data.qpos)
        places.append(ours.env._target_pos)
    assert not np.array_equal(*places)
    ours.close()
    theirs.close()


def test_distractors_are_those_of_the_seed():
    pictures = []
    for has_them, seed in ((True, 3), (True, 3), (True, 4), (False, 3)):
        env = make(distractors=has_them)
        env.reset(seed=seed)
        pictures.append(env.step(np.zeros(4, np.float32))[0]["pixels"]["corner2"].astype(int))
        env.close()
    assert np.array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0] - pictures[2]).mean() > 2 and np.abs(pictures[0] - pictures[3]).mean() > 2


def test_environments_of_a_task_run_side_by_side_and_end_alone(monkeypatch):
    monkeypatch.setattr("hlrp.envs.MAX_STEPS", 12)
    (first, second) = HLRPMetaWorld("reach-v3,door-open-v3", image_size=32).create_envs(2)["hlrp_metaworld"].values()
    assert first.call("task") == ("reach-v3", "reach-v3") and second.call("task")[0] == "door-open-v3"
    observation, _ = first.reset(seed=[1, 2], options={NEW_ROLLOUT_OPTION: True})
    assert observation["pixels"]["corner2"].shape == (2, 32, 32, 3) and observation["agent_pos"].shape == (2, 4)
    for _ in range(3):
        *_, truncated, _ = first.step(np.zeros((2, 4), dtype=np.float32))
    assert truncated.all()
    first.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": 30}, "env.fps=30; expected a divisor of 80"),
        ({"camera": "nose"}, "env.camera='nose'; expected one of corner"),
        ({"image_size": 8}, "env.image_size=8"),
    ],
)
def test_wrong_settings_of_metaworld_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        HLRPMetaWorld(**settings)
