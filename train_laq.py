"""Stage 1: LAQ learns a few discrete latent actions from video without action labels.

    python train_laq.py                                                          # MetaWorld, rendered here
    python train_laq.py --data videos:DIR lerobot:REPO@0.5 --delta 0.5 --size small
    accelerate launch --config_file slurm/ddp.yaml --num_processes 8 train_laq.py --size base --data lerobot:REPO

The same command resumes an interrupted run. Everything is written to --output-dir; the checkpoint that stage 2
reads is OUTPUT_DIR/checkpoints/last/pretrained_model.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from hlrp.cli import tell_mistakes
from hlrp.distributed import ends_its_run
from hlrp.laq import LAQ, LAQConfig


@dataclass
class Args:
    # sources to learn from: videos:DIR lerobot:REPO_OR_DIR shards:DIR rlds:DIR world:NAME ...; one may end in @WEIGHT
    data: tuple[str, ...] = ("metaworld:mt10",)
    # multiply each source's weight by its number of clips ** (1 / temperature); 1: sources count by their size
    temperature: float | None = None
    val_fraction: float = 0.1  # share of each source's episodes that is held out for validation
    val_samples: int = 512  # most pairs of frames of each source in a validation
    label_fraction: float = 1.0  # with --action-weight: share of each task's episodes whose actions are used
    # with --action-weight: so many episodes of each task instead, those that finetune_policy.py takes
    demonstrations: int | None = None
    skip_broken: bool = False  # leave out and count what cannot be read, instead of stopping at it
    max_broken: int = 100  # with --skip-broken: stop after this many unreadable files or clips per process

    model: Annotated[LAQConfig, tyro.conf.arg(name="")] = field(default_factory=LAQConfig)

    output_dir: Path = Path("outputs/laq")  # folder of this run: checkpoints, pictures and log
    steps: int = 600  # optimizer steps of the whole run
    batch_size: int = 32  # pairs of frames in a forward pass of one process
    grad_accumulation: int = 1  # forward passes in an optimizer step, whose gradients are added
    optimizer: Literal["muon", "adamw"] = "muon"  # muon trains a model from scratch in fewer steps than adamw
    lr: float = 3e-3  # highest learning rate; use 3e-4 or less for the larger sizes
    # steps in which the learning rate grows, before it falls by a cosine; None: a sixth of --steps, at most 100
    warmup_steps: int | None = None
    weight_decay: float = 0.05  # share of a weight, times the learning rate, that each step takes away
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down to it
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # number format of the forward pass; auto: bf16 on a GPU
    compile: bool = False  # compile each transformer block by torch.compile
    seed: int = 0  # of the weights, the order of the data and the held-out episodes
    num_workers: int = 2  # processes that load data, for each training process

    # log the training loss every so many steps; None: a twelfth of --steps, at most 50
    log_freq: int | None = None
    # validate every so many steps, and after the last one; None: half of --steps, at most 300
    eval_freq: int | None = None
    # save a checkpoint every so many steps, and after the last one; None: half of --steps, at most 300
    save_freq: int | None = None
    buckets: tuple[str, ...] = ()  # sets of validation samples to draw: 'left: task~left', or files of such lines
    # which pictures to draw at validation: NAME, NAME:BUCKET,BUCKET or NAME@STEPS
    pictures: tuple[str, ...] = ("every",)
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to OUTPUT_DIR/tensorboard


@ends_its_run
def main(args: Args) -> None:
    from hlrp.contract import labelled_episodes, split_episodes
    from hlrp.data import Mixture, action_statistics, choose_clips, loader
    from hlrp.distributed import (
        check_loop,
        die_with_launcher,
        distribute,
        first_alone,
        gathered,
        make_accelerator,
        set_intervals,
        wait_for_all,
    )
    from hlrp.laq_validation import alarms, evaluate, scalars
    from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
    from hlrp.pictures import bindings_of, check_fields, draw_pictures, read_buckets
    from hlrp.sources import expand, open_sources, parse_uri
    from hlrp.strategies import encoded
    from hlrp.streams import clips_of
    from hlrp.training import Run
    from hlrp.transformer import Block

    die_with_launcher()
    set_intervals(args)
    check_loop(args)
    args.data = expand(args.data)
    args.model = args.model.resolved()
    buckets = read_buckets(args.buckets)
    bindings = bindings_of(args.pictures, buckets, args.eval_freq)
    accelerator = make_accelerator(args)
    ranks = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}

    # data: pairs of frames, from other episodes in training and validation
    with first_alone():  # which renders what is not there yet
        sources = open_sources(args.data, args.skip_broken, args.max_broken)
    train_clips, val_clips = [], []
    for i, source in enumerate(sources):
        times = (0.0, args.model.delta)
        train_episodes, val_episodes = split_episodes(source, args.val_fraction, args.seed, times)
        labelled = labelled_episodes(source, train_episodes, args.demonstrations, args.label_fraction, args.seed)
        pairs = {"times": times, "image_size": args.model.image_size, "source_index": i}
        pairs["seed"] = args.seed
        train_clips.append(clips_of(source, train_episodes, **pairs, labelled_episodes=labelled))
        val_clips.append(clips_of(source, val_episodes, **pairs))
    weights = [parse_uri(uri).weight for uri in args.data]
    mixture = Mixture(train_clips, weights, args.seed, args.skip_broken, args.temperature)
    chosen = partial(choose_clips, seed=args.seed, skip_broken=args.skip_broken)
    val_sets = {clips.source.name: chosen(clips, args.val_samples) for clips in val_clips}
    check_fields(buckets, val_sets)
    fit_sets = {clips.source.name: chosen(clips, 4 * args.val_samples) for clips in train_clips}

    # model
    torch.manual_seed(args.seed)
    if args.model.action_weight:
        args.model.action_dim, args.model.action_sources = mixture.sizes.action, len(sources)
    laq = LAQ(args.model)
    if args.model.action_weight:
        laq.to_action.set_statistics([action_statistics(clips) for clips in train_clips])
    if args.compile:
        for block in (module for module in laq.modules() if isinstance(module, Block)):
            block.compile()
    model = distribute(laq, {Block}, accelerator)  # what a rank holds, the optimizer too
    optimizer = make_optimizer(args.optimizer, laq, {Block}, args.lr, args.weight_decay)
    optimizer = accelerator.prepare_optimizer(optimizer)
    run = Run(accelerator, args.output_dir, settings(args), mixture.parts)
    run.load(model, optimizer)

    @gathered(laq)
    def validate() -> None:
        run.report = evaluate(laq, val_sets, fit_sets, **ranks, num_workers=args.num_workers)
        run.log("val", scalars(run.report), run.step)
        for alarm in alarms(run.report):
            run.print(f"ALARM: {alarm}")
        if accelerator.is_main_process:
            place = {"folder": args.output_dir / "grids", "step": run.step, "last": args.steps}
            figures = draw_pictures(laq, partial(encoded, laq), val_sets, buckets, bindings, **place)
            run.log("pictures", figures, run.step)
            run.show(place["folder"].rglob(f"*_{run.step:06d}.png"), run.step)
        wait_for_all()

    # train
    num_parameters = sum(p.numel() for p in laq.parameters() if p.requires_grad)
    run.print(
        f"{num_parameters / 1e6:.1f} M trained parameters, {mixture}, "
        f"{args.steps} steps of {run.samples_per_step} pairs, lr {args.lr:g}, {accelerator.device}"
    )
    start = run.step * run.samples_per_step
    train_loader = loader(
        mixture, args.batch_size, start, **ranks, num_workers=args.num_workers, turns=run.intake.turns
    )
    for batch in run.batches(train_loader):
        lr = cosine_lr(run.step, args.lr, args.warmup_steps, args.steps)
        set_lr(optimizer, lr)
        with accelerator.accumulate(model):
            loss, metrics = model(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue  # below here: once per optimizer step
        step = run.advance(loss, grad_norm)

        if step % args.log_freq == 0:
            consumed = mixture.consumed(0, step * run.samples_per_step)
            shares = {f"share/{source.name}": n / consumed.sum() for source, n in zip(sources, consumed, strict=True)}
            run.log("train", {"loss": loss, **metrics, "grad_norm": grad_norm, "lr": lr, **shares}, step)
        if step % args.eval_freq == 0 or step == args.steps:
            validate()
        stop = run.must_stop()
        if stop or step % args.save_freq == 0 or step == args.steps:
            run.save(model, optimizer, data=args.data)
        if stop and step < args.steps:
            run.interrupt()
    run.finish()
    run.print(summary(args.output_dir, run.report))


def settings(args: Args) -> dict:
    """The settings by the names of their flags, as plain values."""
    values = asdict(args)
    values |= values.pop("model")
    return json.loads(json.dumps(values, default=str))


def summary(output_dir: Path, report: dict) -> str:
    """Where things are, the figures that matter, and what comes next."""
    folder = output_dir / "checkpoints" / "last" / "pretrained_model"
    lines = [f"\nLAQ            {folder}", f"pictures       {output_dir / 'grids'}"]
    for name, figures in report.items():
        for target, ratio in figures["true_over_copy"].items():
            line = f"{name}, {target}: error / copy-frame error {ratio:.2f} (below 1 is better)"
            if figures["shuffled_over_true"] is not None:
                shuffled = figures["shuffled_over_true"][target]
                line += f", error with a shuffled code / true code {shuffled:.2f} (above 1.2 is healthy)"
            lines.append(line)
        if figures.get("action_r2") is not None:
            lines.append(
                f"{name}, true actions from the code: R2 {figures['action_r2']:.2f} "
                f"(random codes {figures['action_r2_random']:.2f})"
            )
    lines.append(f"next           python train_vla.py --laq {folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
