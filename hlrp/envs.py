"""Environments of LeRobot's: found by name, compared with a policy before it runs; and two of hlrp's own.

The MetaWorld of `hlrp.metaworld` as an environment of LeRobot's: `lerobot-eval --env.type=hlrp_metaworld`.

It shows what the rendered data show: the same view, size and light, 20 frames and actions a second, for as long as
LeRobot's own environment lasts. That one draws 80 frames a second, of 480 pixels with shadows. A seed places the
objects alike in both.

The built-in world as an environment of LeRobot's: `lerobot-eval --env.type=hlrp_world --env.task=touch,edge`.

It shows what `world:` shows and moves as it does, in scenes that no `world:` source has, and needs no simulator.

Both show the last picture again while `is_drawn` is False: drawing takes most of the time, and a policy that executes
several actions of a chunk looks at few pictures.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar

import draccus
import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.envs import EnvConfig, preprocess_observation
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE, OBS_STR
from lerobot.utils.import_utils import register_third_party_plugins

from hlrp.envs_parallel import SideBySide
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
    is_drawn = True

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
        if self.is_drawn:
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
    distractors: bool = False  # show what moves whatever the robot does, as in metaworld:...?distractors=true
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
        return {name: getattr(self, name) for name in ("camera", "image_size", "fps", "distractors")}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        vectorized = gym.vector.AsyncVectorEnv if use_async_envs and n_envs > 1 else gym.vector.SyncVectorEnv

        def make(task: str) -> gym.vector.VectorEnv:
            return vectorized([freeze_after_episode_end(lambda: MetaWorld(task, **self.gym_kwargs))] * n_envs)

        return {self.type: {i: make(task) for i, task in enumerate(parse_tasks(self.task))}}


class MetaWorld(gym.Env):
    """One task. observation: pixels {camera: uint8 (h, w, c)}, agent_pos float64 (4,); action float32 (4,) in [-1, 1].

    The episode ends with the first success, or after 500 steps of the simulator.
    """

    is_drawn = True

    def __init__(self, task: str, camera: str, image_size: int, fps: int, distractors: bool = False):
        self.task, self.camera, self.image_size, self.has_distractors = task, camera, image_size, distractors
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
        self.env: Any = None  # made in the process that uses it, as the renderer is
        self.renderer: Any = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if self.env is None:
            self.env, self.renderer = stage(self.task, self.image_size)
        if seed is not None:
            self.env.seed(seed)
        state, _ = self.env.reset(seed=seed)
        self.distraction = int(self.np_random.integers(2**31)) if self.has_distractors else None
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
        if self.is_drawn:
            self.image = picture(self.renderer, self.env.data, self.camera, self.distraction)
        return {"pixels": {self.camera: self.image}, "agent_pos": state[:4]}

    def render(self) -> np.ndarray:
        return self.image

    def close(self) -> None:
        if self.env is not None:
            self.renderer.close()
            self.env = self.renderer = None


def env_configs(
    type: str, tasks: Sequence[str] = (), settings: Mapping[str, str] = MappingProxyType({})
) -> list[EnvConfig]:
    """LeRobot's configuration of an environment for each of some tasks; by default for its own choice.

    settings: values of its further fields as LeRobot's command line spells them, such as {"task_ids": "[0,1]"}.
    Raises ValueError where no environment, of LeRobot or of an installed plugin, has this name, and for a setting that
    it does not have or that has another type.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo, which reads it when it is imported, draws without a screen
    register_third_party_plugins()
    known = EnvConfig.get_known_choices()
    if type not in known:
        raise ValueError(f"env.type={type}; expected one of {', '.join(sorted(known))}")
    names = [field.name for field in fields(known[type])]
    for name in settings:
        if name.split(".")[0] not in names:
            raise ValueError(f"env.{name} is no setting of {type}; there are {', '.join(names)}")
    found = []
    for task in tasks or [None]:
        given = dict(settings) if task is None else {**settings, "task": task}
        try:
            with redirect_stderr(io.StringIO()):  # of argparse, which tells the usage and exits
                found.append(draccus.parse(known[type], args=[f"--{name}={value}" for name, value in given.items()]))
        except (draccus.utils.DraccusException, SystemExit) as error:
            told = ", ".join(f"env.{name}={value}" for name, value in given.items())
            raise ValueError(f"{told or type}: {error.__cause__ or error}") from error
    return found


def refuse_another_robot(
    policy: PreTrainedConfig, envs: dict[str, dict[int, SideBySide]], rename_map: dict[str, str]
) -> None:
    """Raises ValueError where a policy has other actions than an environment, or sees what that does not show. Names
    the cameras that it does not see."""
    compared = [(env, unseen_cameras(policy, env, rename_map)) for tasks in envs.values() for env in tasks.values()]
    if unseen := sorted({camera for _, cameras in compared for camera in cameras}):
        print(f"{compared[0][0].config.type} shows {', '.join(unseen)}, which the policy does not see", flush=True)


def unseen_cameras(policy: PreTrainedConfig, env: SideBySide, rename_map: dict[str, str]) -> set[str]:
    name, actions = env.config.type, int(np.prod(env.single_action_space.shape or ()))
    if policy.action_feature is not None and policy.action_feature.shape[0] != actions:
        raise ValueError(f"the policy has {policy.action_feature.shape[0]} actions, {name} {actions}")
    preprocess, _ = env.config.get_env_processors()
    shown: dict[str, Any] = preprocess(preprocess_observation(env.observation_space.sample()))
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
    return cameras - policy.image_features.keys()
