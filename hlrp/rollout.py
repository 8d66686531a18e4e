"""Success of a policy in simulation, by LeRobot's own evaluation: per task, with intervals, latency and videos.

    python -m hlrp.rollout --policy outputs/policy/checkpoints/last/pretrained_model --tasks door-open-v3 reach-v3
    python -m hlrp.rollout --policy FOLDER --env pusht --episodes 100 --seed 1000

Any LeRobot policy, in any environment that LeRobot has and in those of hlrp's data (`hlrp_metaworld`, `hlrp_world`):
the episodes of `lerobot-eval` with the same seed, policy and number of environments at once. The result is
OUTPUT_DIR/rollout.json.
"""

import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from hlrp.checkpoints import write_json
from hlrp.cli import tell_mistakes
from hlrp.metrics import wilson


@dataclass
class Args:
    policy: str  # folder or hub id of a LeRobot policy
    env: str = "hlrp_metaworld"  # environment: this, hlrp_world or one of LeRobot's (metaworld, pusht, libero)
    tasks: tuple[str, ...] = ()  # tasks of the environment; by default its own choice
    episodes: int = 50  # episodes to try in each task
    seed: int = 1000  # seed of a task's first episode; each further one adds 1
    batch_size: int = 1  # environments that run at once; each starts a simulator of its own
    rename_map: dict[str, str] = field(default_factory=dict)  # names of cameras: the environment's, then the policy's
    videos: int = 1  # videos to write of each task, to OUTPUT_DIR/videos
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the policy runs; auto: on a GPU if there is one
    output_dir: Path = Path("outputs/rollout")  # folder for the result and the videos


def main(args: Args) -> None:
    check(args)
    env_config = environment(args.env, ",".join(args.tasks))
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import make_policy, make_pre_post_processors
    from lerobot.utils.random_utils import set_seed

    import hlrp.policy  # noqa: F401  the type hlrp

    set_seed(args.seed)  # here, as lerobot-eval does: what makes the policy draws too
    try:
        config = PreTrainedConfig.from_pretrained(args.policy)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"policy={args.policy} cannot be read: {error}. Run finetune_policy.py first, or give a policy's "
            "pretrained_model folder or hub id"
        ) from error
    config.pretrained_path = args.policy
    if args.device != "auto":
        config.device = args.device
    policy = make_policy(config, env_cfg=env_config, rename_map=args.rename_map).eval()
    overrides = {
        "device_processor": {"device": config.device},
        "rename_observations_processor": {"rename_map": args.rename_map},
    }
    processors = make_pre_post_processors(config, pretrained_path=args.policy, preprocessor_overrides=overrides)
    videos_dir = args.output_dir / "videos" if args.videos else None
    result = evaluate(
        policy, *processors, env_config, args.episodes, args.seed, args.batch_size, args.videos, videos_dir
    )
    result["args"] = asdict(args) | {"output_dir": str(args.output_dir)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "rollout.json", result)
    print(table(result))
    print(f"{args.output_dir / 'rollout.json'}" + (f", {videos_dir}" if args.videos else ""))


def environment(type: str, tasks: str | None):
    """LeRobot's configuration of an environment and some of its tasks, by commas; by default its own choice. Raises
    ValueError where there is none such."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo, which reads it when it is imported, draws without a screen
    from lerobot.envs import make_env_config

    import hlrp.envs  # noqa: F401  the type hlrp_metaworld

    return make_env_config(type, **({"task": tasks} if tasks else {}))


def try_policy(policy, preprocessor, postprocessor, args, videos_dir: Path) -> dict:
    """`evaluate` for a policy in training, with a video of each task. args: `env`, `eval` and `seed` are read."""
    from lerobot.utils.random_utils import set_seed

    env_config = environment(args.env.type, args.env.task)
    set_seed(args.seed)
    numbers = args.eval.n_episodes, 1000, args.eval.batch_size, 1
    result = evaluate(policy, preprocessor, postprocessor, env_config, *numbers, videos_dir)
    print(table(result))
    return result


@torch.no_grad()
def evaluate(
    policy,
    preprocessor,
    postprocessor,
    env_config,
    episodes: int,
    seed: int,
    batch_size: int = 1,
    videos: int = 0,
    videos_dir: Path | None = None,
) -> dict:
    """Success of a policy in `episodes` of each task, as `summary` gives it, and videos of the first ones."""
    from lerobot.envs import make_env, make_env_pre_post_processors
    from lerobot.scripts.lerobot_eval import eval_policy_all

    env_processors = make_env_pre_post_processors(env_config, policy.config)
    envs = make_env(env_config, n_envs=batch_size, use_async_envs=False)
    names = {(group, i): name_of(env, f"{group}/{i}") for group, tasks in envs.items() for i, env in tasks.items()}
    with latencies_of(policy) as latencies:
        info = eval_policy_all(
            envs,
            policy,
            *env_processors,
            preprocessor,
            postprocessor,
            n_episodes=episodes,
            max_episodes_rendered=videos,
            videos_dir=videos_dir,
            start_seed=seed,
        )
    successes = {names[task["task_group"], task["task_id"]]: task["metrics"]["successes"] for task in info["per_task"]}
    return summary(successes, latencies)


def name_of(env, default: str) -> str:
    """Of the task of a vectorised environment; not all have one."""
    try:
        return env.call("task")[0]
    except AttributeError:
        return default


def check(args: Args) -> None:
    for name, least in {"episodes": 1, "batch_size": 1, "videos": 0, "seed": 0}.items():
        if getattr(args, name) < least:
            raise ValueError(f"{name}={getattr(args, name)}; expected {least} or more")
    if args.batch_size > args.episodes:
        raise ValueError(f"batch_size={args.batch_size} is more than episodes={args.episodes}")


@contextmanager
def latencies_of(policy):
    """Yields a list that takes how long each chunk of the policy lasts, from the observation on its device on [s]."""
    latencies, predict = [], policy.predict_action_chunk

    def timed(*args, **kwargs):
        start = time.perf_counter()
        chunk = predict(*args, **kwargs)
        chunk.cpu()  # waits for the device
        latencies.append(time.perf_counter() - start)
        return chunk

    policy.predict_action_chunk = timed
    yield latencies
    del policy.predict_action_chunk  # the class's own again


def summary(successes: dict[str, list[bool]], latencies: list[float]) -> dict:
    """Success rates with 95 % Wilson intervals, of each task and of all; latency of a chunk [ms]."""

    def rate(outcomes: list[bool]) -> dict:
        low, high = wilson(sum(outcomes), len(outcomes))
        count = {"successes": int(sum(outcomes)), "episodes": len(outcomes)}
        return count | {"success": sum(outcomes) / len(outcomes), "interval": [low, high]}

    every = [outcome for outcomes in successes.values() for outcome in outcomes]
    result = {"tasks": {name: rate(outcomes) for name, outcomes in successes.items()}, "all": rate(every)}
    if latencies:
        p50, p99 = torch.tensor(latencies, dtype=torch.float64).quantile(torch.tensor([0.5, 0.99]).double()).tolist()
        result["latency_ms"] = {"p50": 1e3 * p50, "p99": 1e3 * p99, "chunks": len(latencies)}
    return result


def table(result: dict) -> str:
    rows = [*result["tasks"].items(), ("all", result["all"])]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'task':{width}}  success  95 % interval  episodes"]
    for name, row in rows:
        low, high = row["interval"]
        lines.append(f"{name:{width}}  {row['success']:7.2f}  {low:.2f} to {high:.2f}  {row['episodes']:8}")
    if "latency_ms" in result:
        p50, p99, chunks = result["latency_ms"].values()
        lines.append(f"observation to chunk: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({chunks} chunks)")
    return "\n".join(lines)


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
