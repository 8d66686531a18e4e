"""Environments of LeRobot's side by side, in this process or in others.

However many run at once, and wherever, episode k is the one that `lerobot-eval --eval.batch_size=1` counts as k: it has
the same seed, and the same resets lie before it, which in LIBERO choose the init state.
"""

import io
import itertools
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from lerobot.envs import EnvConfig, make_env

from hlrp.distributed import forkserver


class Key(NamedTuple):
    """One of several copies of the environment of a task."""

    copy: int
    suite: str
    task: int


class Facts(NamedTuple):
    """What is alike in all copies of the environment of a task."""

    config: EnvConfig
    task: str | None
    metadata: dict
    observation_space: gym.Space
    single_action_space: gym.Space


class Copy:
    """The environment that LeRobot makes for one episode at a time. It runs some of the episodes, and is reset as often
    as if it ran all of them."""

    def __init__(self, env: Any, config: EnvConfig):
        """env: a vector of one, synchronous or asynchronous, which gymnasium types alike in little."""
        self.env, self.config = env, config
        self.passed = 0  # episodes that lie behind it
        self.counters: set[str] | None = None  # what a reset moves on; None: no reset has shown it yet
        self.inner: Any = getattr(env, "envs", [None])[0]
        while isinstance(self.inner, gym.Wrapper):
            self.inner = self.inner.env

    def facts(self) -> Facts:
        spaces = self.env.observation_space, self.env.single_action_space
        return Facts(self.config, attribute(self.env, "task"), self.env.metadata, *spaces)

    def start(self, episode: int, seed: int | None, options: dict | None) -> tuple[dict, dict]:
        """The first observation of an episode, and its init_state (None where there is none), task and
        task_description."""
        self.catch_up(episode, seed, options)
        self.draw(True)
        found = {"init_state": init_state(self.env)}
        observation = self.reset(seed, options)
        return observation, found | {name: attribute(self.env, name) for name in ("task", "task_description")}

    def catch_up(self, episode: int, seed: int | None, options: dict | None) -> None:
        """Brings it to where it is before `episode` if it has run all those before."""
        is_twice = self.env.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.SAME_STEP  # at the end, too
        stride = attribute(self.env, "_reset_stride")  # LeRobot's: of LIBERO and RoboTwin
        self.draw(False)
        while (missed := episode - self.passed) and self.counters != set():
            if stride is not None:
                name = "episode_index" if attribute(self.env, "init_state_id") is None else "init_state_id"
                self.env.set_attr(name, [attribute(self.env, name) + missed * stride * (1 + is_twice)])
                break
            self.reset(None if seed is None else seed - missed, options)
            if is_twice:
                self.env.reset(options=options)
        self.passed = episode

    def reset(self, seed: int | None, options: dict | None) -> dict:
        """The first observation of the next episode. The first reset shows what resets count."""
        before = plain_attributes(self.env) if self.counters is None else {}
        observation, _ = self.env.reset(seed=[seed], options=options)
        if self.counters is None:
            after = plain_attributes(self.env)
            self.counters = {name for name, value in before.items() if repr(after.get(name)) != repr(value)}
        self.passed += 1
        return observation

    def step(self, action: np.ndarray, is_seen: bool) -> tuple[dict, float, bool, bool, bool]:
        """observation, reward, terminated, truncated, success. is_seen: whether anyone looks at the observation."""
        self.draw(is_seen)
        observation, reward, terminated, truncated, info = self.env.step(action)
        success = np.ravel(info.get("final_info", info).get("is_success", False))[0]
        return observation, float(reward[0]), bool(terminated[0]), bool(truncated[0]), bool(success)

    def draw(self, is_drawn: bool) -> None:
        if hasattr(self.inner, "is_drawn"):  # those of hlrp
            self.inner.is_drawn = is_drawn or not hasattr(self.inner, "image")

    def call(self, name: str, *args):
        return self.env.call(name, *args)[0]

    def close(self) -> None:
        self.env.close()


def copies_of(configs: Sequence[EnvConfig], numbers: Sequence[int]) -> dict[Key, Copy]:
    """Copies, of these numbers, of the environments of all tasks.

    Raises ValueError where one cannot be made, as for an unknown task.
    """
    copies: dict[Key, Copy] = {}
    for number in numbers:
        for config in configs:
            try:
                with no_questions(), redirect_stdout(io.StringIO()):  # LeRobot tells of each task of LIBERO
                    made = make_env(config, n_envs=1)
            except (gym.error.Error, ImportError, LookupError, ValueError) as error:
                raise ValueError(f"env={config.type}, task={config.task} cannot be made: {error}") from error
            for suite, tasks in made.items():
                for i, env in tasks.items():
                    taken = [key.task for key in copies if (key.copy, key.suite) == (number, suite)]
                    copies[Key(number, suite, len(taken) if i in taken else i)] = Copy(env, config)
    return copies


@contextmanager
def no_questions() -> Iterator[None]:
    """A question on standard input, such as LIBERO's at its first import, is answered by no."""
    stdin, sys.stdin = sys.stdin, io.StringIO("n\n" * 100)
    try:
        yield
    finally:
        sys.stdin = stdin


class Here:
    """Copies in this process. What is sent is done at once, and its result is received later."""

    def __init__(self, configs: Sequence[EnvConfig], numbers: Sequence[int]):
        self.copies, self.results = copies_of(configs, numbers), deque()

    def facts(self) -> dict[Key, Facts]:
        return {key: copy.facts() for key, copy in self.copies.items()}

    def send(self, key: Key, name: str, *args) -> None:
        self.results.append(outcome(self.copies[key], name, args))

    def receive(self) -> tuple[Any, Exception | None]:
        """A result, or the error of what an environment does not have."""
        return self.results.popleft()


class Elsewhere:
    """Copies in a process of their own, which ends when all of them are closed, or with this one."""

    def __init__(self, configs: Sequence[EnvConfig], numbers: Sequence[int]):
        context = forkserver()
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, configs, numbers, dict(os.environ)), daemon=True)
        self.process.start()
        other.close()

    def facts(self) -> dict[Key, Facts]:
        return self.receive()[0]

    def send(self, key: Key, name: str, *args) -> None:
        self.pipe.send((key, name, args))

    def receive(self) -> tuple[Any, Exception | None]:
        """As that of `Here`. Raises what has ended the other process."""
        try:
            result, error, is_alive = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise RuntimeError(
                f"a process of environments has ended with exit code {self.process.exitcode}; with --processes 1 they "
                "run in this one"
            ) from error
        if not is_alive:
            raise error
        return result, error


def outcome(copy: Copy, name: str, args: tuple) -> tuple[Any, Exception | None]:
    """What a method returns, or the error by which LeRobot learns that an environment does not have something."""
    try:
        return getattr(copy, name)(*args), None
    except (AttributeError, NotImplementedError) as error:
        return None, error


def serve(pipe, configs: Sequence[EnvConfig], numbers: Sequence[int], variables: dict[str, str]) -> None:
    """The process of an `Elsewhere`: sends the facts of its copies, then does what it is sent."""
    import torch

    os.environ.update(variables)
    torch.set_num_threads(1)  # the other cores have processes of their own
    try:
        copies = copies_of(configs, numbers)
        pipe.send(({key: copy.facts() for key, copy in copies.items()}, None, True))
        while copies:
            key, name, args = pipe.recv()
            pipe.send((*outcome(copies[key], name, args), True))
            if name == "close":
                del copies[key]
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return  # the other end is gone, or goes
    except Exception as error:
        error.add_note(f"in a process of environments:\n{traceback.format_exc()}")
        pipe.send((None, error, False))


def make_envs(
    configs: Sequence[EnvConfig], num_envs: int, episodes: int, processes: int | None = 1
) -> dict[str, dict[int, "SideBySide"]]:
    """The tasks of some configurations, as LeRobot's `eval_policy_all` takes them.

    processes: in which the num_envs environments of a task run; 1: in this one, None: one for each core.
    Raises ValueError where an environment cannot be made, as for an unknown task.
    """
    num_envs = min(num_envs, episodes)
    num_workers = min(num_envs, len(os.sched_getaffinity(0)) if processes is None else processes)
    kind = Here if num_workers == 1 else Elsewhere
    workers = [kind(configs, range(i, num_envs, num_workers)) for i in range(num_workers)]
    facts = [worker.facts() for worker in workers]
    envs: dict[str, dict[int, SideBySide]] = {}
    for key, fact in facts[0].items():
        if key.copy == 0:
            copies = [(workers[i % num_workers], key._replace(copy=i)) for i in range(num_envs)]
            envs.setdefault(key.suite, {})[key.task] = SideBySide(copies, fact, episodes)
    return envs


class SideBySide(gym.vector.VectorEnv):
    """Copies of the environment of one task. Each runs every len(copies)-th of `episodes` and stands still once its
    episode has ended.

    `rows` says of each episode: seed, init_state (None where the environment has none), success, return, max_reward,
    length. Rows that are there before the first reset are of episodes that need not run again.
    """

    def __init__(self, copies: Sequence[tuple[Here | Elsewhere, Key]], facts: Facts, episodes: int):
        self.copies, self.num_envs, self.episodes = list(copies), len(copies), episodes
        self.config, self.observation_space = facts.config, facts.observation_space
        self.single_action_space = facts.single_action_space
        self.metadata = facts.metadata | {"render_fps": facts.config.fps}  # LIBERO's own is not that of its steps
        self.task = str(facts.task or facts.config.task or facts.config.type)
        self.task_text: str | None = None  # what the policy is told in place of the environment's own words
        self.learned: Sequence[str] = ()  # the instructions that the policy knows
        self.is_compared = False
        self.is_seen: Callable[[], bool] = lambda: True  # whether the policy looks at the observation of a step
        self.num_filmed = episodes  # the first episodes, of which each picture is seen
        self.rows: list[dict] = []
        self.words: list[dict] = []  # task and task_description of each copy's episode
        self.closed = False

    def reset(self, *, seed: list[int] | None = None, options: dict | None = None) -> tuple[dict, dict]:
        first = len(self.rows)
        self.first, numbers = first, range(min(self.num_envs, self.episodes - first))
        self.frames: list[np.ndarray | None] = [None] * self.num_envs
        seeds = [None] * self.num_envs if seed is None else seed
        results = self.ask({i: ("start", first + i, seeds[i], options) for i in numbers})
        self.observations, self.words = map(list, zip(*results.values(), strict=True))
        self.running = [
            {"seed": seeds[i], "init_state": self.words[i].pop("init_state")}
            | {"success": False, "return": 0.0, "max_reward": -np.inf, "length": 0}
            for i in numbers
        ]
        self.rows += self.running
        idle = self.num_envs - len(numbers)  # past the last episode
        self.observations += self.observations[:1] * idle
        self.words += self.words[:1] * idle
        self.is_done = np.array([False] * len(numbers) + [True] * idle)
        return stacked(self.observations), {}

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        rewards, successes = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        terminated, truncated = np.ones(self.num_envs, dtype=bool), np.zeros(self.num_envs, dtype=bool)
        is_seen = self.is_seen()
        steps = {
            int(i): ("step", actions[i : i + 1], is_seen or self.first + i < self.num_filmed)
            for i in np.flatnonzero(~self.is_done)
        }
        for i, result in self.ask(steps).items():
            self.observations[i], rewards[i], terminated[i], truncated[i], successes[i] = result
            row = self.running[i]
            row["success"] |= bool(successes[i])
            row["return"] += float(rewards[i])
            row["max_reward"] = max(row["max_reward"], float(rewards[i]))
            row["length"] += 1
        self.is_done |= terminated | truncated
        return stacked(self.observations), rewards, terminated, truncated, {"is_success": successes}

    def ask(self, orders: dict[int, tuple]) -> dict[int, Any]:
        """The results of what each of some copies is told to do, by their numbers. Those in several processes work at
        the same time."""
        for i, order in orders.items():
            worker, key = self.copies[i]
            worker.send(key, *order)
        outcomes = {i: self.copies[i][0].receive() for i in orders}
        for _, error in outcomes.values():
            if error is not None:
                raise error
        return {i: result for i, (result, _) in outcomes.items()}

    def call(self, name: str, *args, **kwargs) -> tuple:
        if name in ("task", "task_description"):
            return tuple(map(self.told, self.words))
        if name == "render":
            moved = [i for i in range(len(self.running)) if self.frames[i] is None or not self.is_done[i]]
            filmed = [i for i in moved if self.first + i < self.num_filmed]
            for i, frame in self.ask(dict.fromkeys(filmed, ("call", "render"))).items():
                self.frames[i] = frame
            return tuple(self.frames[0] if frame is None else frame for frame in self.frames)
        return tuple(self.ask(dict.fromkeys(range(self.num_envs), ("call", name, *args))).values())

    def get_attr(self, name: str) -> tuple:
        return self.call(name)

    def told(self, words: dict) -> str:
        """The instruction: `task_text`, or the only one that the policy has learned, or the environment's own words."""
        own = words["task"] or "" if words["task_description"] is None else words["task_description"]
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
        if self.closed:
            return
        self.closed = True
        if self.rows and not sys.stderr.isatty():  # where no bar shows how far it is
            successes = sum(row["success"] for row in self.rows)
            print(f"{self.task}: {successes} of {len(self.rows)} episodes succeed", flush=True)
        self.ask(dict.fromkeys(range(self.num_envs), ("close",)))


def attribute(env: Any, name: str):
    """Of the environment in a vector of one; None where it has none such."""
    try:
        return env.get_attr(name)[0]
    except AttributeError:
        return None


def init_state(env: Any) -> int | None:
    """Which of LIBERO's init states the next episode begins in."""
    state, states = attribute(env, "init_state_id"), attribute(env, "_init_states")
    if state is None or attribute(env, "init_states") is False:
        return None
    return int(state) if states is None else int(state) % len(states)


def plain_attributes(env: Any) -> dict[str, object]:
    """What an environment in a vector of one may count its resets by."""
    (env,) = getattr(env, "envs", (None,))
    found = {}
    while env is not None:
        kinds = (int, float, str, tuple, list, deque, itertools.count)
        for name, value in vars(env).items():
            if isinstance(value, kinds) and not isinstance(value, bool) and name not in ("task", "task_description"):
                found.setdefault(name, value if isinstance(value, int) else repr(value))
        env = env.env if isinstance(env, gym.Wrapper) else None
    return found


def stacked(observations: Sequence) -> Any:
    """Observations of one environment each, in nested dictionaries -> of all, along the first axis."""
    if len(observations) == 1:
        return observations[0]
    if isinstance(observations[0], dict):
        return {key: stacked([observation[key] for observation in observations]) for key in observations[0]}
    return np.concatenate(observations)
