"""The environment that shows what the rendered data show."""

import os

import numpy as np
import pytest

os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it when it is imported
from lerobot.envs.utils import NEW_ROLLOUT_OPTION

from hlrp.envs import HLRPMetaWorld, MetaWorld
from hlrp.metaworld import Setting, lerobot_config, render_episode

TASK = "door-open-v3"


def make(task=TASK, size=32) -> MetaWorld:
    return MetaWorld(task, camera="corner2", image_size=size, fps=20)


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
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        HLRPMetaWorld(**settings)
