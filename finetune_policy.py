"""Stage 3: a policy for a robot from few demonstrations, which LeRobot's commands evaluate and run.

    python finetune_policy.py                                # after train_vla.py, on the same data
    python finetune_policy.py --data 'metaworld:mt10?episodes=100' --demonstrations 5
    python finetune_policy.py --dataset.repo_id=USER/NAME --policy.path=FOLDER --steps=2000
    python finetune_policy.py --policy.vla=null --policy.vlm=tiny    # behaviour cloning, without stage 2

The actions of --demonstrations episodes of each task are learned. Small networks learn from them to read the actions of
the other episodes from their latent actions. With several sources, all other video shows latent actions alone.
LeRobot's spelling of flags (--batch_size=8, --wandb.enable=true, --dataset.episodes=[0,1]) is understood. The same
command resumes an interrupted run. The policy is OUTPUT_DIR/checkpoints/last/pretrained_model.
"""

import json
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import hlrp  # noqa: F401, before torch: it says how OpenMP's threads wait

# isort: split
import torch
import tyro
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hlrp.checkpoints import write_json
from hlrp.cli import NOT_GIVEN, Interval, tell_mistakes
from hlrp.demonstrations import (
    PolicySettings,
    alarms,
    choose_parts,
    evaluate,
    findings,
    gets_labels,
    give_labels,
    lerobot_flags,
    mix,
    refuse_other_cameras,
    robot_features,
    robots_of,
    settings_given,
    statistics,
    teacher_of,
    to_lerobot,
)
from hlrp.distributed import distribute, first_alone, gathered, sharding
from hlrp.idle import IdleConfig, save_picture
from hlrp.label import cached_space, latent_space
from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
from hlrp.rollout import EnvArgs, EvalArgs, env_flags, is_tried, refuse_environment, try_policy
from hlrp.sources import instructions, open_sources
from hlrp.training import Run, RunArgs
from hlrp.vla_validation import label, shuffled


@dataclass
class Args(RunArgs):
    # sources to learn from, as for train_laq.py; by default those that stage 2 learned from
    data: tuple[str, ...] = ()
    demonstrations: int | None = None  # episodes of each task whose actions are learned; None: all
    # numbers of the episodes whose actions are learned, in place of --demonstrations; with one source only
    episodes: tuple[int, ...] | None = None
    # actions of the other episodes, with one source only: a folder that hlrp.inverse wrote; auto: read from the latent
    # actions of --laq, into OUTPUT_DIR/pseudo_actions; None: latent actions in their place
    pseudo_actions: Literal["auto"] | Path | None = "auto"
    shuffle_latents: bool = False  # a control: give each sample the latent actions of another one
    idle: IdleConfig = field(default_factory=IdleConfig)  # frames that are left out of training
    state: bool = True  # let the policy read the robot's state where the data have it

    policy: PolicySettings = field(default_factory=PolicySettings)
    policy_path: Path | None = None  # policy to start from, in place of --policy.vla and --policy.vlm
    laq: Path = Path("outputs/laq/checkpoints/last/pretrained_model")  # checkpoint of stage 1 that stage 2 learned from

    output_dir: Path = Path("outputs/policy")  # folder of this run: checkpoints, videos and log
    steps: int = 1000  # optimizer steps of the whole run
    batch_size: int = 32  # samples of the demonstrations in a forward pass of one process
    # samples of the other episodes beside them, with latent actions or pseudo-actions; None: as many as --batch-size
    video_batch_size: int | None = None
    lr: float = 1e-3  # highest learning rate; use 1e-4 or less, and adamw, for a pretrained vlm
    ema_decay: float = 0.0  # keep an exponential moving average of the weights as the policy, such as .999; 0: do not
    # validate every so many steps, and after the last one; None: a quarter of --steps, at most 250
    eval_freq: Interval = NOT_GIVEN
    # save a checkpoint every so many steps, and after the last one; None: half of --steps, at most 500
    save_freq: Interval = NOT_GIVEN

    env: EnvArgs = field(default_factory=EnvArgs)
    env_eval_freq: int = 0  # try the policy in the environment every so many steps; 0: only after the last one
    eval: EvalArgs = field(default_factory=EvalArgs)
    # settings of the policy that the command line has
    given: tyro.conf.Suppress[frozenset[str]] = frozenset()

    INTERVALS = RunArgs.INTERVALS | {"eval_freq": (4, 250), "save_freq": (2, 500)}

    def settings(self, **resolved) -> dict:
        values = asdict(replace(self, **resolved))
        del values["given"]
        values |= {f"policy.{name}": value for name, value in values.pop("policy").items()}
        return json.loads(json.dumps(values, default=str))

    def check(self) -> None:
        super().check()
        if self.demonstrations is not None and (self.demonstrations < 1 or self.episodes is not None):
            raise ValueError(f"demonstrations={self.demonstrations}; expected 1 or more, and no --episodes beside it")
        if (self.video_batch_size or 0) < 0:
            raise ValueError(f"video_batch_size={self.video_batch_size}; expected 0 or more")
        if self.policy.push_to_hub and not self.policy.repo_id:
            raise ValueError("policy.push_to_hub without policy.repo_id; expected USER/NAME")
        if self.env_eval_freq < 0 or (self.env_eval_freq and not self.env.type):
            raise ValueError(f"env_eval_freq={self.env_eval_freq}; expected 0 or more, and an --env.type")
        self.eval.check()


def main(args: Args) -> None:
    # LeRobot's policies take seconds to import, and --help does without them
    from hlrp.policy import HLRPConfig, HLRPPolicy, data_of, make_hlrp_pre_post_processors, push_to_hub, start_from

    args = args.resolved()
    with Run(args) as run:
        if args.policy_path is None:
            config = HLRPConfig(**vars(args.policy))
        else:
            config = start_from(args.policy_path, args.policy, args.given, args.state)
        config.device = run.device.type
        if args.env.type:
            from hlrp.envs import env_configs

            env_configs(args.env.type, settings=args.env.settings)  # there is one of this name

        # demonstrations, and other video
        uris = args.data or data_of(config, args.policy_path)
        with first_alone():  # which renders what is not there yet
            sources, weights = open_sources(uris, args.skip_broken, args.max_broken)
        parts = choose_parts(args, sources, weights)
        has_labels = gets_labels(args, config, parts)
        if has_labels and args.policy.latent_weight is None:
            config.latent_weight = 0.0
        robots = robots_of(parts, config)
        if args.policy_path is None:
            config.input_features, config.output_features = robot_features(robots, args.state)
            config.crop = robots[0].source.crop
        refuse_other_cameras(sources, config)
        if args.env.type:
            refuse_environment(args, config)
        stats = statistics(robots, config.robot_state_feature is not None)

        # policy
        torch.manual_seed(args.seed)
        if args.policy_path is None:
            policy = HLRPPolicy(config, instructions=instructions(sources, args.skip_broken)).to(config.device)
        else:
            policy = HLRPPolicy.from_pretrained(args.policy_path, config=config)
        preprocessor, postprocessor = make_hlrp_pre_post_processors(config, stats)
        policy.instructions = instructions(sources, args.skip_broken, [part.demonstrations for part in parts])
        policy.train()
        if has_labels:
            give_labels(args, parts[0], config)
        laq = teacher_of(policy, args.laq)
        times, sizes, cached, latents_from = (0.0,), {"image_size": policy.vlm.image_size}, None, ""
        if laq is not None:
            space = latent_space(laq)
            times = tuple(space.delta * i for i in range(config.latent_chunk_size + 1))
            sizes = {"image_size": space.image_size, "num_views": space.num_views}
            cached, latents_from = cached_space(sources, space)
        sizes |= {"chunk_size": config.chunk_size, "num_images": config.n_obs_steps}
        with_video = laq is not None or has_labels
        mixture, val_sets, batch_size = mix(
            args, parts, times, with_video, cached, **sizes, input_size=policy.vlm.image_size
        )

        model = distribute(policy, policy.vlm.block_classes(), run.accelerator)
        optimizer = make_optimizer(args.optimizer, policy, policy.hidden_classes(), args.lr, args.weight_decay)
        optimizer = run.accelerator.prepare_optimizer(optimizer)
        average = None
        if args.ema_decay:
            if sharding() is not None:
                raise ValueError(f"ema_decay={args.ema_decay}, but the model lies in shards; expected 0")
            average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
        learned = policy if average is None else average.module
        run.start(args.settings(policy=config), mixture, batch_size)
        run.load(model, optimizer, average)
        if args.idle.is_set() and run.is_main:
            for part in parts:
                save_picture(args.output_dir / "idle" / f"{part.source.name}.png", part.source, args.idle, part.train)

        @gathered(policy)
        def validate() -> None:
            report = evaluate(learned, preprocessor, laq, val_sets, **run.ranks, num_workers=args.num_workers)
            run.log_report(report, findings(report), alarms(report))

        @gathered(policy)
        def roll_out() -> None:
            if run.is_main:
                videos = args.output_dir / "videos" / f"step_{run.step:06d}"
                result = try_policy(learned, preprocessor, postprocessor, args, videos)
                if run.step == args.steps:
                    write_json(args.output_dir / "environment.json", result)
                rates = result["tasks"] | {"all": result["all"]}
                run.log("env", {f"success/{name}": row["success"] for name, row in rates.items()})
                run.show(videos.rglob("*.mp4"))
            run.wait_for_all()

        def write(folder: Path, weights: dict, **provenance) -> None:
            policy.save_pretrained(folder, state_dict=weights)
            preprocessor.save_pretrained(folder)
            postprocessor.save_pretrained(folder)
            write_json(folder / "provenance.json", provenance)

        run.announce(policy)
        if latents_from:
            run.print(latents_from)
        for batch in run.batches(optimizer):
            lr = cosine_lr(run.step, args.lr, args.warmup_steps, args.steps)
            set_lr(optimizer, lr)
            frames = batch.pop("frames")  # the future leaves the batch: what it did is the label
            if laq is not None and not cached:
                batch |= label(laq, frames)
            if args.shuffle_latents:
                batch = shuffled(batch)
            with run.accumulate(model):
                loss, metrics = model(batch | preprocessor(to_lerobot(batch, config)), as_tensors=True)
                run.backward(loss)
                grad_norm = run.clip_grad_norm(model)
                optimizer.step()
            run.advance(loss, grad_norm, lr, metrics)
            if average is not None and run.has_stepped:
                average.update_parameters(policy)
            if run.must_validate():
                validate()
            if run.must_save():
                run.save(model, optimizer, average, write, data=uris, laq=laq and laq.fingerprint)
            if args.env_eval_freq and run.is_due(args.env_eval_freq) and run.step < args.steps:
                roll_out()
        if args.env.type and not is_tried(args):
            roll_out()  # of what is saved: a fault of the environment costs no step
        if run.is_main and config.push_to_hub:
            push_to_hub(policy, args.output_dir / "checkpoints" / "last" / "pretrained_model", uris)
        run.print(summary(args.output_dir))


def summary(output_dir: Path) -> str:
    """Where things are, and what comes next."""
    folder = output_dir / "checkpoints" / "last" / "pretrained_model"
    return f"\npolicy    {folder}\nnext      python -m hlrp.rollout --policy {folder} --env ENVIRONMENT --tasks TASK"


if __name__ == "__main__":
    tell_mistakes()
    own = [f"env.{setting.name}" for setting in fields(EnvArgs)]
    argv, settings = env_flags(sys.argv[1:], dict(zip(own, own, strict=True)))
    argv = [*lerobot_flags(argv), *(["--env.settings", *settings] if settings else [])]
    args = tyro.cli(Args, description=__doc__, args=argv, config=(tyro.conf.AvoidSubcommands,))
    args.given = settings_given(argv)
    main(args)
