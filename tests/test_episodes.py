"""Episodes are the same however many environments run at once; a stub counts its resets as LIBERO does."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig, make_env, make_env_pre_post_processors
from lerobot.scripts.lerobot_eval import eval_policy_all

from hlrp.demonstrations import dicts
from hlrp.envs import env_configs, make_envs, no_questions
from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors
from hlrp.rollout import Args, main

PATTERN = [1, 0, 0, 1, 1, 0, 0, 0]  # which init states succeed
TASKS = ["stack the blocks"]
SIZES = {"observation.state": 3, "action": 2}


class Counting(gym.Env):
    """An episode of init state i lasts 2 + i % 3 steps. The state is chosen by a count of resets, as LIBERO's is."""

    observation_space = gym.spaces.Dict(
        {"pixels": gym.spaces.Box(0, 255, (16, 16, 3), np.uint8), "agent_pos": gym.spaces.Box(-1, 1, (3,), np.float64)}
    )
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 80}
    render_mode = "rgb_array"
    _max_episode_steps = 6
    task, task_description = "stack", "stack"

    def __init__(self, episode_index=0, n_envs=1, task="stack"):
        self.task = self.task_description = task
        self.init_state_id, self._reset_stride, self._init_states = episode_index, n_envs, PATTERN

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.init_state_id % len(PATTERN)
        self.init_state_id += self._reset_stride
        self.t = 0
        return self.observation(), {"is_success": False}

    def observation(self):
        return {"pixels": np.full((16, 16, 3), self.state, np.uint8), "agent_pos": np.zeros(3)}

    def step(self, action):
        self.t += 1
        ended = self.t >= 2 + self.state % 3
        return self.observation(), 1.0, ended, False, {"is_success": bool(ended and PATTERN[self.state])}

    def render(self):
        return self.observation()["pixels"]


class Bare(Counting):
    """Counts its resets under a name of its own, and each copy from 0 on."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.number = -1
        del self.init_state_id, self._reset_stride

    def reset(self, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.number = (self.number + 1) % len(PATTERN)
        self.state, self.t = self.number, 0
        return self.observation(), {"is_success": False}


class ShiftedSeed(Counting):
    """Moves the seed by the number of the environment, as RoboCasa does."""

    def __init__(self, episode_index=0, n_envs=1, task="stack"):
        super().__init__()
        self.index = episode_index
        del self.init_state_id, self._reset_stride

    def reset(self, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.state, self.t = (seed + self.index) % len(PATTERN), 0
        return self.observation(), {"is_success": False}


KINDS = {"libero": Counting, "bare": Bare, "shifted": ShiftedSeed}


@EnvConfig.register_subclass("counting")
@dataclass
class CountingConfig(EnvConfig):
    task: str = "libero"
    autoreset: str = "NEXT_STEP"
    features: dict = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (3,)),
            "pixels": PolicyFeature(FeatureType.VISUAL, (16, 16, 3)),
        }
    )
    features_map: dict = field(
        default_factory=lambda: {"action": "action", "agent_pos": "observation.state", "pixels": "observation.image"}
    )

    @property
    def gym_kwargs(self):
        return {}

    def create_envs(self, n_envs, use_async_envs=False):
        kind, _, mode = self.task.partition("/")
        made = [lambda i=i: KINDS[kind](i, n_envs, kind) for i in range(n_envs)]
        mode = gym.vector.AutoresetMode[mode or self.autoreset]
        return {"counting": {0: gym.vector.SyncVectorEnv(made, autoreset_mode=mode)}}


@EnvConfig.register_subclass("counting_one")
@dataclass
class OneTaskConfig(CountingConfig):
    """Made by LeRobot through gym.make: one task, as aloha and pusht."""

    task: str = "stack"
    package_name = "counting_one"
    create_envs = EnvConfig.create_envs


for name in ("stack", "sort"):
    gym.register(f"counting_one/{name}", Counting, kwargs={"task": name}, max_episode_steps=6)


def save(folder, tasks=TASKS, actions=2, states=3, camera="observation.image"):
    config = HLRPConfig(device="cpu", push_to_hub=False, image_size=16, chunk_size=2, n_action_steps=2)
    config.expert_dim, config.expert_depth = 32, 1
    config.input_features = {camera: PolicyFeature(FeatureType.VISUAL, (3, 16, 16))}
    config.input_features |= {"observation.state": PolicyFeature(FeatureType.STATE, (states,))}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (actions,))}
    policy = HLRPPolicy(config, instructions=tasks)
    sizes = {"observation.state": states, "action": actions}
    stats = {key: {"mean": torch.zeros(n), "std": torch.ones(n)} for key, n in sizes.items()}
    for part in (policy, *make_hlrp_pre_post_processors(config, stats)):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"))


def roll_out(policy, folder, task, batch_size, episodes=6, **settings) -> dict:
    settings = {"env": "counting", "videos": 0, "seed": 3} | settings
    main(Args(policy, tasks=(task,), episodes=episodes, batch_size=batch_size, output_dir=folder, **settings))
    return json.loads((folder / "rollout.json").read_text())


def of_lerobot(policy, task) -> list[bool]:
    """The successes that lerobot-eval counts with --eval.batch_size=1."""
    config = CountingConfig(task)
    envs, policy = make_env(config, n_envs=1), HLRPPolicy.from_pretrained(policy)
    processors = make_env_pre_post_processors(config, policy.config)
    stats = {key: {"mean": torch.zeros(n), "std": torch.ones(n)} for key, n in SIZES.items()}
    processors += make_hlrp_pre_post_processors(policy.config, stats)
    info = eval_policy_all(envs, policy, *processors, n_episodes=6, start_seed=3)
    return info["per_task"][0]["metrics"]["successes"]


@pytest.mark.parametrize(
    ("task", "states"),
    [
        ("libero", [0, 1, 2, 3, 4, 5]),
        ("libero/SAME_STEP", [0, 2, 4, 6, 0, 2]),  # where LeRobot resets at the end of an episode too
        ("bare", None),
        ("bare/SAME_STEP", None),
        ("shifted", None),
    ],
)
def test_episodes_are_those_of_lerobot_eval_with_one_environment_whatever_the_batch(saved, tmp_path, task, states):
    results = [roll_out(saved, tmp_path / str(n), task, n)["rows"] for n in (1, 3, 5)]
    assert results[0] == results[1] == results[2]
    assert [row["seed"] for row in results[0]] == [3, 4, 5, 6, 7, 8]
    assert [row["init_state"] for row in results[0]] == (states or [None] * 6)
    if states:
        assert [row["length"] for row in results[0]] == [2 + state % 3 for state in states]
        assert [row["return"] for row in results[0]] == [2 + state % 3 for state in states]
    theirs = of_lerobot(saved, task)
    assert [row["success"] for row in results[0]] == theirs and any(theirs) and not all(theirs)


def test_tasks_of_a_one_task_environment_run_one_after_another(saved, tmp_path):
    args = {"env": "counting_one", "tasks": ("stack", "sort"), "episodes": 3, "batch_size": 2}
    main(Args(saved, output_dir=tmp_path, **args))
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert {name: row["episodes"] for name, row in result["tasks"].items()} == {"stack": 3, "sort": 3}
    assert len([*(tmp_path / "videos").rglob("*.mp4")]) == 2


@pytest.mark.parametrize(
    ("tasks", "task_text", "told"),
    [
        (TASKS, None, TASKS[0]),
        (TASKS, "lift", "lift"),
        (["push", "pull"], None, "libero"),
        (["libero"], None, "libero"),
    ],
)
def test_the_policy_is_told_what_its_demonstrations_said_and_a_difference_is_said_once(
    tmp_path, capsys, monkeypatch, tasks, task_text, told
):
    policy, heard = save(tmp_path / "policy", tasks), set()
    predict = HLRPPolicy.predict_action_chunk
    monkeypatch.setattr(
        HLRPPolicy,
        "predict_action_chunk",
        lambda self, batch, *noise: heard.update(batch["task"]) or predict(self, batch, *noise),
    )
    roll_out(policy, tmp_path, "libero", 2, task_text=task_text)
    assert heard == {told}
    said = [line for line in capsys.readouterr().out.splitlines() if "the environment says" in line]
    assert len(said) == (tasks != ["libero"]) and all(f"the policy is told {told!r}" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"actions": 4}, {}, "the policy has 4 actions, counting 2"),
        ({"states": 5}, {}, "the policy reads 5 states, counting has 3"),
        (
            {"camera": "observation.images.top"},
            {},
            (
                "the policy sees observation.images.top, counting shows observation.image; "
                """--rename_map='{"observation.image": "observation.images.top"}' """
            ),
        ),
        ({}, {"task": "nothing"}, "env=counting, task=nothing cannot be made: 'nothing'"),
        ({}, {"env": "nothing"}, "'nothing' is not registered"),
        ({}, {"rename_map": {"front": "top"}}, "rename_map has 'front'; counting shows observation.image, "),
    ],
)
def test_a_policy_of_another_robot_is_refused_in_words(tmp_path, settings, more, message):
    policy = save(tmp_path, **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        roll_out(policy, tmp_path, **{"task": "libero", "batch_size": 1} | more)


def test_a_camera_is_renamed_as_the_message_says(tmp_path):
    policy = save(tmp_path, camera="observation.images.top")
    (_, *pair) = dicts(["--rename_map={observation.image:", "observation.images.top}"])  # as a shell leaves it
    assert roll_out(policy, tmp_path, "libero", 3, rename_map=dict([pair]))["all"]["episodes"] == 6


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (['--rename_map={"a": "b", "c": "d"}', "--seed", "1"], ["--rename_map", *"a b c d --seed 1".split()]),
        (["--rename_map", '{"a": "b"}'], ["--rename_map", "a", "b"]),
        (["--rename-map", "a", "b"], ["--rename-map", "a", "b"]),
        (["--rename_map={}"], ["--rename_map"]),
    ],
)
def test_dictionaries_are_understood_as_lerobots_messages_spell_them(given, understood):
    assert dicts(given) == understood


@pytest.mark.parametrize("given", ["--rename_map={a}", "--rename_map={a: [1]}", "--rename_map={a: b"])
def test_what_is_no_dictionary_is_named(given):
    with pytest.raises(ValueError, match="rename_map.*expected a dictionary"):
        dicts([given])


def test_a_question_on_standard_input_is_answered_by_no():
    with no_questions():
        assert input("Do you want to specify a custom path for the dataset folder? (Y/N): ") == "n"


def test_a_log_gets_a_line_for_each_task_and_no_bars(saved, tmp_path):
    code = f"""
import test_episodes
from hlrp.rollout import Args, main
main(Args({saved!r}, "counting", ("libero", "bare"), 6, 3, 2, videos=0))
"""
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables.pop("SLURM_JOB_ID", None)
    told = subprocess.run([sys.executable, "-c", code], env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "Running rollout" not in told.stderr and "\r" not in told.stderr and "Device" not in told.stderr
    assert "libero: 3 of 6 episodes succeed" in told.stdout


def test_plugins_that_add_environments_are_found(tmp_path, monkeypatch):
    plugin = tmp_path / "lerobot_env_counted.py"
    plugin.write_text(
        "from lerobot.envs import EnvConfig\n\n\n"
        '@EnvConfig.register_subclass("counted")\n'
        "class Counted(EnvConfig):\n    gym_kwargs = {}\n"
    )
    (tmp_path / "lerobot_env_counted-1.dist-info").mkdir()
    (tmp_path / "lerobot_env_counted-1.dist-info/METADATA").write_text("Name: lerobot_env_counted\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    (config,) = env_configs("counted")
    assert config.type == "counted"
    with pytest.raises(ValueError, match="env=counted, task=None cannot be made: Package 'gym_counted' required"):
        make_envs([config], 1, 1)
