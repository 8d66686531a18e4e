"""The built-in world as an environment of LeRobot's: `lerobot-eval --env.type=hlrp_world --env.task=touch,edge`.

It shows what `world:` shows and moves as it does, in scenes that no `world:` source has, and needs no simulator.
"""

from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

from hlrp.world import EMBODIMENTS, FPS, KINDS, MAX_LENGTH, MAX_SPEED, is_done, moved, normalised, pushed, simulate
from hlrp.world_picture import IMAGE_SIZE, picture

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

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}
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
        frame = picture(self.scene, self.i, self.embodiment, self.tip, self.blocks)[0]
        self.image = frame.permute(1, 2, 0).numpy()
        return {"pixels": self.image, "agent_pos": normalised(self.tip)[0].double().numpy()}

    def render(self) -> np.ndarray:
        return self.image
