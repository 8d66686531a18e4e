"""Stage 2: a vision-language model learns to predict the latent actions of a LAQ from image and instruction.

    python train_vla.py                                            # after train_laq.py, on the same data
    python train_vla.py --vlm HuggingFaceTB/SmolVLM2-500M-Video-Instruct --optimizer adamw --lr 1e-4
    python train_vla.py --vlm Qwen/Qwen2.5-VL-3B-Instruct --optimizer adamw --lr 1e-4 --lora-rank 16

The LAQ's checkpoint tells delta, image size and codes. The same command resumes an interrupted run. Everything is
written to --output-dir; the checkpoint that stage 3 reads is OUTPUT_DIR/checkpoints/last/pretrained_model.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from hlrp.cli import tell_mistakes
from hlrp.distributed import ends_its_run
from hlrp.vla import VLA, VLAConfig, check
from hlrp.vlm import VLM


@dataclass
class Args:
    laq: Path = Path("outputs/laq/checkpoints/last/pretrained_model")  # checkpoint of stage 1, the teacher
    accept_failed_laq: bool = False  # train even if the LAQ failed its validation or its probe card
    # sources to learn from, as for train_laq.py; by default those that the LAQ learned from
    data: tuple[str, ...] = ()
    # multiply each source's weight by its number of clips ** (1 / temperature); 1: sources count by their size
    temperature: float | None = None
    val_fraction: float = 0.1  # share of each source's episodes that is held out for validation
    val_samples: int = 512  # most samples of each source in a validation
    label_fraction: float = 1.0  # with --action-weight: share of each task's episodes whose actions are used
    # with --action-weight: so many episodes of each task instead, those that finetune_policy.py takes
    demonstrations: int | None = None
    shuffle_latents: bool = False  # a control: give each sample the latent actions of another one
    skip_broken: bool = False  # leave out and count what cannot be read, instead of stopping at it
    max_broken: int = 100  # with --skip-broken: stop after this many unreadable files or clips per process

    model: VLAConfig = field(default_factory=VLAConfig)

    output_dir: Path = Path("outputs/vla")  # folder of this run: checkpoints, pictures and log
    steps: int = 600  # optimizer steps of the whole run
    batch_size: int = 32  # samples in a forward pass of one process
    grad_accumulation: int = 1  # forward passes in an optimizer step, whose gradients are added
    optimizer: Literal["muon", "adamw"] = "muon"  # muon trains a model from scratch in fewer steps than adamw
    lr: float = 2e-3  # highest learning rate; use 1e-4 or less, and adamw, for a pretrained --vlm
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
    from hlrp.card_verdict import faults as card_faults
    from hlrp.checkpoints import load_config
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
    from hlrp.images import regrid
    from hlrp.label import cached_space, latent_space
    from hlrp.laq import LAQ
    from hlrp.laq_validation import alarms as laq_alarms
    from hlrp.laq_validation import scalars
    from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
    from hlrp.pictures import bindings_of, check_fields, draw_pictures, read_buckets
    from hlrp.sources import expand, instructions, open_sources, parse_uri
    from hlrp.streams import clips_of
    from hlrp.training import Run
    from hlrp.vla_validation import alarms, evaluate, label, predicted_latents, shuffled

    die_with_launcher()
    set_intervals(args)
    check_loop(args)
    check(args.model)
    buckets = read_buckets(args.buckets)
    bindings = bindings_of(args.pictures, buckets, args.eval_freq)
    stage1 = load_config(args.laq, "laq")
    faults = laq_alarms(stage1["report"] or {}) + card_faults(args.laq)
    if faults and not args.accept_failed_laq:
        raise ValueError(f"laq={args.laq} has failed: {' '.join(faults)} --accept-failed-laq trains on it all the same")
    args.data = expand(args.data) or tuple(stage1["data"])
    accelerator = make_accelerator(args)
    ranks = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}

    # teacher
    laq = LAQ.from_pretrained(args.laq).requires_grad_(False).to(accelerator.device)
    space = latent_space(laq)

    # model and data: an image and the frames that follow it, from other episodes in training and validation
    with first_alone():  # which renders what is not there yet
        sources = open_sources(args.data, args.skip_broken, args.max_broken)
    if args.model.vlm.vlm == "tiny" and args.model.vlm.image_size is None:
        args.model.vlm.image_size = space.image_size
    torch.manual_seed(args.seed)
    vlm = VLM.from_config(args.model.vlm, instructions(sources, args.skip_broken))
    times = tuple(space.delta * i for i in range(args.model.chunk_size + 1))
    cached, latents_from = cached_space(sources, space)
    train_clips, fit_clips, val_clips = [], [], []
    for i, source in enumerate(sources):
        train_episodes, val_episodes = split_episodes(source, args.val_fraction, args.seed, times)
        labelled = labelled_episodes(source, train_episodes, args.demonstrations, args.label_fraction, args.seed)
        sizes = {"image_size": space.image_size, "input_size": vlm.image_size, "source_index": i}
        sizes["seed"] = args.seed
        labels = {"labelled_episodes": labelled, "latent_space": cached}
        train_clips.append(clips_of(source, train_episodes, times, min_times=2, **sizes, **labels))
        fit_clips.append(clips_of(source, train_episodes, times, labelled_episodes=labelled, **sizes))
        val_clips.append(clips_of(source, val_episodes, times, **sizes))
    weights = [parse_uri(uri).weight for uri in args.data]
    mixture = Mixture(train_clips, weights, args.seed, args.skip_broken, args.temperature)
    chosen = partial(choose_clips, seed=args.seed, skip_broken=args.skip_broken)
    val_sets = {clips.source.name: chosen(clips, args.val_samples) for clips in val_clips}
    check_fields(buckets, val_sets)
    if args.model.point_weight and not any("point" in samples[0] for samples in val_sets.values()):
        raise ValueError(f"point_weight={args.model.point_weight}, but no source in the data has a point")
    fit_sets = {clips.source.name: chosen(clips, 4 * args.val_samples) for clips in fit_clips}
    if args.model.feature_weight is None:
        args.model.feature_weight = 1.0 if args.model.vlm.vlm == "tiny" else 0.0
    if args.model.feature_weight:
        blank = torch.zeros(1, 1, 3, space.image_size, space.image_size, dtype=torch.uint8)
        features = label(laq, blank.to(accelerator.device))["features"]
        args.model.feature_dim = regrid(features, vlm.num_image_tokens).shape[-1]
    if args.model.action_weight:
        args.model.action_dim, args.model.action_sources = mixture.sizes.action, len(sources)
    vla = VLA(args.model, space, vlm)
    if args.model.action_weight:
        vla.to_action.set_statistics([action_statistics(clips) for clips in train_clips])
    if args.compile:
        for block in (module for module in vla.modules() if type(module) in vla.block_classes()):
            block.compile()
    model = distribute(vla, vla.vlm.block_classes(), accelerator)  # what a rank holds, the optimizer too
    optimizer = make_optimizer(args.optimizer, vla, vla.hidden_classes(), args.lr, args.weight_decay)
    optimizer = accelerator.prepare_optimizer(optimizer)
    run = Run(accelerator, args.output_dir, settings(args), mixture.parts)
    run.load(model, optimizer)

    @gathered(vla)
    def validate() -> None:
        run.report = evaluate(vla, laq, val_sets, fit_sets, **ranks, num_workers=args.num_workers)
        run.log("val", scalars(run.report), run.step)
        for alarm in alarms(run.report):
            run.print(f"ALARM: {alarm}")
        if accelerator.is_main_process:
            place = {"folder": args.output_dir / "grids", "step": run.step, "last": args.steps}
            predicted = partial(predicted_latents, vla, laq)
            figures = draw_pictures(laq, predicted, val_sets, buckets, bindings, **place)
            run.log("pictures", figures, run.step)
            run.show(place["folder"].rglob(f"*_{run.step:06d}.png"), run.step)
        wait_for_all()

    # train
    trained = sum(p.numel() for p in vla.parameters() if p.requires_grad)
    run.print(latents_from)
    run.print(
        f"{trained / 1e6:.1f} M trained parameters, {mixture}, "
        f"{args.steps} steps of {run.samples_per_step} samples, lr {args.lr:g}, {accelerator.device}"
    )
    start = run.step * run.samples_per_step
    train_loader = loader(
        mixture, args.batch_size, start, **ranks, num_workers=args.num_workers, turns=run.intake.turns
    )
    for batch in run.batches(train_loader):
        lr = cosine_lr(run.step, args.lr, args.warmup_steps, args.steps)
        set_lr(optimizer, lr)
        frames = batch.pop("frames")  # the future leaves the batch: what it did is the label
        if not cached or args.model.feature_weight:
            batch |= label(laq, frames)
        if args.shuffle_latents:
            batch = shuffled(batch)
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
            shares = {f"share/{s.name}": n / consumed.sum() for s, n in zip(sources, consumed, strict=True)}
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
    values |= values.pop("vlm")
    return json.loads(json.dumps(values, default=str))


def summary(output_dir: Path, report: dict) -> str:
    """Where things are, and the figures that matter."""
    folder = output_dir / "checkpoints" / "last" / "pretrained_model"
    lines = [f"\nVLA            {folder}", f"pictures       {output_dir / 'grids'}"]
    for name, figures in report.items():
        if "accuracy" in figures:
            lines.append(
                f"{name}: {figures['accuracy']:.1%} of the codes predicted "
                f"(most frequent code {figures['majority']:.1%}, shuffled text "
                f"{figures['accuracy_shuffled_text']:.1%}, blank image {figures['accuracy_blank_image']:.1%})"
            )
        if figures.get("action_r2") is not None:
            lines.append(
                f"{name}, true actions from the prediction: R2 {figures['action_r2']:.2f} "
                f"(from the true codes {figures['action_r2_true']:.2f}, random codes {figures['action_r2_random']:.2f})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
