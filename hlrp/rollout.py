"""Success of a policy in simulation, by LeRobot's own evaluation: per task, with intervals, latency and videos.

    python -m hlrp.rollout --policy outputs/policy/checkpoints/last/pretrained_model --tasks door-open-v3 reach-v3
    python -m hlrp.rollout --policy FOLDER --env pusht --episodes 100 --seed 1000

Any LeRobot policy, in any environment of LeRobot's or of an installed plugin, and in those of hlrp's data
(`hlrp_metaworld`, `hlrp_world`). The episodes are those of `lerobot-eval --eval.batch_size=1` with the same seed,
whatever the number of environments at once. The result is OUTPUT_DIR/rollout.json, with a row for each episode.
"""

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from hlrp.checkpoints import write_json
from hlrp.cli import tell_mistakes
from hlrp.demonstrations import dicts
from hlrp.metrics import wilson


@dataclass
class Args:
    policy: str  # folder or hub id of a LeRobot policy
    env: str = "hlrp_metaworld"  # environment: this, hlrp_world or one of LeRobot's or a plugin's
    tasks: tuple[str, ...] = ()  # tasks of the environment; by default its own choice
    episodes: int = 50  # episodes to try in each task
    seed: int = 1000  # seed of a task's first episode; each further one adds 1
    batch_size: int = 1  # environments that run at once; each starts a simulator of its own
    rename_map: dict[str, str] = field(default_factory=dict)  # names of cameras: the environment's, then the policy's
    # instruction for the policy; by default that of its demonstrations if they have only one, else the environment's
    task_text: str | None = None
    videos: int = 1  # videos to write of each task, to OUTPUT_DIR/videos
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the policy runs; auto: on a GPU if there is one
    output_dir: Path = Path("outputs/rollout")  # folder for the result and the videos


def main(args: Args) -> None:
    check(args)
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import make_policy, make_pre_post_processors
    from lerobot.utils.random_utils import set_seed

    import hlrp.policy  # noqa: F401  the type hlrp
    from hlrp.envs import env_configs, make_envs, refuse_another_robot

    configs = env_configs(args.env, args.tasks)
    given = [] if args.device == "auto" else [f"--device={args.device}"]
    try:
        config = PreTrainedConfig.from_pretrained(args.policy, cli_overrides=given)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"policy={args.policy} cannot be read: {error}. Run finetune_policy.py first, or give a policy's "
            "pretrained_model folder or hub id"
        ) from error
    config.pretrained_path = args.policy
    set_seed(args.seed)  # here, as lerobot-eval does: what makes the policy draws too
    envs = make_envs(configs, args.batch_size, args.episodes)
    for env in every(envs):
        refuse_another_robot(config, env, args.rename_map)
    policy = make_policy(config, env_cfg=configs[0], rename_map=args.rename_map).eval()
    overrides = {"device_processor": {"device": config.device}, "rename_observations_processor": {"rename_map": {}}}
    processors = make_pre_post_processors(config, pretrained_path=args.policy, preprocessor_overrides=overrides)
    videos_dir = args.output_dir / "videos" if args.videos else None
    settings = {"rename_map": args.rename_map, "task_text": args.task_text}
    result = evaluate(policy, *processors, envs, args.episodes, args.seed, args.videos, videos_dir, **settings)
    result["args"] = asdict(args) | {"output_dir": str(args.output_dir)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "rollout.json", result)
    print(table(result))
    print(f"{args.output_dir / 'rollout.json'}" + (f", {videos_dir}" if args.videos else ""))


def every(envs: dict[str, dict]) -> list:
    """The environments of all tasks."""
    return [env for tasks in envs.values() for env in tasks.values()]


def envs_of(args, batch_size: int) -> dict[str, dict]:
    """The environments of a training script. args: `env` and `eval` are read."""
    from hlrp.envs import env_configs, make_envs

    configs = env_configs(args.env.type, args.env.task.split(",") if args.env.task else ())
    return make_envs(configs, batch_size, args.eval.n_episodes)


def refuse_environment(args, config) -> None:
    """Raises ValueError where an environment of a script cannot be made or has another robot than the policy."""
    from hlrp.envs import refuse_another_robot

    for env in every(envs_of(args, 1)):
        refuse_another_robot(config, env, args.env.rename_map)
        env.close()


def tried_as(args) -> dict:
    """What the result of a training script's last roll-out depends on."""
    return {**asdict(args.env), "n_episodes": args.eval.n_episodes, "steps": args.steps}


def is_tried(args) -> bool:
    """Whether OUTPUT_DIR/environment.json is there, and not that of another environment."""
    file = args.output_dir / "environment.json"
    return file.is_file() and json.loads(file.read_text()).get("of") == tried_as(args)


def try_policy(policy, preprocessor, postprocessor, args, videos_dir: Path) -> dict:
    """`evaluate` for a policy in training, with a video of each task. args: `env`, `eval` and `seed` are read."""
    from lerobot.utils.random_utils import set_seed

    set_seed(args.seed)
    envs = envs_of(args, args.eval.batch_size)
    told = {"rename_map": args.env.rename_map, "task_text": args.env.task_text}
    result = evaluate(policy, preprocessor, postprocessor, envs, args.eval.n_episodes, 1000, 1, videos_dir, **told)
    print(table(result))
    return result | {"of": tried_as(args)}


@torch.no_grad()
def evaluate(
    policy,
    preprocessor,
    postprocessor,
    envs: dict[str, dict],
    episodes: int,
    seed: int,
    videos: int = 0,
    videos_dir: Path | None = None,
    rename_map: dict[str, str] | None = None,
    task_text: str | None = None,
) -> dict:
    """Success of a policy in `episodes` of each task of `hlrp.envs.make_envs`, as `summary` gives it, a row for each
    episode, and videos of the first ones."""
    from lerobot.envs import make_env_pre_post_processors
    from lerobot.processor import RenameObservationsProcessorStep
    from lerobot.scripts.lerobot_eval import eval_policy_all

    before, behind = make_env_pre_post_processors(every(envs)[0].config, policy.config)
    before.steps = [*before.steps, RenameObservationsProcessorStep(rename_map or {})]
    for env in every(envs):
        env.task_text, env.learned = task_text, getattr(policy, "instructions", ())
    names = {(group, i): env.task for group, tasks in envs.items() for i, env in tasks.items()}
    if len(set(names.values())) < len(names):  # two suites may have a task of one name
        names = {(group, i): f"{group}/{i} {name}" for (group, i), name in names.items()}
    with latencies_of(policy) as latencies, plain_lines():
        info = eval_policy_all(
            envs,
            policy,
            before,
            behind,
            preprocessor,
            postprocessor,
            n_episodes=episodes,
            max_episodes_rendered=videos,
            videos_dir=videos_dir,
            start_seed=seed,
        )
    successes = {names[task["task_group"], task["task_id"]]: task["metrics"]["successes"] for task in info["per_task"]}
    rows = [{"task": name} | row for (group, i), name in names.items() for row in envs[group][i].rows]
    return summary(successes, latencies) | {"rows": rows}


@contextmanager
def plain_lines():
    """No bar where standard error is no terminal: a log would hold each of its states."""
    from lerobot.scripts import lerobot_eval

    was = lerobot_eval.inside_slurm  # what LeRobot asks whether to show bars
    lerobot_eval.inside_slurm = lambda: was() or not sys.stderr.isatty()
    try:
        yield
    finally:
        lerobot_eval.inside_slurm = was


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
    try:
        yield latencies
    finally:
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
    main(tyro.cli(Args, description=__doc__, args=dicts(sys.argv[1:])))
