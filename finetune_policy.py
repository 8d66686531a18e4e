"""Stage 3: a policy for a robot from few demonstrations, which LeRobot's commands evaluate and run.

    python finetune_policy.py                                # after train_vla.py, on the same data
    python finetune_policy.py --data 'metaworld:mt10?episodes=100' --demonstrations 5
    python finetune_policy.py --dataset.repo_id=USER/NAME --policy.path=FOLDER --steps=2000
    python finetune_policy.py --policy.vla=null --policy.vlm=tiny    # behaviour cloning, without stage 2

The actions of --demonstrations episodes of each task are learned; all other video shows latent actions alone.
LeRobot's spelling of flags (--batch_size=8, --wandb.enable=true, --dataset.episodes=[0,1]) is understood. The same
command resumes an interrupted run. The policy is OUTPUT_DIR/checkpoints/last/pretrained_model.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from hlrp.checkpoints import load_config, write_json
from hlrp.cli import tell_mistakes
from hlrp.distributed import ends_its_run
from hlrp.idle import IdleConfig
from hlrp.policy import HLRPConfig
from hlrp.policy_data import lerobot_flags, make_flags, policy_settings

make_flags(HLRPConfig)
STAGE2 = Path("outputs/vla/checkpoints/last/pretrained_model")


@dataclass
class EnvArgs:
    type: str | None = None  # environment to try the policy in: hlrp_metaworld, hlrp_world or one of LeRobot's
    task: str | None = None  # tasks of the environment, by commas; None: those it has by default


@dataclass
class EvalArgs:
    n_episodes: int = 10  # episodes to try in each task
    batch_size: int = 5  # environments that run at once


@dataclass
class Args:
    # sources to learn from, as for train_laq.py; by default those that stage 2 learned from
    data: tuple[str, ...] = ()
    demonstrations: int | None = None  # episodes of each task whose actions are learned; None: all
    # numbers of the episodes whose actions are learned, in place of --demonstrations; with one source only
    episodes: tuple[int, ...] | None = None
    action_free: float = 0.5  # share of the samples that come from the other episodes, which show latent actions alone
    # folder that hlrp.inverse wrote: its actions label the other episodes; with one source only
    pseudo_actions: Path | None = None
    shuffle_latents: bool = False  # a control: give each sample the latent actions of another one
    idle: IdleConfig = field(default_factory=IdleConfig)  # frames that are left out of training
    state: bool = True  # let the policy read the robot's state where the data have it
    val_fraction: float = 0.1  # share of each source's episodes that is held out for validation
    val_samples: int = 512  # most samples of each source in a validation
    skip_broken: bool = False  # leave out and count what cannot be read, instead of stopping at it
    max_broken: int = 100  # with --skip-broken: stop after this many unreadable files or clips per process

    policy: HLRPConfig = field(default_factory=lambda: HLRPConfig(vla=str(STAGE2), push_to_hub=False))
    policy_path: Path | None = None  # policy to start from, in place of --policy.vla and --policy.vlm
    laq: Path = Path("outputs/laq/checkpoints/last/pretrained_model")  # checkpoint of stage 1 that stage 2 learned from

    output_dir: Path = Path("outputs/policy")  # folder of this run: checkpoints, videos and log
    steps: int = 1000  # optimizer steps of the whole run
    batch_size: int = 32  # samples in a forward pass of one process
    grad_accumulation: int = 1  # forward passes in an optimizer step, whose gradients are added
    optimizer: Literal["muon", "adamw"] = "muon"  # muon trains a model from scratch in fewer steps than adamw
    lr: float = 1e-3  # highest learning rate; use 1e-4 or less, and adamw, for a pretrained vlm
    # steps in which the learning rate grows, before it falls by a cosine; None: a sixth of --steps, at most 100
    warmup_steps: int | None = None
    weight_decay: float = 0.05  # share of a weight, times the learning rate, that each step takes away
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down to it
    ema_decay: float = 0.0  # keep an exponential moving average of the weights as the policy, such as .999; 0: do not
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # number format of the forward pass; auto: bf16 on a GPU
    seed: int = 0  # of the weights, the order of the data and the held-out episodes
    num_workers: int = 2  # processes that load data, for each training process

    # log the training loss every so many steps; None: a twelfth of --steps, at most 50
    log_freq: int | None = None
    # validate every so many steps, and after the last one; None: a quarter of --steps, at most 250
    eval_freq: int | None = None
    # save a checkpoint every so many steps, and after the last one; None: half of --steps, at most 500
    save_freq: int | None = None
    env: EnvArgs = field(default_factory=EnvArgs)
    env_eval_freq: int = 0  # try the policy in the environment every so many steps; 0: only after the last one
    eval: EvalArgs = field(default_factory=EvalArgs)
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to OUTPUT_DIR/tensorboard
    # settings of the policy that the command line has
    given: tyro.conf.Suppress[frozenset[str]] = frozenset()


@ends_its_run
def main(args: Args) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from hlrp.clips import Clips
    from hlrp.contract import choose_demonstrations, is_stream, split_episodes
    from hlrp.data import Mixture, choose_clips, loader
    from hlrp.distributed import (
        check_loop,
        die_with_launcher,
        distribute,
        first_alone,
        gathered,
        make_accelerator,
        set_intervals,
        sharding,
        wait_for_all,
    )
    from hlrp.idle import busy_frames, save_picture
    from hlrp.inverse import PseudoLabelled
    from hlrp.label import cached_space, latent_space
    from hlrp.laq import LAQ
    from hlrp.laq_validation import scalars
    from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
    from hlrp.policy_data import alarms, evaluate, refuse_other_cameras, robot_features, statistics, to_lerobot
    from hlrp.rollout import environment
    from hlrp.sources import expand, instructions, open_sources, parse_uri
    from hlrp.streams import clips_of
    from hlrp.training import Run
    from hlrp.vla_validation import label, shuffled

    die_with_launcher()
    set_intervals(args, eval_freq=(4, 250), save_freq=(2, 500))
    check_loop(args)
    args.data = expand(args.data) or data_of(args)
    check(args)
    accelerator = make_accelerator(args)
    ranks = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}
    config = args.policy if args.policy_path is None else saved_config(args)
    config.device = accelerator.device.type
    if args.env.type:
        environment(args.env.type, args.env.task)  # there is one of this name

    # demonstrations, and other video
    with first_alone():  # which renders what is not there yet
        sources = open_sources(args.data, args.skip_broken, args.max_broken)
    splits = [split_episodes(source, args.val_fraction, args.seed) for source in sources]
    if args.episodes is None:
        shown = [
            choose_demonstrations(source, train, args.demonstrations, args.seed)
            for source, (train, _) in zip(sources, splits, strict=True)
        ]
    else:
        shown = [only(args.episodes, sources, splits)]
    sizes = {"min_times": 1, "chunk_size": config.chunk_size, "num_images": config.n_obs_steps}
    robots = [Clips(s, e, (0.0,), labelled_episodes=e, **sizes) for s, e in zip(sources, shown, strict=True) if len(e)]
    if args.policy_path is None:
        config.input_features, config.output_features = robot_features(robots, args.state)
    refuse_other_cameras(sources, config)
    stats = statistics(robots, config.robot_state_feature is not None)
    truths = sources  # what validation compares with
    if args.pseudo_actions is not None:
        sources = [PseudoLabelled(*sources, args.pseudo_actions, *shown)]

    # policy
    torch.manual_seed(args.seed)
    policy, preprocessor, postprocessor = make_policy(args, config, stats, instructions(sources, args.skip_broken))
    laq, times = None, (0.0,)
    if policy.latent_head is not None and config.latent_weight:
        stage2 = config.stage2
        laq = LAQ.from_pretrained(args.laq).requires_grad_(False).to(accelerator.device)
        if laq.fingerprint != stage2["latent_space"]["fingerprint"]:
            raise ValueError(
                f"laq={args.laq} is not the one that stage 2 learned from; --policy.latent-weight 0 needs none"
            )
        space = latent_space(laq)
        times = tuple(space.delta * i for i in range(stage2["vla"]["chunk_size"] + 1))
    cached, latents_from = (None, "") if laq is None else cached_space(sources, space)
    sizes["image_size"] = policy.vlm.image_size if laq is None else space.image_size
    sizes["input_size"] = policy.vlm.image_size

    clips, weights, val_sets = [], [], {}
    for i, (uri, source, truth, (train, val), labelled) in enumerate(
        zip(args.data, sources, truths, splits, shown, strict=True)
    ):
        weight, others = parse_uri(uri).weight, train if is_stream(source) else np.setdiff1d(train, labelled)
        busy = {"frames": busy_frames(source, args.idle) if args.idle.is_set() else None}
        if busy["frames"] is not None and accelerator.is_main_process:
            save_picture(args.output_dir / "idle" / f"{source.name}.png", source, args.idle, train)
        if len(labelled):
            clips.append(Clips(source, labelled, times, source_index=i, latent_space=cached, **busy, **sizes))
            weights.append(weight * (1 - args.action_free))
            val_clips = Clips(truth, val, times, source_index=i, **sizes)
            val_sets[source.name] = choose_clips(val_clips, args.val_samples, args.seed, args.skip_broken)
        if len(others) and args.action_free and (laq is not None or args.pseudo_actions):
            labelled = others if args.pseudo_actions else ()
            name = {"labelled_episodes": labelled, "latent_space": cached, "name": f"{source.name}-video"}
            clips.append(clips_of(source, others, times, source_index=i, seed=args.seed, **name, **busy, **sizes))
            weights.append(weight * args.action_free)
    mixture = Mixture(clips, weights, args.seed, args.skip_broken)

    model = distribute(policy, policy.vlm.block_classes(), accelerator)
    optimizer = make_optimizer(args.optimizer, policy, policy.hidden_classes(), args.lr, args.weight_decay)
    optimizer = accelerator.prepare_optimizer(optimizer)
    average = None
    if args.ema_decay:
        if sharding() is not None:
            raise ValueError(f"ema_decay={args.ema_decay}, but the model lies in shards; 0 fits")
        average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    learned = policy if average is None else average.module
    run = Run(accelerator, args.output_dir, settings(args), mixture.parts)
    run.load(model, optimizer, average)

    @gathered(policy)
    def validate() -> None:
        run.report = evaluate(learned, preprocessor, laq, val_sets, **ranks, num_workers=args.num_workers)
        run.log("val", scalars(run.report), run.step)
        for alarm in alarms(run.report):
            run.print(f"ALARM: {alarm}")

    @gathered(policy)
    def roll_out() -> None:
        if accelerator.is_main_process:
            result = in_environment(args, learned, preprocessor, postprocessor, run.step)
            if run.step == args.steps:
                write_json(args.output_dir / "environment.json", result)
            rates = {name: row["success"] for name, row in (result["tasks"] | {"all": result["all"]}).items()}
            run.log("env", {f"success/{name}": rate for name, rate in rates.items()}, run.step)
            run.show((args.output_dir / "videos" / f"step_{run.step:06d}").rglob("*.mp4"), run.step)
        wait_for_all()

    def write(folder: Path, weights: dict, **provenance) -> None:
        policy.save_pretrained(folder, state_dict=weights)
        preprocessor.save_pretrained(folder)
        postprocessor.save_pretrained(folder)
        write_json(folder / "provenance.json", provenance)

    # train
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    run.print(
        f"{trained / 1e6:.1f} M trained parameters, {sum(map(len, shown))} demonstrations of {len(robots)} source(s), "
        f"{mixture}, {args.steps} steps of "
        f"{run.samples_per_step} samples, lr {args.lr:g}, {accelerator.device}"
    )
    if laq is not None:
        run.print(latents_from)
    start = run.step * run.samples_per_step
    train_loader = loader(
        mixture, args.batch_size, start, **ranks, num_workers=args.num_workers, turns=run.intake.turns
    )
    for batch in run.batches(train_loader):
        lr = cosine_lr(run.step, args.lr, args.warmup_steps, args.steps)
        set_lr(optimizer, lr)
        frames = batch.pop("frames")  # the future leaves the batch: what it did is the label
        if laq is not None and not cached:
            batch |= label(laq, frames)
        if args.shuffle_latents:
            batch = shuffled(batch)
        with accelerator.accumulate(model):
            loss, metrics = model(batch | preprocessor(to_lerobot(batch, config)))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue  # below here: once per optimizer step
        step = run.advance(loss, grad_norm)
        if average is not None:
            average.update_parameters(policy)

        is_last = step == args.steps
        if step % args.log_freq == 0:
            consumed = mixture.consumed(0, step * run.samples_per_step)
            shares = {f"share/{c.name}": n / consumed.sum() for c, n in zip(clips, consumed, strict=True)}
            metrics = {name: torch.tensor(x, device=loss.device) for name, x in metrics.items()}  # of this rank
            run.log("train", {"loss": loss, **metrics, "grad_norm": grad_norm, "lr": lr, **shares}, step)
        if step % args.eval_freq == 0 or is_last:
            validate()
        stop = run.must_stop()
        if stop or step % args.save_freq == 0 or is_last:
            run.save(model, optimizer, average, write, data=args.data, laq=laq and laq.fingerprint)
        if stop and not is_last:
            run.interrupt()
        if args.env_eval_freq and step % args.env_eval_freq == 0 and not is_last:
            roll_out()
    if args.env.type and not (args.output_dir / "environment.json").is_file():
        roll_out()  # of what is saved: a fault of the environment costs no step
    run.finish()
    if accelerator.is_main_process and config.push_to_hub:
        push_to_hub(policy, args.output_dir / "checkpoints" / "last" / "pretrained_model", args.data)
    run.print(summary(args.output_dir, run.report))


def check(args: Args) -> None:
    """Raises ValueError for settings that do not fit each other."""
    if args.demonstrations is not None and (args.demonstrations < 1 or args.episodes is not None):
        raise ValueError(f"demonstrations={args.demonstrations}; expected 1 or more, and no --episodes beside it")
    if args.episodes is not None and len(args.data) != 1:
        raise ValueError(f"episodes={args.episodes} are of one source; data={args.data} fits with --demonstrations")
    if args.pseudo_actions is not None and len(args.data) > 1:
        raise ValueError(f"pseudo_actions={args.pseudo_actions} are of one source; data={args.data} are several")
    if args.action_free == 1:
        raise ValueError("action_free=1 leaves no sample with actions; expected less than 1")
    if args.policy.push_to_hub and not args.policy.repo_id:
        raise ValueError("policy.push_to_hub without policy.repo_id; expected USER/NAME")
    if args.env_eval_freq < 0 or args.env_eval_freq and not args.env.type:
        raise ValueError(f"env_eval_freq={args.env_eval_freq}; expected 0 or more, and an --env.type")
    for name in ("n_episodes", "batch_size"):
        if getattr(args.eval, name) < 1:
            raise ValueError(f"eval.{name}={getattr(args.eval, name)}; expected 1 or more")


def data_of(args: Args) -> tuple[str, ...]:
    """The sources that the checkpoint it starts from learned from."""
    if args.policy_path is not None:
        refuse_no_policy(args.policy_path)
        file = args.policy_path / "provenance.json"
        if not file.is_file():
            raise ValueError(f"data is empty, and {args.policy_path} does not say what it learned from; give --data")
        return tuple(json.loads(file.read_text())["data"])
    if args.policy.vla is None:
        raise ValueError("data is empty, and without policy.vla there is no stage 2 to take it from; give --data")
    return tuple(load_config(args.policy.vla, "vla")["data"])


def refuse_no_policy(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"policy.path={folder} holds no config.json: expected a policy's pretrained_model folder; run "
            "finetune_policy.py without --policy.path first, or give another one"
        )


def saved_config(args: Args) -> HLRPConfig:
    """That of a checkpoint, with the settings that were given; raises ValueError for one that it cannot take."""
    from lerobot.configs import PreTrainedConfig

    folder, given = args.policy_path, args.policy
    refuse_no_policy(folder)
    config = PreTrainedConfig.from_pretrained(folder)
    if not isinstance(config, HLRPConfig):
        raise ValueError(f"policy.path={folder} is a policy of type {config.type!r}; expected hlrp")
    fixed = "vla vlm image_size lora_rank n_obs_steps chunk_size action_head num_bins expert_dim expert_depth".split()
    default = Args().policy
    for name, value in ((f.name, getattr(given, f.name)) for f in fields(HLRPConfig)):
        if value == getattr(default, name) and name not in args.given:
            continue
        if name in fixed and value != getattr(config, name):
            raise ValueError(
                f"policy.{name}={value}, but policy.path={folder} has {getattr(config, name)}; leave it out"
            )
        setattr(config, name, value)
    # what the checkpoint was pushed to stays as it is
    config.push_to_hub, config.repo_id = given.push_to_hub, given.repo_id
    if not args.state and config.robot_state_feature is not None:
        raise ValueError(f"no-state, but policy.path={folder} reads the state; leave it out")
    config.__post_init__()
    return config


def only(episodes: tuple[int, ...], sources: list, splits: list) -> np.ndarray:
    """The given episodes of the only source; raises ValueError where one of them is held out or does not exist."""
    (source,), ((train, _),) = sources, splits
    if strangers := sorted(set(episodes) - set(train.tolist())):
        raise ValueError(
            f"episodes={strangers} of {source.uri} are held out or do not exist; of its {len(source.lengths)} those "
            f"to train on are {train.tolist()[:8]}..., by --val-fraction and --seed"
        )
    return np.sort(np.array(episodes))


def make_policy(args: Args, config: HLRPConfig, stats: dict, instructions: list[str]):
    """The policy and LeRobot's processors, which normalise by the statistics of the demonstrations."""
    from hlrp.policy import HLRPPolicy, make_hlrp_pre_post_processors

    if args.policy_path is None:
        policy = HLRPPolicy(config, instructions=instructions).to(config.device)
    else:
        policy = HLRPPolicy.from_pretrained(args.policy_path, config=config)
    return policy.train(), *make_hlrp_pre_post_processors(config, stats)


def in_environment(args: Args, policy, preprocessor, postprocessor, step: int) -> dict:
    """Success in simulation, with a video of each task in OUTPUT_DIR/videos."""
    from hlrp.rollout import environment, evaluate, table

    env_config = environment(args.env.type, args.env.task)
    from lerobot.utils.random_utils import set_seed

    videos_dir = args.output_dir / "videos" / f"step_{step:06d}"
    set_seed(args.seed)
    result = evaluate(
        policy, preprocessor, postprocessor, env_config, args.eval.n_episodes, 1000, args.eval.batch_size, 1, videos_dir
    )
    print(table(result))
    return result


def push_to_hub(policy, folder: Path, data: tuple[str, ...]) -> None:
    """Uploads the checkpoint with LeRobot's model card, as one commit."""
    from huggingface_hub import HfApi

    api, config = HfApi(), policy.config
    repo_id = api.create_repo(config.repo_id, private=config.private, exist_ok=True).repo_id
    card = policy.generate_model_card(", ".join(data), config.type, config.license, config.tags)
    with tempfile.TemporaryDirectory() as copy:
        whole = shutil.copytree(folder, Path(copy) / "policy")
        card.save(whole / "README.md")
        api.upload_folder(repo_id=repo_id, folder_path=whole, commit_message="Upload policy")


def settings(args: Args) -> dict:
    """The settings by the names of their flags, as plain values."""
    values = asdict(args)
    values |= {f"policy.{name}": value for name, value in values.pop("policy").items()}
    del values["given"]
    return json.loads(json.dumps(values, default=str))


def summary(output_dir: Path, report: dict) -> str:
    """Where things are, and the figures that matter."""
    lines = [f"\npolicy         {output_dir / 'checkpoints' / 'last' / 'pretrained_model'}"]
    for name, figures in report.items():
        lines.append(
            f"{name}: actions off by {figures['action_error']:.2f} standard deviations (the mean action "
            f"{figures['action_error_mean']:.2f}, shuffled text {figures['action_error_shuffled_text']:.2f}, "
            f"blank image {figures['action_error_blank_image']:.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    tell_mistakes()
    config = (tyro.conf.AvoidSubcommands,)
    argv = lerobot_flags(sys.argv[1:])
    args = tyro.cli(Args, description=__doc__, args=argv, config=config)
    args.given = policy_settings(argv)
    main(args)
