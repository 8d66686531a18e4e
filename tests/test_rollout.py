"""Roll-outs in LeRobot's own environments, cut to a few steps, and in a stub that counts its resets as LIBERO does."""

import json
import os
import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field, replace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.envs import EnvConfig, make_env, make_env_pre_post_processors
from lerobot.envs.configs import LiberoEnv
from lerobot.policies import make_pre_post_processors
from lerobot.scripts.lerobot_eval import eval_policy, eval_policy_all
from toys import META

import hlrp.envs
from hlrp.demonstrations import dicts
from hlrp.envs import env_configs, refuse_another_robot
from hlrp.envs_parallel import make_envs, no_questions
from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors
from hlrp.rollout import Args, env_flags, main, read_episodes, summary, table

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
    sizes = {"image_size": 32, "chunk_size": 4, "n_action_steps": 1, "expert_dim": 32, "expert_depth": 1}
    config = HLRPConfig(device="cpu", push_to_hub=False, action_head="l1", **sizes)  # without noise
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
    assert result["latency_ms"]["chunks"] == 15 and result["latency_ms"]["p50"] > 0
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


class Counting(gym.Env):
    """An episode of init state i lasts 2 + i % 3 steps. The state is chosen by a count of resets, as LIBERO's is."""

    observation_space = gym.spaces.Dict(
        {"pixels": gym.spaces.Box(0, 255, (16, 16, 3), np.uint8), "agent_pos": gym.spaces.Box(-1, 1, (3,), np.float64)}
    )
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 80}
    render_mode = "rgb_array"

    def __init__(self, episode_index=0, n_envs=1, task="stack", length=6):
        self.task, self.task_description, self._max_episode_steps = task, task, length
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

    def __init__(self, episode_index=0, n_envs=1, task="stack", length=6):
        super().__init__(task=task, length=length)
        self.index = episode_index
        del self.init_state_id, self._reset_stride

    def reset(self, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.state, self.t = (seed + self.index) % len(PATTERN), 0
        return self.observation(), {"is_success": False}


class Sums(Counting):
    """The return is the sum of all actions."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float(action.sum()), *rest


class Dies(Counting):
    def step(self, action):
        os._exit(3)


KINDS = {"libero": Counting, "bare": Bare, "shifted": ShiftedSeed, "sums": Sums, "dies": Dies}


@EnvConfig.register_subclass("counting")
@dataclass
class CountingConfig(EnvConfig):
    task: str = "libero"
    autoreset: str = "NEXT_STEP"
    episode_length: int | None = None
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
        made = [lambda i=i: KINDS[kind](i, n_envs, kind, self.episode_length or 6) for i in range(n_envs)]
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


def save(folder, tasks=TASKS, actions=2, states=3, camera="observation.image", head="flow", mean=0.0):
    torch.manual_seed(0)
    config = HLRPConfig(device="cpu", push_to_hub=False, image_size=16, chunk_size=2, n_action_steps=2)
    config.action_head = head
    config.expert_dim, config.expert_depth = 32, 1
    config.input_features = {camera: PolicyFeature(FeatureType.VISUAL, (3, 16, 16))}
    config.input_features |= {"observation.state": PolicyFeature(FeatureType.STATE, (states,))}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (actions,))}
    policy = HLRPPolicy(config, instructions=tasks)
    sizes = {"observation.state": states, "action": actions}
    stats = {key: {"mean": torch.full((n,), mean), "std": torch.ones(n)} for key, n in sizes.items()}
    for part in (policy, *make_hlrp_pre_post_processors(config, stats)):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"))


def roll_out(policy, folder, task, batch_size, episodes=6, **settings) -> dict:
    settings = {"env": "counting", "videos": 0, "seed": 3, "processes": 1} | settings
    main(Args(policy, tasks=(task,), episodes=episodes, batch_size=batch_size, output_dir=folder, **settings))
    return json.loads((folder / "rollout.json").read_text())


def episodes_of(policy, folder, task, batch_size, **settings) -> list[dict]:
    roll_out(policy, folder, task, batch_size, **settings)
    table = read_episodes(folder)  # Aloha calls its task by another name
    return table[task.partition("/")[0]] if len(table) > 1 else next(iter(table.values()))


def of_lerobot(policy, config, episodes=6) -> dict[str, list]:
    """What lerobot-eval counts with --eval.batch_size=1."""
    folder = policy
    envs, policy = make_env(config, n_envs=1), HLRPPolicy.from_pretrained(policy)
    processors = make_env_pre_post_processors(config, policy.config)
    processors += make_pre_post_processors(policy.config, pretrained_path=folder)
    policy.eval()
    info = eval_policy_all(envs, policy, *processors, n_episodes=episodes, start_seed=3)
    return info["per_task"][0]["metrics"]


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
    theirs = of_lerobot(saved, CountingConfig(task))["successes"]
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
        roll_out(save(tmp_path / "other", mean=1.0), tmp_path / "out", "libero", 2)


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


EXACT = ("task", "episode", "seed", "init_state", "success", "length")


@pytest.mark.parametrize(("env", "task"), [("counting", "sums"), ("hlrp_world", "move")])
def test_environments_in_several_processes_run_the_same_episodes_one_by_one(tmp_path, env, task):
    policy = save(tmp_path / "policy", states=3 if env == "counting" else 2, mean=0.6)
    alone = episodes_of(policy, tmp_path / "1", task, 1, env=env)
    beside = episodes_of(policy, tmp_path / "3", task, 3, env=env, processes=2, videos=1)
    assert [[row[key] for key in EXACT] for row in beside] == [[row[key] for key in EXACT] for row in alone]
    assert [row["return"] for row in beside] == pytest.approx([row["return"] for row in alone], rel=1e-4)
    assert len({(row["return"], row["length"]) for row in alone}) > 2
    assert (tmp_path / "3" / beside[0]["video"]).is_file()


def test_a_process_that_dies_is_told_and_what_does_not_exist_is_named_as_in_one_process(saved, tmp_path):
    with pytest.raises(RuntimeError, match="a process of environments has ended with exit code 3; with --processes 1"):
        roll_out(saved, tmp_path, "dies", 2, processes=2)
    with pytest.raises(ValueError, match="env=counting, task=nothing cannot be made: 'nothing'"):
        roll_out(saved, tmp_path, "nothing", 2, processes=2)


def test_pictures_that_the_policy_does_not_look_at_are_not_drawn(tmp_path, monkeypatch):
    policy, drawn = save(tmp_path / "policy", states=2, mean=0.6), []
    picture = hlrp.envs.world_picture
    monkeypatch.setattr("hlrp.envs.world_picture", lambda *args: drawn.append(1) or picture(*args))
    rows = episodes_of(policy, tmp_path / "few", "move", 2, env="hlrp_world", episodes=3)
    few, steps = len(drawn), sum(row["length"] for row in rows)
    assert few <= steps / 2 + 2 * len(rows)  # a chunk of two actions each
    assert episodes_of(policy, tmp_path / "all", "move", 2, env="hlrp_world", episodes=3, videos=3) == [
        row | {"video": f"videos/hlrp_world_0/eval_episode_{i}.mp4"} for i, row in enumerate(rows)
    ]
    assert len(drawn) - few >= steps + len(rows)


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("hlrp_world", {}),
        ("pusht", {"episode_length": "5"}),
        ("aloha", {"episode_length": "2", "observation_height": "480"}),
    ],
)
def test_one_command_runs_every_environment_and_its_episodes_are_those_of_lerobot_eval(tmp_path, env, settings):
    if env in ("pusht", "aloha"):
        pytest.importorskip(f"gym_{env}")
    size = 14 if env == "aloha" else 2
    camera = "observation.images.top" if env == "aloha" else "observation.image"
    policy = save(tmp_path / "policy", actions=size, states=size, camera=camera, head="l1", mean=0.6)
    task = {"hlrp_world": "move", "pusht": "PushT-v0", "aloha": "AlohaTransferCube-v0"}[env]
    (config,) = env_configs(env, [task], settings)
    theirs = of_lerobot(policy, config, episodes=3)
    rows = episodes_of(policy, tmp_path / "out", task, 1, env=env, env_settings=settings, episodes=3)
    assert [row["success"] for row in rows] == theirs["successes"]
    assert [row["return"] for row in rows] == theirs["sum_rewards"]
    assert [row["max_reward"] for row in rows] == theirs["max_rewards"]
    beside = episodes_of(policy, tmp_path / "3", task, 3, env=env, env_settings=settings, episodes=3)
    assert [row["return"] for row in beside] == pytest.approx(theirs["sum_rewards"], rel=1e-4)


@pytest.fixture
def libero(tmp_path, monkeypatch):
    """LeRobot's own environment of LIBERO, on a simulator without assets. Returns a policy for it."""
    stub = os.path.join(os.path.dirname(__file__), "data/libero_stub")
    monkeypatch.syspath_prepend(stub)
    monkeypatch.setenv("LIBERO_STUB", str(tmp_path / "libero"))
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        folder = tmp_path / "libero/init_states" / suite
        folder.mkdir(parents=True)
        for i in range(2):
            torch.save(np.arange(50.0).reshape(50, 1), folder / f"{suite}_{i}.pruned_init")
    config = HLRPConfig(device="cpu", push_to_hub=False, image_size=32, chunk_size=2, n_action_steps=2)
    config.expert_dim, config.expert_depth = 32, 1
    for camera in ("image", "image2"):
        config.input_features[f"observation.images.{camera}"] = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
    config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (8,))
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
    stats = {
        key: {"mean": torch.zeros(n), "std": torch.ones(n)} for key, n in (("observation.state", 8), ("action", 7))
    }
    for part in (HLRPPolicy(config, instructions=[*TASKS, "lift"]), *make_hlrp_pre_post_processors(config, stats)):
        part.save_pretrained(tmp_path / "policy")
    yield str(tmp_path / "policy")
    for name in [name for name in sys.modules if name.split(".")[0] == "libero" or name == "lerobot.envs.libero"]:
        del sys.modules[name]


def test_libero_is_tried_as_published(libero, tmp_path, monkeypatch):
    seen = []
    predict = HLRPPolicy.predict_action_chunk
    monkeypatch.setattr(
        HLRPPolicy,
        "predict_action_chunk",
        lambda self, batch, *noise: seen.append(batch) or predict(self, batch, *noise),
    )
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    size = {"observation_height": "32", "observation_width": "32"}
    envs = make_envs(env_configs("libero", suites, size), 1, 1)
    assert {suite: len(tasks) for suite, tasks in envs.items()} == dict.fromkeys(suites, 2)
    assert [envs[suite][0].call("_max_episode_steps") for suite in suites] == [(280,), (280,), (300,), (520,)]
    settings = size | {"episode_length": "5", "task_ids": "[1]"}
    args = {"env": "libero", "env_settings": settings, "seed": 7, "videos": 0, "episodes": 5}
    tables = []
    for batch_size, processes in ((1, 1), (3, 1), (3, 2)):
        folder = tmp_path / f"{batch_size}{processes}"
        main(Args(libero, tasks=suites, batch_size=batch_size, processes=processes, output_dir=folder, **args))
        tables.append((folder / "episodes.csv").read_text())
    assert tables[0] == tables[1] == tables[2]
    result, table = json.loads((folder / "rollout.json").read_text()), pd.read_csv(folder / "episodes.csv")
    assert table.init_state.tolist() == [0, 1, 2, 3, 4] * 4 and table.seed.tolist() == [7, 8, 9, 10, 11] * 4
    assert table.success.tolist() == [1, 0, 1, 0, 1] * 4 and table.length.tolist() == [3, 5, 3, 5, 3] * 4
    assert table.task.unique().tolist() == [f"{suite}_task_1" for suite in suites]
    assert [suite["success"] for suite in result["suites"].values()] == [0.6] * 4 and result["mean_of_suites"] == 0.6

    first = seen[0]  # of init state 0, in the first suite
    assert first["task"] == ["do task 1 of libero_spatial"]
    for camera, value in (("image", 1), ("image2", 101)):
        picture = first[f"observation.images.{camera}"][0].mul(255).round()
        assert picture[:, -1, -1].tolist() == [value] * 3 and picture.sum() == 3 * value  # upright
    expected = [0.1, 0.2, 0.3, 0, 0, np.pi / 2, 0.04, -0.04]  # position, axis-angle, fingers
    assert first["observation.state"][0].tolist() == pytest.approx(expected, abs=1e-5)


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
        ({}, {"env": "nothing"}, "env.type=nothing; expected one of "),
        (
            {},
            {"env_settings": {"episode_lenght": "3"}},
            "env.episode_lenght is no setting of counting; there are task, fps",
        ),
        ({}, {"rename_map": {"front": "top"}}, "rename_map has 'front'; counting shows observation.image, "),
    ],
)
def test_a_policy_of_another_robot_is_refused_in_words(tmp_path, settings, more, message):
    policy = save(tmp_path, **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        roll_out(policy, tmp_path, **{"task": "libero", "batch_size": 1} | more)


def test_cameras_that_the_policy_does_not_see_are_named_once(libero, tmp_path, capsys):
    config = PreTrainedConfig.from_pretrained(libero)
    del config.input_features["observation.images.image2"]
    envs = make_envs(env_configs("libero", ["libero_goal"]), 1, 1)
    refuse_another_robot(config, envs, {})
    told = "libero shows observation.images.image2, which the policy does not see"
    assert capsys.readouterr().out.count(told) == 1
    refuse_another_robot(PreTrainedConfig.from_pretrained(libero), envs, {})
    assert told not in capsys.readouterr().out


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


def test_settings_of_an_environment_are_those_of_lerobots_command_line():
    settings = {"task_ids": "[0,1]", "episode_length": "280", "observation_height": "256", "init_states": "false"}
    settings |= {"control_mode": "absolute", "camera_name_mapping": '{"agentview_image": "front"}'}
    expected = LiberoEnv("libero_object", task_ids=[0, 1], episode_length=280, observation_height=256)
    mapping = {"agentview_image": "front"}
    expected = replace(expected, init_states=False, control_mode="absolute", camera_name_mapping=mapping)
    assert env_configs("libero", ["libero_object"], settings) == [expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"episode_lenght": "280"},
            r"env.episode_lenght is no setting of libero; there are task, fps, .*episode_length",
        ),
        ({"task_ids": "x"}, "env.task_ids=x: .*'x' is not of a valid input for a list"),
        ({"init_states": "maybe"}, "env.init_states=maybe: .*Couldn't parse 'maybe' into a bool"),
        ({"fps": "0"}, "env.fps=0: fps must be positive, got 0"),
    ],
)
def test_a_setting_that_an_environment_does_not_have_is_named_with_those_that_it_has(settings, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        env_configs("libero", (), settings)


def test_the_flags_of_lerobot_eval_are_understood(saved, tmp_path):
    renamed = {"policy.path": "policy", "env.type": "env", "env.task": "tasks"}
    given = ["--policy.path=P", "--env.type", "libero", "--env.task=a,b", "--env.task_ids=[0, 1]", "--seed", "1"]
    given += ["--env.episode-length", "280", "--env.init_states=false"]
    rest, settings = env_flags(given, renamed)
    assert rest == ["--policy=P", "--env", "libero", "--tasks=a,b", "--seed", "1"]
    assert settings == ["task_ids", "[0, 1]", "episode_length", "280", "init_states", "false"]
    with pytest.raises(ValueError, match="--env.init_states has no value; expected --env.init_states=VALUE"):
        env_flags(["--env.init_states", "--seed", "1"], {})
    flags = ["--policy.path", saved, "--env.type=counting", "--env.task=libero,bare", "--env.episode_length=1"]
    flags += ["--eval.n_episodes=2", "--eval.batch_size=1", "--videos", "0", "--output_dir", tmp_path]
    code = "import runpy, test_rollout; runpy.run_module('hlrp.rollout', run_name='__main__')"
    assert python(code, *flags, cwd=tmp_path).returncode == 0
    rows = [row for rows in read_episodes(tmp_path).values() for row in rows]
    assert [(row["task"], row["length"]) for row in rows] == [("libero", 1)] * 2 + [("bare", 1)] * 2


@pytest.mark.parametrize("given", ["--rename_map={a}", "--rename_map={a: [1]}", "--rename_map={a: b"])
def test_what_is_no_dictionary_is_named(given):
    with pytest.raises(ValueError, match="rename_map.*expected a dictionary"):
        dicts([given])


def python(code, *flags, cwd):
    """Runs a program that can import this file."""
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables.pop("SLURM_JOB_ID", None)
    return subprocess.run([sys.executable, "-c", code, *flags], env=variables, cwd=cwd, capture_output=True, text=True)


def test_a_question_on_standard_input_is_answered_by_no():
    with no_questions():
        assert input("Do you want to specify a custom path for the dataset folder? (Y/N): ") == "n"


def test_a_log_gets_a_line_for_each_task_and_no_bars(saved, tmp_path):
    code = f"""
import test_rollout
from hlrp.rollout import Args, main
main(Args({saved!r}, "counting", ("libero", "bare"), episodes=6, seed=3, batch_size=2, videos=0))
"""
    told = python(code, cwd=tmp_path)
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
