"""Success of a policy in simulation, by LeRobot's own evaluation: per task, with intervals, latency and videos.

    python -m hlrp.rollout --policy outputs/policy/checkpoints/last/pretrained_model --tasks door-open-v3 reach-v3
    python -m hlrp.rollout --policy FOLDER --env pusht --episodes 100 --seed 1000
    python -m hlrp.rollout --policy FOLDER --env.type=libero --env.task=libero_object --env.task_ids='[0,1]'

Any LeRobot policy, in any environment of LeRobot's or of an installed plugin, and in those of hlrp's data
(`hlrp_metaworld`, `hlrp_world`). The flags of lerobot-eval are understood: --policy.path, --eval.n_episodes,
--eval.batch_size, and each setting of the environment as --env.NAME=VALUE. The episodes are those of
`lerobot-eval --eval.batch_size=1` with the same seed, whatever the number of environments at once. A policy of hlrp
that draws noise draws it from the seed of the episode. The same command goes on where a run was cut, and the tables are
those of a run that was not. OUTPUT_DIR holds
    rollout.json    success of each task, of each suite and of `all`, with 95 % intervals and mean return
    episodes.csv    a row for each episode: suite, task, episode (0 to --episodes - 1 in its task), seed, init_state
                    (empty where the environment has none), success (0 or 1), return, max_reward, length [steps],
                    video (its file below OUTPUT_DIR, or empty)
    episodes.json   the settings that an episode depends on
"""

import csv
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from hlrp.checkpoints import weights_hash, write_json, write_text
from hlrp.cli import tell_mistakes
from hlrp.demonstrations import dicts
from hlrp.distributed import forkserver
from hlrp.metrics import wilson

EPISODES, SETTINGS = "episodes.csv", "episodes.json"
FIRST_SEED = 1000  # of the roll-outs in training
COLUMNS: tuple[str, ...] = (
    "suite",
    "task",
    "episode",
    "seed",
    "init_state",
    "success",
    "return",
    "max_reward",
    "length",
    "video",
)


@dataclass
class Args:
    policy: str  # folder or hub id of a LeRobot policy
    env: str = "hlrp_metaworld"  # environment: this, hlrp_world or one of LeRobot's or a plugin's
    tasks: tuple[str, ...] = ()  # tasks of the environment; by default its own choice
    # further settings of the environment; or each as LeRobot spells it, --env.episode_length=280
    env_settings: dict[str, str] = field(default_factory=dict)
    episodes: int = 50  # episodes to try in each task
    seed: int = 1000  # seed of a task's first episode; each further one adds 1
    batch_size: int = 1  # environments that run at once; each starts a simulator of its own
    # processes in which these environments run; 1: this one; None: one for each core
    processes: int | None = None
    rename_map: dict[str, str] = field(default_factory=dict)  # names of cameras: the environment's, then the policy's
    # instruction for the policy; by default that of its demonstrations if they have only one, else the environment's
    task_text: str | None = None
    videos: int = 1  # videos to write of each task, to OUTPUT_DIR/videos
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the policy runs; auto: on a GPU if there is one
    output_dir: Path = Path("outputs/rollout")  # folder for the result and the videos


def main(args: Args) -> None:
    check(args)
    if args.batch_size > 1 and (args.processes or len(os.sched_getaffinity(0))) > 1:
        forkserver()
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import make_policy, make_pre_post_processors
    from lerobot.utils.random_utils import set_seed

    import hlrp.policy  # noqa: F401  the type hlrp
    from hlrp.envs import env_configs, refuse_another_robot
    from hlrp.envs_parallel import make_envs

    configs = env_configs(args.env, [task for tasks in args.tasks for task in tasks.split(",")], args.env_settings)
    given = [] if args.device == "auto" else [f"--device={args.device}"]
    try:
        config = PreTrainedConfig.from_pretrained(args.policy, cli_overrides=given)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"policy={args.policy} cannot be read: {error}. Run finetune_policy.py first, or give a policy's "
            "pretrained_model folder or hub id"
        ) from error
    config.pretrained_path = args.policy  # pyright: ignore[reportAttributeAccessIssue]  it may be a hub id, too
    set_seed(args.seed)  # here, as lerobot-eval does: what makes the policy draws too
    envs = make_envs(configs, args.batch_size, args.episodes, args.processes)
    refuse_another_robot(config, envs, args.rename_map)
    policy = make_policy(config, env_cfg=configs[0], rename_map=args.rename_map).eval()
    overrides = {"device_processor": {"device": config.device}, "rename_observations_processor": {"rename_map": {}}}
    processors = make_pre_post_processors(config, pretrained_path=args.policy, preprocessor_overrides=overrides)
    told = {"rename_map": args.rename_map, "task_text": args.task_text}
    settings = settings_of(policy, processors, envs, seed=args.seed, **told)
    if other := differences(args.output_dir, settings):
        raise ValueError(
            f"{args.output_dir} holds episodes of other settings ({', '.join(other)} changed); "
            "give another --output-dir"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / SETTINGS, settings)
    videos_dir = args.output_dir / "videos"
    result = evaluate(
        policy, *processors, envs, args.episodes, args.seed, args.output_dir, args.videos, videos_dir, **told
    )
    result["args"] = asdict(args) | {"output_dir": str(args.output_dir)}
    write_json(args.output_dir / "rollout.json", result)
    print(table(result))
    print(f"{args.output_dir / 'rollout.json'}, {EPISODES}" + (f", {videos_dir}" if args.videos else ""))


def every(envs: dict[str, dict]) -> list:
    """The environments of all tasks."""
    return [env for tasks in envs.values() for env in tasks.values()]


@dataclass
class EnvArgs:
    """The environment in which a training script tries its policy."""

    type: str | None = None  # environment to try the policy in: hlrp_metaworld, hlrp_world or one of LeRobot's
    task: str | None = None  # tasks of the environment, by commas; None: those it has by default
    # further settings of the environment; or each as LeRobot spells it, --env.episode_length=280
    settings: dict[str, str] = field(default_factory=dict)
    # instruction for the policy; by default that of its demonstrations if they have only one, else the environment's
    task_text: str | None = None
    rename_map: dict[str, str] = field(default_factory=dict)  # names of cameras: the environment's, then the policy's


@dataclass
class EvalArgs:
    """How much a training script tries its policy there."""

    n_episodes: int = 10  # episodes to try in each task
    batch_size: int = 5  # environments that run at once
    processes: int | None = None  # processes in which these environments run; 1: this one; None: one for each core

    def check(self) -> None:
        """Raises ValueError for a number below 1."""
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"eval.{name}={value}; expected 1 or more")


def envs_of(args, batch_size: int) -> dict[str, dict]:
    """The environments of a training script. args: `env` and `eval` are read."""
    from hlrp.envs import env_configs
    from hlrp.envs_parallel import make_envs

    configs = env_configs(args.env.type, args.env.task.split(",") if args.env.task else (), args.env.settings)
    return make_envs(configs, batch_size, args.eval.n_episodes, args.eval.processes)


def refuse_environment(args, config) -> None:
    """Raises ValueError where an environment of a script cannot be made or has another robot than the policy."""
    from hlrp.envs import refuse_another_robot

    envs = envs_of(args, 1)
    refuse_another_robot(config, envs, args.env.rename_map)
    for env in every(envs):
        env.close()


def tried_as(args) -> dict:
    """What the result of a training script's last roll-out depends on."""
    return {**asdict(args.env), "n_episodes": args.eval.n_episodes, "steps": args.steps}


def is_tried(args) -> bool:
    """Whether OUTPUT_DIR/environment.json is there, and not that of another environment."""
    file = args.output_dir / "environment.json"
    return file.is_file() and json.loads(file.read_text()).get("of") == tried_as(args)


def try_policy(policy, preprocessor, postprocessor, args, folder: Path) -> dict:
    """`evaluate` for a policy in training, with a video of each task. args: `env`, `eval` and `seed` are read.

    Episodes of the same policy and settings that lie in the folder count; others are removed."""
    from lerobot.utils.random_utils import set_seed

    set_seed(args.seed)
    envs = envs_of(args, args.eval.batch_size)
    told = {"rename_map": args.env.rename_map, "task_text": args.env.task_text}
    settings = settings_of(policy, (preprocessor, postprocessor), envs, seed=FIRST_SEED, **told)
    if differences(folder, settings):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)
    result = evaluate(
        policy, preprocessor, postprocessor, envs, args.eval.n_episodes, FIRST_SEED, folder, 1, folder, **told
    )
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
    folder: Path,
    videos: int = 0,
    videos_dir: Path | None = None,
    rename_map: dict[str, str] | None = None,
    task_text: str | None = None,
) -> dict:
    """Success of a policy in `episodes` of each task of `hlrp.envs.make_envs`, as `summary` gives it.

    folder: of the table of episodes; those that are in it are not run again. videos: how many of the first episodes of
    each task to write below videos_dir.
    """
    from lerobot.envs import make_env_pre_post_processors
    from lerobot.processor import RenameObservationsProcessorStep
    from lerobot.scripts.lerobot_eval import eval_policy

    before, behind = make_env_pre_post_processors(every(envs)[0].config, policy.config)
    before.steps = [*before.steps, RenameObservationsProcessorStep(rename_map or {})]
    processors = before, behind, preprocessor, postprocessor
    done = read_episodes(folder)
    latencies: list[float] = []
    bar = tqdm(total=episodes * len(every(envs)), unit="episode", disable=None)
    for (suite, i), name in names_of(envs).items():
        env, rows = envs[suite][i], done.setdefault(name, [])
        env.task_text, env.learned = task_text, getattr(policy, "instructions", ())
        env.num_filmed = videos
        if policy.config.type == "hlrp" and policy.config.n_obs_steps == 1:
            env.is_seen = lambda: not policy._action_queue  # it looks when it has no action left
        env.rows = [*rows]
        bar.update(min(len(rows), episodes))
        while (first := len(rows)) < episodes:
            torch.manual_seed(seed + first)
            count = min(env.num_envs, episodes - first)
            num_videos = min(max(0, videos - first), count)
            partial = folder / "videos.partial" if num_videos else None
            with watched(policy, range(seed + first, seed + first + env.num_envs), latencies), no_bars():
                eval_policy(env, policy, *processors, env.num_envs, num_videos, partial, start_seed=seed + first)
            for k, row in enumerate(env.rows[first:], first):
                video = ""
                if k < videos:
                    assert videos_dir is not None and partial is not None
                    file = videos_dir / f"{suite}_{i}" / f"eval_episode_{k}.mp4"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    (partial / f"eval_episode_{k - first}.mp4").replace(file)
                    video = str(file.relative_to(folder))
                rows.append({"suite": suite, "task": name, "episode": k} | row | {"video": video})
            if partial is not None:
                shutil.rmtree(partial)
            write_episodes(folder, done)
            bar.update(count)
        env.close()
    bar.close()
    rows = [row for name in names_of(envs).values() for row in done[name][:episodes]]
    return summary(rows, latencies[1:])  # the first call is slow: it warms up


def names_of(envs: dict[str, dict]) -> dict[tuple[str, int], str]:
    """The name of each task, by its suite and number in `envs`."""
    names = {(suite, i): env.task for suite, tasks in envs.items() for i, env in tasks.items()}
    if len(set(names.values())) < len(names):  # two suites may have a task of one name
        names = {(suite, i): f"{suite}/{i} {name}" for (suite, i), name in names.items()}
    return names


def settings_of(policy, processors: Sequence, envs: dict[str, dict], **told) -> dict:
    """What an episode depends on, beside its task and number: the policy's weights and settings, and the environment's.

    told: other such settings."""
    unimportant = ("device", "pretrained_path", "push_to_hub", "repo_id", "private", "tags", "license")
    config = {name: value for name, value in vars(policy.config).items() if name not in unimportant}
    states = [
        sorted((name, tensor.tolist()) for name, tensor in step.state_dict().items())
        for processor in processors
        for step in processor.steps
    ]
    env = asdict(every(envs)[0].config)
    env = {name: value for name, value in env.items() if name not in ("task", "task_ids", "max_parallel_tasks")}
    env = {"type": every(envs)[0].config.type} | env
    found = {"policy": weights_hash(policy, sorted(config.items()), states)} | told
    found |= {f"env.{name}": value for name, value in env.items()}
    return json.loads(json.dumps(found, default=str))


def differences(folder: Path, settings: dict) -> list[str]:
    """The settings in which the episodes of a folder differ from others; none where it has no episodes."""
    if not (folder / EPISODES).is_file():
        return []
    was = json.loads((folder / SETTINGS).read_text())
    return [name for name in settings if was.get(name) != settings[name]]


def read_episodes(folder: Path) -> dict[str, list[dict]]:
    """The rows of a table of episodes, by the names of their tasks."""
    rows: dict[str, list[dict]] = {}
    if (folder / EPISODES).is_file():
        for row in csv.DictReader((folder / EPISODES).read_text().splitlines()):
            row |= {name: int(row[name]) for name in ("episode", "seed", "length")}
            row |= {name: float(row[name]) for name in ("return", "max_reward")}
            state = row["init_state"]
            row |= {"success": row["success"] == "1", "init_state": int(state) if state else None}
            rows.setdefault(row["task"], []).append(row)
    return rows


def write_episodes(folder: Path, rows: dict[str, list[dict]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list[str](COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in (row for task in rows.values() for row in task):
        writer.writerow(row | {"success": int(row["success"])})
    write_text(folder / EPISODES, text.getvalue())


@contextmanager
def no_bars() -> Iterator[None]:
    """LeRobot shows a bar for each batch of episodes; `evaluate` shows one for all."""
    from lerobot.scripts import lerobot_eval

    was = lerobot_eval.inside_slurm  # what LeRobot asks whether to show bars
    lerobot_eval.inside_slurm = lambda: True
    try:
        yield
    finally:
        lerobot_eval.inside_slurm = was


def check(args: Args) -> None:
    for name, least in {"episodes": 1, "batch_size": 1, "processes": 1, "videos": 0, "seed": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"{name}={getattr(args, name)}; expected {least} or more")
    if args.batch_size > args.episodes:
        raise ValueError(f"batch_size={args.batch_size} is more than episodes={args.episodes}")


@contextmanager
def watched(policy, seeds: Sequence[int], latencies: list[float]) -> Iterator[None]:
    """Adds to `latencies` how long each chunk of the policy lasts, from the observation on its device on [s].

    seeds: of the episodes that run at once. A flow policy of hlrp gets the noise of each from its seed, so that an
    episode does not depend on those beside it and before it.
    """
    predict, config = policy.predict_action_chunk, policy.config
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def timed(batch, *args, **kwargs):
        if config.type == "hlrp" and config.action_head == "flow":
            size = config.chunk_size, config.action_feature.shape[0]
            noise = torch.stack([torch.randn(size, generator=generator) for generator in generators])
            args = (noise.to(config.device),)
        start = time.perf_counter()
        chunk = predict(batch, *args, **kwargs)
        chunk.cpu()  # waits for the device
        latencies.append(time.perf_counter() - start)
        return chunk

    policy.predict_action_chunk = timed
    try:
        yield
    finally:
        del policy.predict_action_chunk  # the class's own again


def summary(rows: Sequence[dict], latencies: Sequence[float]) -> dict:
    """Success rates with 95 % Wilson intervals and mean returns, of each task, of each suite, and of all; where there
    are several suites, the mean of theirs. Latency of a chunk [ms]."""

    def rate(rows: Sequence[dict]) -> dict:
        successes = sum(row["success"] for row in rows)
        low, high = wilson(successes, len(rows))
        found = {"successes": successes, "episodes": len(rows), "success": successes / len(rows)}
        means = {name: sum(row[name] for row in rows) / len(rows) for name in ("return", "max_reward")}
        return found | {"interval": [low, high]} | means

    def rates(column: str) -> dict:
        return {name: rate([r for r in rows if r[column] == name]) for name in dict.fromkeys(r[column] for r in rows)}

    result: dict[str, Any] = {"tasks": rates("task"), "suites": rates("suite"), "all": rate(rows)}
    if len(result["suites"]) > 1:
        successes = [suite["success"] for suite in result["suites"].values()]
        result["mean_of_suites"] = sum(successes) / len(successes)
    # where the reward tells more than success
    result["is_graded"] = any(row["return"] != float(row["success"]) for row in rows)
    if latencies:
        p50, p99 = torch.tensor(latencies, dtype=torch.float64).quantile(torch.tensor([0.5, 0.99]).double()).tolist()
        result["latency_ms"] = {"p50": 1e3 * p50, "p99": 1e3 * p99, "chunks": len(latencies)}
    return result


def table(result: dict) -> str:
    """Of a `summary`, for the terminal; with returns where rewards are more than success."""
    rows = [*result["tasks"].items()]
    if len(result["suites"]) > 1:
        rows += result["suites"].items()
    rows.append(("all", result["all"]))
    width = max(len(name) for name, _ in rows)
    graded = "  return  max reward" if result["is_graded"] else ""
    lines = [f"{'task':{width}}  success  95 % interval  episodes{graded}"]
    for name, row in rows:
        low, high = row["interval"]
        graded = f"  {row['return']:6.2f}  {row['max_reward']:10.3f}" if result["is_graded"] else ""
        lines.append(f"{name:{width}}  {row['success']:7.2f}  {low:.2f} to {high:.2f}  {row['episodes']:9}{graded}")
    if "mean_of_suites" in result:
        lines.append(f"{'mean of suites':{width}}  {result['mean_of_suites']:7.3f}")
    if "latency_ms" in result:
        p50, p99, chunks = result["latency_ms"].values()
        lines.append(f"observation to chunk: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({chunks} chunks)")
    return "\n".join(lines)


def env_flags(argv: Sequence[str], renamed: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """A command line without the settings of the environment in LeRobot's spelling (--env.NAME=VALUE), and these
    settings as a list of names and values. renamed: flags that have a field of their own, and how they are called."""
    rest, settings, tokens = [], [], [*argv]
    while tokens:
        token = tokens.pop(0)
        flag, equals, value = token.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in renamed:
            rest.append(f"--{renamed[name]}{equals}{value}")
        elif not flag.startswith("--env."):
            rest.append(token)
        else:
            if not equals and (not tokens or tokens[0].startswith("--")):
                raise ValueError(f"--{name} has no value; expected --{name}=VALUE, as --{name}=true")
            settings += [name.removeprefix("env."), value if equals else tokens.pop(0)]
    return rest, settings


LEROBOT_EVAL = {"policy.path": "policy", "env.type": "env", "env.task": "tasks"}
LEROBOT_EVAL |= {"eval.n_episodes": "episodes", "eval.batch_size": "batch-size"}

if __name__ == "__main__":
    tell_mistakes()
    argv, settings = env_flags(sys.argv[1:], LEROBOT_EVAL)
    argv = [*dicts(argv), *(["--env-settings", *settings] if settings else [])]
    main(tyro.cli(Args, description=__doc__, args=argv))
