"""Real robot video without a download: MetaWorld's scripted experts, rendered to a LeRobot v3 dataset.

    python -m hlrp.metaworld --output-dir data/mt10
    python -m hlrp.metaworld --output-dir data/doors --tasks door-open-v3,door-close-v3 --episodes 50

The data source `metaworld:mt10?episodes=20` renders once, into $HLRP_CACHE or ~/.cache/hlrp.
MetaWorld: Yu et al. 2019 (arXiv:1910.10897). Names and descriptions of the tasks are LeRobot's.
"""

import atexit
import copy
import ctypes
import difflib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import threading
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from importlib.resources import files
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from hlrp.checkpoints import hold

CAMERAS = ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
CONTROL_FREQ = 80  # environment steps a second
MIN_STEPS = 80  # environment steps; after an earlier success the expert goes on, so that a clip has room
MAX_STEPS = 500  # environment steps after which an episode has failed, as in MetaWorld
MAX_ATTEMPTS = 30  # seeds to try for one episode; the weakest expert (bin-picking) succeeds with every third
NUM_BALLS = 8  # of `distract`; lowest and highest x, y, z of their centres, and how far they move from there [m]
BALLS, BALL_MOTION = ((-0.5, 0.3, 0.05), (0.4, 1.1, 0.5)), 0.25
CAMERA_SWAY = 0.03  # of `distract`, in x, y and z [m]
MT10 = (
    "reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
    "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3",
)  # fmt: skip


class Setting(NamedTuple):
    """What all episodes of a dataset have in common."""

    cameras: tuple[str, ...]
    image_size: int
    action_repeat: int
    noise: float
    seed: int
    distractors: bool = False


class Episode(NamedTuple):
    frames: dict[str, np.ndarray]  # of each camera: uint8 (t, h, w, c)
    state: np.ndarray  # float32 (t, 4): end effector xyz [m] and opening of the gripper, before the action
    action: np.ndarray  # float32 (t, 4): motion in xyz and effort of the gripper, all in [-1, 1]


def render(
    output_dir: Path,
    tasks: str = "mt10",
    episodes: int = 20,
    cameras: tuple[str, ...] = ("corner2",),
    image_size: int = 128,
    action_repeat: int = 4,
    noise: float = 0.2,
    seed: int = 0,
    distractors: bool = False,
    num_workers: int = 2,
) -> Path:
    """Renders successful episodes of the scripted experts and writes them as a LeRobot v3 dataset.

    The folder appears when it is complete; after a killed run, the same command starts again. The same settings give
    the same episodes, and an episode does not depend on the number of episodes or on the other tasks.

    Args:
        output_dir: Folder to write, must not exist yet.
        tasks: Names (door-open-v3) and groups (mt10, mt50, easy, medium, hard, very_hard), by commas.
        episodes: Successful episodes of each task.
        cameras: Views of the scene; corner2 is placed as in LeRobot's MetaWorld environment.
        image_size: Height and width of a frame [pixel].
        action_repeat: Environment steps (80 a second) for each action and frame; 4 gives 20 frames a second.
        noise: Standard deviation of the Gaussian noise on the expert's motion in x, y and z.
        seed: Seed of object positions and noise.
        distractors: Show what moves whatever the robot does: balls, the light, the camera.
        num_workers: Processes that simulate and render; this process encodes the videos.
    """
    output_dir = Path(output_dir)
    names = parse_tasks(tasks)
    unknown = [camera for camera in cameras if camera not in CAMERAS]
    if unknown or not cameras:
        raise ValueError(f"cameras={cameras}; expected one or more of {', '.join(CAMERAS)}")
    if image_size < 16 or image_size % 2:
        raise ValueError(f"image_size={image_size}; expected an even number of 16 or more (video is stored as 4:2:0)")
    if action_repeat < 1 or CONTROL_FREQ % action_repeat:
        raise ValueError(f"action_repeat={action_repeat}; expected a divisor of the {CONTROL_FREQ} steps a second")
    if episodes < 1 or num_workers < 1:
        raise ValueError(f"episodes={episodes}, num_workers={num_workers}; expected 1 or more of both")
    if output_dir.exists():
        raise ValueError(f"output_dir={output_dir} exists already; delete it or choose another folder")
    _check_installed()

    setting = Setting(tuple(cameras), image_size, action_repeat, noise, seed, distractors)
    jobs = [(task, episode) for task in names for episode in range(episodes)]
    partial_dir = output_dir.with_name(output_dir.name + ".partial")
    if partial_dir.exists():
        shutil.rmtree(partial_dir)
    partial_dir.parent.mkdir(parents=True, exist_ok=True)

    print(f"rendering {episodes} episodes of {len(names)} MetaWorld tasks into {output_dir}", flush=True)
    num_ahead = 4 * num_workers  # episodes that are rendered ahead of the encoder, which limits the memory
    spawn = get_context("spawn")  # a forked GL context would hang
    with ProcessPoolExecutor(num_workers, spawn, initializer=_end_with_parent) as pool:
        pending = deque(pool.submit(render_episode, setting, *job) for job in jobs[:num_ahead])
        dataset = _create_dataset(partial_dir, setting)  # imports lerobot while the first jobs run
        for index, (task, _) in enumerate(tqdm(jobs, unit="episode", disable=None)):
            episode = pending.popleft().result()
            if index + num_ahead < len(jobs):
                pending.append(pool.submit(render_episode, setting, *jobs[index + num_ahead]))
            _save_episode(dataset, episode, lerobot_config()["TASK_DESCRIPTIONS"][task])
    dataset.finalize()
    partial_dir.rename(output_dir)
    return output_dir


def cached(
    tasks: str = "mt10",
    episodes: int = 20,
    camera: str = "corner2",
    size: int = 128,
    noise: float = 0.2,
    seed: int = 0,
    distractors: bool = False,
) -> Path:
    """The folder of the dataset in $HLRP_CACHE (or ~/.cache/hlrp); renders it if it is not there yet."""
    cache = Path(os.environ.get("HLRP_CACHE", "~/.cache/hlrp")).expanduser() / "metaworld"
    cameras = tuple(camera.split(","))
    name = f"{'+'.join(tasks.split(','))}_{episodes}episodes_{'+'.join(cameras)}_{size}px_noise{noise}_seed{seed}"
    name += "_distractors" * distractors
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{name}.lock", "w") as lock:
        hold(lock)  # other processes wait here until the first one has rendered
        if not (cache / name).exists():
            render(cache / name, tasks, episodes, cameras, size, noise=noise, seed=seed, distractors=distractors)
    return cache / name


def open_metaworld(tasks: str, uri: str, skip_broken: bool, **options):
    """The dataset of a URI; renders it if it is not there yet."""
    from hlrp.lerobot_data import LeRobotData

    root, name = cached(tasks, **options), f"metaworld-{tasks}"
    cameras = options.get("camera", "corner2").split(",")
    keys = ",".join(f"observation.images.{camera}" for camera in cameras)
    return LeRobotData(root, keys, uri=uri, name=name, skip_broken=skip_broken)


def parse_tasks(tasks: str) -> list[str]:
    """The task names in a text such as "mt10,door-close-v3". Raises ValueError for an unknown one."""
    config = lerobot_config()
    groups = {"mt10": list(MT10), "mt50": list(config["TASK_DESCRIPTIONS"]), **config["DIFFICULTY_TO_TASKS"]}
    names = {}  # a dict keeps the order and has no repeats
    for task in tasks.split(","):
        if task not in groups and task not in config["TASK_DESCRIPTIONS"]:
            known = [*groups, *config["TASK_DESCRIPTIONS"]]
            near = difflib.get_close_matches(task, known, n=3, cutoff=0.4) or groups
            raise ValueError(f"unknown MetaWorld task {task!r}; did you mean {', '.join(near)}?")
        names.update(dict.fromkeys(groups.get(task, [task])))
    return list(names)


@lru_cache
def lerobot_config() -> dict:
    """LeRobot's table of MetaWorld's tasks, read as a file, since importing its module would import the simulator."""
    return json.loads((files("lerobot") / "envs/metaworld_config.json").read_text())


def _check_installed():
    if importlib.util.find_spec("metaworld") is None:
        raise ModuleNotFoundError(
            "metaworld: sources need the simulator: pip install -e '.[sim]' (or pip install 'lerobot_policy_hlrp[sim]')"
        )
    if os.environ.get("MUJOCO_GL", "egl") == "egl":
        try:
            ctypes.CDLL("libEGL.so.1")
        except OSError as error:
            raise RuntimeError(_no_gl(error)) from error


def _no_gl(error: Exception) -> str:
    return f"MuJoCo cannot render here ({error}). Install: sudo apt-get install -y libegl1 libgl1-mesa-dri"


def _end_with_parent():
    """Ends this worker when its parent has been killed, which the workers of a pool do not notice by themselves."""

    def watch():
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def render_episode(setting: Setting, task: str, number: int) -> Episode:
    """Renders successful episode `number` of a task. It does not depend on the process, nor on earlier episodes."""
    env, renderer = _stage(task, setting.image_size)
    for attempt in range(MAX_ATTEMPTS):
        task_id = lerobot_config()["TASK_NAME_TO_ID"][task]
        rng = np.random.default_rng([setting.seed, task_id, number, attempt])
        steps = _roll_out(env, task, setting, rng)
        if steps is not None:
            break
    else:
        raise RuntimeError(
            f"the expert of {task} failed {MAX_ATTEMPTS} times in a row with noise={setting.noise} and "
            f"action_repeat={setting.action_repeat}; lower them, or leave the task out"
        )

    scenes, state, action = zip(*steps, strict=True)
    drawn = np.random.default_rng([setting.seed, task_id, number])
    distraction = int(drawn.integers(2**31)) if setting.distractors else None
    frames = {}
    for camera in setting.cameras:
        frames[camera] = np.stack([picture(renderer, scene, camera, distraction) for scene in scenes])
    return Episode(frames, np.stack(state).astype(np.float32), np.stack(action))


def _roll_out(env, task: str, setting: Setting, rng: np.random.Generator) -> list[tuple] | None:
    """(simulator data, state, action) at each decision until success; None if the expert fails."""
    from metaworld import policies

    expert = getattr(policies, lerobot_config()["TASK_POLICY_MAPPING"][task])()
    env.seed(int(rng.integers(2**31)))
    observation, _ = env.reset()
    steps, success = [], False
    for _ in range(MAX_STEPS // setting.action_repeat):
        action = expert.get_action(observation)
        action[:3] += setting.noise * rng.standard_normal(3)
        action = action.clip(-1, 1).astype(np.float32)
        steps.append((copy.copy(env.data), observation[:4], action))

        for _ in range(setting.action_repeat):
            observation, _, _, _, info = env.step(action)
            success |= bool(info["success"])
        if success and len(steps) * setting.action_repeat >= MIN_STEPS:
            return steps
    return None


@lru_cache(maxsize=1)  # episodes come task by task
def _stage(task: str, image_size: int):
    atexit.register(_stage.cache_clear)  # frees the renderer before MuJoCo, at exit too, takes EGL down
    return stage(task, image_size)


def stage(task: str, image_size: int):
    """Environment and renderer of a task. Without shadows, reflections and oversampling it is 17 times faster."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa rasterises in this thread: processes scale
    warnings.filterwarnings("ignore", "Constant.s. may be too high")  # action is clipped
    mujoco: Any = importlib.import_module("mujoco")  # whose flags have no types
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    environment: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"]
    env = environment(seed=0)
    env._freeze_rand_vec = False  # each reset draws object positions from env.seed, as in LeRobot's environment
    env.seeded_rand_vec = True
    env.model.camera("corner2").pos = [0.75, 0.075, 0.7]  # as in LeRobot's environment
    env.model.vis.quality.offsamples = 0
    env.model.vis.global_.offwidth = env.model.vis.global_.offheight = max(image_size, 64)
    try:
        renderer = mujoco.Renderer(env.model, image_size, image_size)
    except ImportError as error:  # libEGL is there, but no driver behind it
        raise RuntimeError(_no_gl(error)) from error
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    return env, renderer


def picture(renderer, scene, camera: str, distraction: int | None = None) -> np.ndarray:
    """Renders the simulator's data as one camera sees them: uint8 (h, w, c). distraction: the seed of `distract`."""
    renderer.update_scene(scene, camera)
    if distraction is not None:
        distract(renderer.scene, scene.time, distraction)
    image = renderer.render()
    return image[::-1, ::-1] if camera.startswith("corner") else image  # the corner cameras hang upside down


def distract(scene, seconds: float, seed: int) -> None:
    """Puts into a scene what moves whatever the robot does: balls that float through it, a light that changes and a
    camera that sways, in the manner of the Distracting Control Suite (Stone et al. 2021, arXiv:2101.02722)."""
    mujoco: Any = importlib.import_module("mujoco")
    rng = np.random.default_rng(seed)

    def waves(*shape: int) -> np.ndarray:
        """Sines of the time with frequencies of .1 to .5 Hz, between -1 and 1."""
        return np.sin(2 * np.pi * (rng.uniform(0.1, 0.5, shape) * seconds + rng.uniform(size=shape)))

    centers = rng.uniform(*BALLS, (NUM_BALLS, 3))
    places = centers + BALL_MOTION * waves(NUM_BALLS, 3)
    radii, colors = rng.uniform(0.02, 0.07, NUM_BALLS), rng.uniform(size=(NUM_BALLS, 3))
    for place, radius, color in zip(places, radii, colors, strict=True):
        ball, sphere, turn = scene.geoms[scene.ngeom], mujoco.mjtGeom.mjGEOM_SPHERE, np.eye(3).flatten()
        mujoco.mjv_initGeom(ball, sphere, np.full(3, radius), place, turn, [*color, 1])
        scene.ngeom += 1
    brightness, sway = 1 + 0.4 * waves(1), CAMERA_SWAY * waves(3)
    for light in scene.lights[: scene.nlight]:
        light.diffuse = light.diffuse * brightness
    for eye in scene.camera:
        eye.pos = eye.pos + sway


def _create_dataset(folder: Path, setting: Setting):
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)  # it warns of decoders, and none is used
    import av
    import datasets
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)  # x264 reports on each episode
    datasets.disable_progress_bars()  # one for each episode
    size = setting.image_size
    image = {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    return LeRobotDataset.create(
        f"hlrp/{folder.stem}",
        root=folder,
        fps=CONTROL_FREQ // setting.action_repeat,
        robot_type="metaworld_sawyer",
        features={
            "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
            "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "gripper"]},
            **{f"observation.images.{camera}": image for camera in setting.cameras},
        },
        rgb_encoder=RGBEncoderConfig(vcodec="h264", g=2, crf=18, preset="veryfast"),
        streaming_encoding=True,
        encoder_queue_maxsize=MAX_STEPS,  # a whole episode: LeRobot drops frames when the queue is full
        encoder_threads=1,
    )


def _save_episode(dataset, episode: Episode, description: str):
    for t in range(len(episode.action)):
        images = {f"observation.images.{camera}": frames[t] for camera, frames in episode.frames.items()}
        frame = {"observation.state": episode.state[t], "action": episode.action[t], **images}
        dataset.add_frame({**frame, "task": description})
    dataset.save_episode()


if __name__ == "__main__":
    import tyro

    from hlrp.cli import tell_mistakes

    tell_mistakes()
    tyro.cli(render, description=__doc__)
