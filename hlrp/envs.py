"""Environments of LeRobot's: found by name, compared with a policy before it runs, and run side by side.

However many run at once, episode k is the one that `lerobot-eval --eval.batch_size=1` counts as k: it has the same
seed, and the same resets lie before it, which in LIBERO choose the init state.

The MetaWorld of `hlrp.metaworld` as an environment of LeRobot's: `lerobot-eval --env.type=hlrp_metaworld`.

It shows what the rendered data show: the same view, size and light, 20 frames and actions a second, for as long as
LeRobot's own environment lasts. That one draws 80 frames a second, of 480 pixels with shadows. A seed places the
objects alike in both.

The built-in world as an environment of LeRobot's: `lerobot-eval --env.type=hlrp_world --env.task=touch,edge`.

It shows what `world:` shows and moves as it does, in scenes that no `world:` source has, and needs no simulator.
"""

import io
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.envs import EnvConfig, make_env, make_env_config, preprocess_observation
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE, OBS_STR
from lerobot.utils.import_utils import register_third_party_plugins

from hlrp.metaworld import CAMERAS, CONTROL_FREQ, MAX_STEPS, lerobot_config, parse_tasks, picture, stage
from hlrp.world import (
    EMBODIMENTS,
    FPS,
    IMAGE_SIZE,
    KINDS,
    MAX_LENGTH,
    MAX_SPEED,
    is_done,
    moved,
    normalised,
    pushed,
    simulate,
)
from hlrp.world import picture as world_picture

SEED = 2**40  # of its scenes, beyond those of sources
TOLERANCE = {"move": 3.0, "touch": 3.0, "edge": 0.5, "block": 0.5}  # of success [pixel]


@EnvConfig.register_subclass("hlrp_world")
@dataclass
class HLRPWorld(EnvConfig):
    task: str = ",".join(dict.fromkeys(KINDS))  # kinds, by commas: move to an edge, touch, push to an edge or a block
    fps: int = FPS
    embodiments: str = ",".join(EMBODIMENTS)  # of which each episode shows one
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (2,)),
            "pixels": PolicyFeature(FeatureType.VISUAL, (IMAGE_SIZE, IMAGE_SIZE, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {"action": ACTION, "agent_pos": OBS_STATE, "pixels": OBS_IMAGE}
    )

    def __post_init__(self):
        for name, fits in (("task", KINDS), ("embodiments", EMBODIMENTS)):
            value = getattr(self, name)
            if not value or set(value.split(",")) - set(fits):
                raise ValueError(f"env.{name}={value!r}; expected some of {', '.join(dict.fromkeys(fits))}, by commas")
        if self.fps != FPS:
            raise ValueError(f"env.fps={self.fps}; the world has {FPS}")

    @property
    def gym_kwargs(self) -> dict:
        return {"embodiments": tuple(self.embodiments.split(","))}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        vectorized = gym.vector.AsyncVectorEnv if use_async_envs and n_envs > 1 else gym.vector.SyncVectorEnv

        def make(kind: str) -> gym.vector.VectorEnv:
            return vectorized([freeze_after_episode_end(lambda: WorldEnv(kind, **self.gym_kwargs))] * n_envs)

        return {self.type: {i: make(kind) for i, kind in enumerate(self.task.split(","))}}


class WorldEnv(gym.Env):
    """One kind of task. observation: pixels uint8 (h, w, c), agent_pos float64 (2,); action float32 (2,) in [-1, 1],
    the velocity of the tip, as `hlrp.world.World` has them.

    The episode ends when the task is done, or after 48 frames, as long as those of the source.
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": FPS}
    render_mode = "rgb_array"
    observation_space = gym.spaces.Dict(
        {
            "pixels": gym.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
            "agent_pos": gym.spaces.Box(-1, 1, (2,), np.float64),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    _max_episode_steps = MAX_LENGTH

    def __init__(self, task: str, embodiments: tuple[str, ...] = EMBODIMENTS):
        self.task, self.embodiments, self.task_description = task, embodiments, ""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        group = int(self.np_random.integers(2**31)) if seed is None else seed
        self.scene = simulate(SEED, group)
        self.i = int(np.argmax(self.scene.kind == self.task))
        self.task_description = self.scene.task[self.i]
        self.embodiment = self.embodiments[int(self.scene.embodiment[self.i] * len(self.embodiments))]
        self.tip, self.blocks = self.scene.tip[self.i, :1], self.scene.blocks[self.i, :1]
        self.num_steps = 0
        return self.observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.tip = moved(self.tip, action.clip(-1, 1) * np.float32(MAX_SPEED / FPS))
        self.blocks = pushed(self.tip, self.blocks)
        self.num_steps += 1
        here = slice(self.i, self.i + 1)
        goal = self.scene.edge[here], self.scene.kind[here]
        success = bool(is_done(self.tip, self.blocks, *goal, TOLERANCE[self.task])[0])
        truncated = self.num_steps >= MAX_LENGTH
        return self.observation(), float(success), success, truncated, {"is_success": success}

    def observation(self) -> dict:
        frame = world_picture(self.scene, self.i, self.embodiment, self.tip, self.blocks)[0]
        self.image = frame.permute(1, 2, 0).numpy()
        return {"pixels": self.image, "agent_pos": normalised(self.tip)[0].double().numpy()}

    def render(self) -> np.ndarray:
        return self.image


@EnvConfig.register_subclass("hlrp_metaworld")
@dataclass
class HLRPMetaWorld(EnvConfig):
    # names (door-open-v3) and groups (mt10, mt50, easy, medium, hard, very_hard), by commas
    task: str = "mt10"
    fps: int = 20  # frames and actions a second; an action is held for 80 / fps steps of the simulator
    camera: str = "corner2"
    image_size: int = 128  # height and width of a frame [pixel]
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.fps < 1 or CONTROL_FREQ % self.fps:
            raise ValueError(f"env.fps={self.fps}; expected a divisor of {CONTROL_FREQ}")
        if self.camera not in CAMERAS:
            raise ValueError(f"env.camera={self.camera!r}; expected one of {', '.join(CAMERAS)}")
        if self.image_size < 16:
            raise ValueError(f"env.image_size={self.image_size}; expected 16 or more")
        view = f"pixels/{self.camera}"
        self.features_map = {"action": ACTION, "agent_pos": OBS_STATE, view: f"{OBS_IMAGES}.{self.camera}"}
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (4,)),
            view: PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3)),
        }

    @property
    def gym_kwargs(self) -> dict:
        return {"camera": self.camera, "image_size": self.image_size, "fps": self.fps}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        vectorized = gym.vector.AsyncVectorEnv if use_async_envs and n_envs > 1 else gym.vector.SyncVectorEnv

        def make(task: str) -> gym.vector.VectorEnv:
            return vectorized([freeze_after_episode_end(lambda: MetaWorld(task, **self.gym_kwargs))] * n_envs)

        return {self.type: {i: make(task) for i, task in enumerate(parse_tasks(self.task))}}


class MetaWorld(gym.Env):
    """One task. observation: pixels {camera: uint8 (h, w, c)}, agent_pos float64 (4,); action float32 (4,) in [-1, 1].

    The episode ends with the first success, or after 500 steps of the simulator.
    """

    def __init__(self, task: str, camera: str, image_size: int, fps: int):
        self.task, self.camera, self.image_size = task, camera, image_size
        self.task_description = lerobot_config()["TASK_DESCRIPTIONS"][task]
        self.action_repeat = CONTROL_FREQ // fps
        self._max_episode_steps = MAX_STEPS // self.action_repeat
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        self.render_mode = "rgb_array"
        pixels = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict({camera: pixels}),
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64),
            }
        )
        self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
        self.env = self.renderer = None  # made in the process that uses them

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if self.env is None:
            self.env, self.renderer = stage(self.task, self.image_size)
        if seed is not None:
            self.env.seed(seed)
        state, _ = self.env.reset(seed=seed)
        self.num_steps = 0
        return self.observation(state), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        success, reward = False, 0.0
        for _ in range(self.action_repeat):
            state, step_reward, _, _, info = self.env.step(action.clip(-1, 1))
            success |= bool(info["success"])
            reward += float(step_reward)
        self.num_steps += 1
        truncated = self.num_steps >= self._max_episode_steps
        return self.observation(state), reward, success, truncated, {"is_success": success}

    def observation(self, state: np.ndarray) -> dict:
        self.image = picture(self.renderer, self.env.data, self.camera)
        return {"pixels": {self.camera: self.image}, "agent_pos": state[:4]}

    def render(self) -> np.ndarray:
        return self.image

    def close(self) -> None:
        if self.env is not None:
            self.renderer.close()
            self.env = self.renderer = None


def env_configs(type: str, tasks: Sequence[str] = ()) -> list[EnvConfig]:
    """LeRobot's configuration of an environment for each of some tasks; by default for its own choice.

    Raises ValueError where no environment, of LeRobot or of an installed plugin, has this name.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo, which reads it when it is imported, draws without a screen
    register_third_party_plugins()
    return [make_env_config(type, task=task) for task in tasks] or [make_env_config(type)]


def make_envs(configs: Sequence[EnvConfig], num_envs: int, episodes: int) -> dict[str, dict[int, "SideBySide"]]:
    """The tasks of some configurations, as LeRobot's `eval_policy_all` takes them.

    Raises ValueError where one cannot be made, as for an unknown task.
    """
    made: dict[str, dict[int, SideBySide]] = {}
    for config in configs:
        try:
            with no_questions():
                copies = [make_env(config, n_envs=1) for _ in range(min(num_envs, episodes))]
        except (gym.error.Error, ImportError, LookupError) as error:
            raise ValueError(f"env={config.type}, task={config.task} cannot be made: {error}") from error
        for group, tasks in copies[0].items():
            known = made.setdefault(group, {})
            for i in tasks:
                free = len(known) if i in known else i
                known[free] = SideBySide([copy[group][i] for copy in copies], config, episodes)
    return made


@contextmanager
def no_questions() -> Iterator[None]:
    """A question on standard input, such as LIBERO's at its first import, is answered by no."""
    stdin, sys.stdin = sys.stdin, io.StringIO("n\n" * 100)
    try:
        yield
    finally:
        sys.stdin = stdin


class SideBySide(gym.vector.VectorEnv):
    """`copies` of the environment that LeRobot makes for one episode at a time. Each runs every len(copies)-th of
    `episodes` and stands still once its episode has ended.

    `rows` says of each episode: seed, init_state (None where the environment has none), success, return, max_reward,
    length. Rows that are there before the first reset are of episodes that need not run again.
    """

    def __init__(self, copies: Sequence[gym.vector.VectorEnv], config: EnvConfig, episodes: int):
        self.copies, self.num_envs, self.config, self.episodes = list(copies), len(copies), config, episodes
        self.single_action_space = copies[0].single_action_space
        self.metadata = copies[0].metadata | {"render_fps": config.fps}  # LIBERO's own is not that of its steps
        self.task = str(attribute(copies[0], "task") or config.task or config.type)
        self.task_text: str | None = None  # what the policy is told in place of the environment's own words
        self.learned: Sequence[str] = ()  # the instructions that the policy knows
        self.is_compared = False
        self.rows: list[dict] = []
        self.passed = [0] * self.num_envs  # episodes that lie behind each copy
        self.counters: set[str] | None = None  # what a reset moves on; None: no reset has shown it yet

    def reset(self, *, seed: list[int] | None = None, options: dict | None = None) -> tuple[dict, dict]:
        first, self.observations, self.running = len(self.rows), [], []
        self.frames: list[np.ndarray | None] = [None] * self.num_envs
        for i in range(min(self.num_envs, self.episodes - first)):
            episode_seed = None if seed is None else seed[i]
            self.catch_up(i, first + i, episode_seed, options)
            row = {"seed": episode_seed, "init_state": init_state(self.copies[i]), "success": False}
            self.running.append(row | {"return": 0.0, "max_reward": -np.inf, "length": 0})
            self.observations.append(self.reset_copy(i, episode_seed, options))
        self.rows += self.running
        idle = self.num_envs - len(self.running)  # past the last episode
        self.observations += self.observations[:1] * idle
        self.is_done = np.array([False] * len(self.running) + [True] * idle)
        return stacked(self.observations), {}

    def reset_copy(self, i: int, seed: int | None, options: dict | None) -> dict:
        """The first observation of a copy's next episode. The first reset of all shows what resets count."""
        copy = self.copies[i]
        before = plain_attributes(copy) if self.counters is None else {}
        observation, _ = copy.reset(seed=[seed], options=options)
        if self.counters is None:
            after = plain_attributes(copy)
            self.counters = {name for name, value in before.items() if repr(after.get(name)) != repr(value)}
        self.passed[i] += 1
        return observation

    def catch_up(self, i: int, episode: int, seed: int | None, options: dict | None) -> None:
        """Brings a copy to where it is before `episode` if it has run all those before."""
        copy = self.copies[i]
        is_twice = copy.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.SAME_STEP  # at the end, too
        stride = attribute(copy, "_reset_stride")  # LeRobot's: of LIBERO and RoboTwin
        while (missed := episode - self.passed[i]) and self.counters != set():
            if self.counters is not None and stride is not None:
                for name in {"init_state_id", "episode_index"} & self.counters:
                    copy.set_attr(name, [attribute(copy, name) + missed * stride * (1 + is_twice)])
                break
            self.reset_copy(i, None if seed is None else seed - missed, options)
            if is_twice:
                copy.reset(options=options)
        self.passed[i] = episode

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        rewards, successes = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        terminated, truncated = np.ones(self.num_envs, dtype=bool), np.zeros(self.num_envs, dtype=bool)
        for i in np.flatnonzero(~self.is_done):
            self.observations[i], reward, end, cut, info = self.copies[i].step(actions[i : i + 1])
            rewards[i], terminated[i], truncated[i] = reward[0], end[0], cut[0]
            successes[i] = np.ravel(info.get("final_info", info).get("is_success", False))[0]
            row = self.running[i]
            row["success"] |= bool(successes[i])
            row["return"] += float(rewards[i])
            row["max_reward"] = max(row["max_reward"], float(rewards[i]))
            row["length"] += 1
        self.is_done |= terminated | truncated
        return stacked(self.observations), rewards, terminated, truncated, {"is_success": successes}

    def call(self, name: str, *args, **kwargs) -> tuple:
        if name in ("task", "task_description"):
            return tuple(self.told(copy) for copy in self.copies)
        if name == "render":
            for i in range(len(self.running)):
                if self.frames[i] is None or not self.is_done[i]:
                    self.frames[i] = self.copies[i].call("render")[0]
            return tuple(self.frames[0] if frame is None else frame for frame in self.frames)
        return tuple(copy.call(name, *args, **kwargs)[0] for copy in self.copies)

    def get_attr(self, name: str) -> tuple:
        return self.call(name)

    def told(self, copy: gym.vector.VectorEnv) -> str:
        """The instruction: `task_text`, or the only one that the policy has learned, or the environment's own words."""
        own = attribute(copy, "task_description")
        own = attribute(copy, "task") or "" if own is None else own
        only = self.learned[0] if len(self.learned) == 1 else None
        text = next(text for text in (self.task_text, only, own) if text is not None)
        if not self.is_compared and (text != own or (self.learned and text not in self.learned)):
            self.is_compared = True
            examples = ", ".join(map(repr, self.learned[:3])) + (", ..." if len(self.learned) > 3 else "")
            learned = (
                f"; its demonstrations have {len(self.learned)} instruction(s), {examples}" if self.learned else ""
            )
            advice = "; --task-text gives another" if self.task_text is None else ""
            print(
                f"{self.task}: the environment says {own!r}, the policy is told {text!r}{learned}{advice}", flush=True
            )
        return text

    def close(self, **kwargs) -> None:
        if self.rows and not sys.stderr.isatty():  # where no bar shows how far it is
            successes = sum(row["success"] for row in self.rows)
            print(f"{self.task}: {successes} of {len(self.rows)} episodes succeed", flush=True)
        for copy in self.copies:
            copy.close()


def attribute(env: gym.vector.VectorEnv, name: str):
    """Of the environment in a vector of one; None where it has none such."""
    try:
        return env.get_attr(name)[0]
    except AttributeError:
        return None


def init_state(env: gym.vector.VectorEnv) -> int | None:
    """Which of LIBERO's init states the next episode begins in."""
    state, states = attribute(env, "init_state_id"), attribute(env, "_init_states")
    if state is None or attribute(env, "init_states") is False:
        return None
    return int(state) if states is None else int(state) % len(states)


def plain_attributes(env: gym.vector.VectorEnv) -> dict[str, object]:
    """What an environment in a vector of one may count its resets by."""
    (env,) = getattr(env, "envs", (None,))
    found = {}
    while env is not None:
        kinds = (int, float, str, tuple, list, deque, itertools.count)
        for name, value in vars(env).items():
            if isinstance(value, kinds) and not isinstance(value, bool):
                found.setdefault(name, value if isinstance(value, int) else repr(value))
        env = env.env if isinstance(env, gym.Wrapper) else None
    return found


def stacked(observations: Sequence):
    """Observations of one environment each, in nested dictionaries -> of all, along the first axis."""
    if len(observations) == 1:
        return observations[0]
    if isinstance(observations[0], dict):
        return {key: stacked([observation[key] for observation in observations]) for key in observations[0]}
    return np.concatenate(observations)


def refuse_another_robot(policy: PreTrainedConfig, env: SideBySide, rename_map: dict[str, str]) -> None:
    """Raises ValueError where a policy has other actions than the environment, or sees what that does not show."""
    name, actions = env.config.type, int(np.prod(env.single_action_space.shape))
    if policy.action_feature is not None and policy.action_feature.shape[0] != actions:
        raise ValueError(f"the policy has {policy.action_feature.shape[0]} actions, {name} {actions}")
    preprocess, _ = env.config.get_env_processors()
    shown = preprocess(preprocess_observation(env.copies[0].observation_space.sample()))
    shown = {key: value for key, value in shown.items() if key.startswith(OBS_STR)}
    if strangers := sorted(rename_map.keys() - shown.keys()):
        raise ValueError(f"rename_map has {strangers[0]!r}; {name} shows {', '.join(sorted(shown))}")
    shown = {rename_map.get(key, key): value for key, value in shown.items()}

    cameras = {key for key in shown if key.startswith(OBS_IMAGE)}
    missing = sorted(policy.image_features.keys() - cameras)
    if missing and (policy.type == "hlrp" or cameras - policy.image_features.keys()):
        free = sorted(cameras - policy.image_features.keys())
        hint = f"; --rename_map='{json.dumps({free[0]: missing[0]})}' gives one the name of the other" if free else ""
        found = ", ".join(sorted(cameras)) or "no camera"
        raise ValueError(f"the policy sees {', '.join(missing)}, {name} shows {found}{hint}")
    if policy.robot_state_feature is not None:
        (states,) = policy.robot_state_feature.shape
        found = shown[OBS_STATE].shape[-1] if OBS_STATE in shown else 0
        if found != states:
            raise ValueError(f"the policy reads {states} states, {name} has {found}")
