"""Roll-outs in LeRobot's own environments, cut to a few steps, and in a stub that counts its resets as LIBERO does."""

import json
import os
import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig, make_env, make_env_pre_post_processors
from lerobot.scripts.lerobot_eval import eval_policy, eval_policy_all
from toys import META

from hlrp.demonstrations import dicts
from hlrp.envs import env_configs, make_envs, no_questions
from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors
from hlrp.rollout import Args, main, read_episodes, summary, table

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
def metaworld_policy(tmp_path):
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


def test_a_policy_is_rolled_out_in_seeded_episodes_of_each_task(short_episodes, metaworld_policy, tmp_path, capsys):
    args = Args(
        str(metaworld_policy),
        env="metaworld",
        tasks=("reach-v3", "door-open-v3"),
        episodes=2,
        seed=7,
        output_dir=tmp_path / "out",
    )
    args.rename_map = {"observation.image": "observation.images.corner2"}
    main(args)
    result = json.loads((tmp_path / "out/rollout.json").read_text())
    assert set(result["tasks"]) == {"reach-v3", "door-open-v3"} and result["all"]["episodes"] == 4
    assert result["latency_ms"]["chunks"] == 16 and result["latency_ms"]["p50"] > 0
    assert len([*(tmp_path / "out/videos").rglob("*.mp4")]) == 2
    assert "observation to chunk: p50" in capsys.readouterr().out


def test_a_camera_that_the_policy_does_not_know_is_named(short_episodes, metaworld_policy, tmp_path):
    with pytest.raises(ValueError, match="observation.images.corner2"):
        main(Args(str(metaworld_policy), env="metaworld", tasks=("reach-v3",), episodes=1, output_dir=tmp_path / "out"))


def rows_of(suite, task, outcomes, rewards=None):
    """Rows of episodes of one step each."""
    rewards = map(float, outcomes) if rewards is None else rewards
    kinds = ("success", "return", "max_reward")
    return [
        {"suite": suite, "task": task} | dict(zip(kinds, (outcome, reward, reward), strict=True))
        for outcome, reward in zip(outcomes, rewards, strict=True)
    ]


def test_the_summary_counts_each_task_and_all():
    rows = rows_of("s", "a", [True] * 8 + [False] * 2) + rows_of("s", "b", [False] * 10)
    result = summary(rows, [0.01, 0.02, 0.03])
    assert result["tasks"]["a"]["success"] == 0.8 and result["all"]["successes"] == 8
    assert result["tasks"]["a"]["interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert result["latency_ms"] == pytest.approx({"p50": 20, "p99": 29.8, "chunks": 3})
    assert deque(table(result).splitlines(), maxlen=2)[0].split() == ["all", "0.40", *"0.22 to 0.61 20".split()]
    assert "mean_of_suites" not in result and "return" not in table(result)


def test_the_mean_of_suites_counts_each_suite_alike_and_graded_rewards_are_shown():
    rows = rows_of("easy", "a", [True] * 3) + rows_of("easy", "b", [True, False, False])
    result = summary(rows + rows_of("hard", "c", [False] * 2, [0.25, 0.5]), [])
    assert {name: suite["success"] for name, suite in result["suites"].items()} == {"easy": 4 / 6, "hard": 0}
    assert result["mean_of_suites"] == pytest.approx(1 / 3) and result["all"]["success"] == 0.5
    assert result["tasks"]["c"]["return"] == 0.375 and result["tasks"]["c"]["max_reward"] == 0.375
    lines = [line.split() for line in table(result).splitlines()]
    assert [line[0] for line in lines] == ["task", "a", "b", "c", "easy", "hard", "all", "mean"]
    assert lines[3] == ["c", *"0.00 0.00 to 0.66 2 0.38 0.375".split()]
    assert lines[-1] == ["mean", "of", "suites", "0.333"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"episodes": 0}, "episodes=0"), ({"episodes": 2, "batch_size": 3}, "batch_size=3 is more than episodes=2")],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        main(Args("nowhere", **settings))


def test_lerobot_eval_counts_the_same_successes(metaworld_policy, tmp_path):
    flags = {"policy.path": metaworld_policy, "env.type": "hlrp_metaworld", "env.task": "drawer-close-v3", "seed": 7}
    flags |= {"eval.n_episodes": 2, "eval.batch_size": 2, "output_dir": tmp_path / "theirs"}
    main_of_lerobot = "from lerobot.scripts.lerobot_eval import main; main()"
    command = [sys.executable, "-c", main_of_lerobot, *(f"--{name}={value}" for name, value in flags.items())]
    variables = {"HF_HUB_OFFLINE": "1", "MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=os.environ | variables)
    (info,) = json.loads((tmp_path / "theirs/eval_info.json").read_text())["per_task"]

    args = {"tasks": ("drawer-close-v3",), "episodes": 2, "batch_size": 2, "seed": 7, "videos": 0}
    main(Args(str(metaworld_policy), output_dir=tmp_path / "ours", **args))
    ours = json.loads((tmp_path / "ours/rollout.json").read_text())["tasks"]["drawer-close-v3"]
    assert ours["successes"] == sum(info["metrics"]["successes"])


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
        super().__init__(*args, **kwargs)
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
        super().__init__(task=task)
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


def episodes_of(policy, folder, task, batch_size, **settings) -> list[dict]:
    roll_out(policy, folder, task, batch_size, **settings)
    return read_episodes(folder)[task.partition("/")[0]]


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
    results = [episodes_of(saved, tmp_path / str(n), task, n) for n in (1, 3, 5)]
    assert results[0] == results[1] == results[2]
    assert [row["seed"] for row in results[0]] == [3, 4, 5, 6, 7, 8]
    assert [row["init_state"] for row in results[0]] == (states or [None] * 6)
    if states:
        assert [row["length"] for row in results[0]] == [2 + state % 3 for state in states]
        assert [row["return"] for row in results[0]] == [2 + state % 3 for state in states]
    theirs = of_lerobot(saved, task)
    assert [row["success"] for row in results[0]] == theirs and any(theirs) and not all(theirs)


class Cut(Exception):
    pass


@pytest.mark.parametrize(
    ("task", "batch_size"), [("libero", 2), ("libero/SAME_STEP", 1), ("bare", 2), ("bare/SAME_STEP", 2)]
)
def test_a_run_that_was_cut_goes_on_and_its_table_is_that_of_a_whole_run(
    saved, tmp_path, monkeypatch, task, batch_size
):
    whole = roll_out(saved, tmp_path / "whole", task, batch_size, videos=3)
    num_batches = []

    def cut(*args, **kwargs):
        if len(num_batches) == 2:
            raise Cut
        num_batches.append(1)
        return eval_policy(*args, **kwargs)

    with monkeypatch.context() as context, pytest.raises(Cut):
        context.setattr("lerobot.scripts.lerobot_eval.eval_policy", cut)
        roll_out(saved, tmp_path / "cut", task, batch_size, videos=3)
    assert len(read_episodes(tmp_path / "cut")[task.partition("/")[0]]) == 2 * batch_size
    resumed = roll_out(saved, tmp_path / "cut", task, batch_size, videos=3)
    assert (tmp_path / "cut/episodes.csv").read_text() == (tmp_path / "whole/episodes.csv").read_text()
    assert resumed["tasks"] == whole["tasks"] and resumed["all"] == whole["all"]
    assert len([*(tmp_path / "cut/videos").rglob("*.mp4")]) == 3 and not [*(tmp_path / "cut").glob("*.partial")]


def test_the_table_of_episodes_is_read_by_others(saved, tmp_path):
    roll_out(saved, tmp_path, "libero", 2, episodes=3, videos=1)
    table = pd.read_csv(tmp_path / "episodes.csv")
    assert table.success.tolist() == PATTERN[:3] and table.length.tolist() == [2, 3, 4]
    assert table["return"].tolist() == [2.0, 3.0, 4.0] and table.max_reward.tolist() == [1.0] * 3
    assert table.suite.tolist() == ["counting"] * 3 and table.task.tolist() == ["libero"] * 3
    assert table.init_state.tolist() == table.episode.tolist() == [0, 1, 2] and table.seed.tolist() == [3, 4, 5]
    assert table.video.fillna("").tolist() == ["videos/counting_0/eval_episode_0.mp4", "", ""]
    assert (tmp_path / table.video[0]).is_file()


def test_more_episodes_and_tasks_come_to_those_that_are_there_but_none_of_other_settings(saved, tmp_path):
    whole = episodes_of(saved, tmp_path / "whole", "libero", 2)
    roll_out(saved, tmp_path / "out", "libero", 2, episodes=3)
    assert roll_out(saved, tmp_path / "out", "bare", 2, episodes=2)["all"]["episodes"] == 2
    assert episodes_of(saved, tmp_path / "out", "libero", 2) == whole
    assert set(read_episodes(tmp_path / "out")) == {"libero", "bare"}
    assert roll_out(saved, tmp_path / "out", "libero", 2, episodes=2)["all"]["episodes"] == 2  # the first ones
    with pytest.raises(ValueError, match=r"out holds episodes of other settings \(seed changed\)"):
        roll_out(saved, tmp_path / "out", "libero", 2, seed=4)
    with pytest.raises(ValueError, match=r"other settings \(policy changed\); give another --output-dir"):
        roll_out(save(tmp_path / "other"), tmp_path / "out", "libero", 2)


def test_a_policy_that_draws_noise_draws_that_of_the_episode_whatever_runs_beside_it(saved, tmp_path, monkeypatch):
    noise = {1: {}, 3: {}}
    predict = HLRPPolicy.predict_action_chunk

    def heard(policy, batch, samples):
        states = batch["observation.image"][:, 0, 0, 0].mul(255).round().int().tolist()
        for state, sample in zip(states, samples, strict=True):
            noise[len(states)].setdefault(state, []).append(sample)
        return predict(policy, batch, samples)

    monkeypatch.setattr(HLRPPolicy, "predict_action_chunk", heard)
    for batch_size in (1, 3):
        roll_out(saved, tmp_path / str(batch_size), "libero", batch_size)
    for state, samples in noise[1].items():
        assert len(samples) == -(-(2 + state % 3) // 2)  # a chunk of two actions each
        assert all(torch.equal(x, y) for x, y in zip(samples, noise[3][state][: len(samples)], strict=True))
    every = torch.stack([sample for samples in noise[1].values() for sample in samples])
    assert len(noise[1]) == 6 and len(every.unique(dim=0)) == len(every)


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
import test_rollout
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
