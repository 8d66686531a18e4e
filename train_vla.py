"""Stage 2: a vision-language model learns to predict the latent actions of a LAQ from image and instruction.

    python train_vla.py                                            # after train_laq.py, on the same data
    python train_vla.py --vlm HuggingFaceTB/SmolVLM2-500M-Video-Instruct --optimizer adamw --lr 1e-4
    python train_vla.py --vlm Qwen/Qwen2.5-VL-3B-Instruct --optimizer adamw --lr 1e-4 --lora-rank 16

The LAQ's checkpoint tells delta, image size and codes. The same command resumes an interrupted run. Everything is
written to --output-dir; the checkpoint that stage 3 reads is OUTPUT_DIR/checkpoints/last/pretrained_model.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hlrp  # noqa: F401, before torch: it says how OpenMP's threads wait

# isort: split
import torch
import tyro

from hlrp.card_verdict import refuse_failed
from hlrp.cli import tell_mistakes
from hlrp.data import action_statistics, open_data
from hlrp.distributed import distribute, first_alone, gathered
from hlrp.label import cached_space, latent_space
from hlrp.laq import LAQ
from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
from hlrp.pictures import Pictures
from hlrp.sources import instructions, open_sources
from hlrp.training import Run, VideoArgs
from hlrp.vla import VLA, VLAConfig
from hlrp.vla_validation import alarms, evaluate, feature_dim, findings, label, predicted_latents, shuffled
from hlrp.vlm import VLM


@dataclass
class Args(VideoArgs):
    laq: Path = Path("outputs/laq/checkpoints/last/pretrained_model")  # checkpoint of stage 1, the teacher
    accept_failed_laq: bool = False  # train even if the LAQ failed its validation or its probe card
    shuffle_latents: bool = False  # a control: give each sample the latent actions of another one
    model: tyro.conf.OmitArgPrefixes[VLAConfig] = field(default_factory=VLAConfig)

    # sources to learn from, as for train_laq.py; by default those that the LAQ learned from
    data: tuple[str, ...] = ()
    output_dir: Path = Path("outputs/vla")  # folder of this run: checkpoints, pictures and log
    lr: float = 2e-3  # highest learning rate; use 1e-4 or less, and adamw, for a pretrained --vlm


def main(args: Args) -> None:
    args = args.resolved()
    stage1 = refuse_failed(args.laq, args.accept_failed_laq)
    uris = args.data or tuple(stage1["data"])
    with Run(args) as run:
        laq = LAQ.from_pretrained(args.laq).requires_grad_(False).to(run.device)  # the teacher
        space = latent_space(laq)
        with first_alone():  # which renders what is not there yet
            sources, weights = open_sources(uris, args.skip_broken, args.max_broken)

        torch.manual_seed(args.seed)
        config = args.model.resolved(space)
        vlm = VLM.from_config(config.vlm, instructions(sources, args.skip_broken))
        times = tuple(space.delta * i for i in range(config.chunk_size + 1))
        cached, latents_from = cached_space(sources, space)
        sizes = {"image_size": space.image_size, "num_views": space.num_views, "input_size": vlm.image_size}
        data = open_data(args, sources, weights, times, train={"min_times": 2, "latent_space": cached}, **sizes)
        pictures = Pictures(args, data.val)
        if config.point_weight and not any("point" in samples[0] for samples in data.val.values()):
            raise ValueError(f"point_weight={config.point_weight}, but no source in the data has a point")

        if config.feature_weight:
            config.feature_dim = feature_dim(laq, vlm)
        if config.action_weight:
            config.action_dim, config.action_sources = data.mixture.sizes.action, len(sources)
        vla = VLA(config, space, vlm)
        if config.action_weight:
            vla.to_action.set_statistics([action_statistics(clips) for clips in data.clips])
        if args.compile:
            for block in (module for module in vla.modules() if type(module) in vla.block_classes()):
                block.compile()
        model = distribute(vla, vla.vlm.block_classes(), run.accelerator)  # what a rank holds, the optimizer too
        optimizer = make_optimizer(args.optimizer, vla, vla.hidden_classes(), args.lr, args.weight_decay)
        optimizer = run.accelerator.prepare_optimizer(optimizer)
        run.start(args.settings(model=config) | {"laq": space.fingerprint}, data.mixture)
        run.load(model, optimizer)

        @gathered(vla)
        def validate(teacher: LAQ) -> None:
            report = evaluate(vla, teacher, data.val, data.fit, **run.ranks, num_workers=args.num_workers)
            run.log_report(report, findings(report), alarms(report))
            pictures.draw(run, teacher, partial(predicted_latents, vla, teacher))

        run.print(latents_from)
        run.announce(vla)
        for batch in run.batches(optimizer):
            lr = cosine_lr(run.step, args.lr, args.warmup_steps, args.steps)
            set_lr(optimizer, lr)
            frames = batch.pop("frames")  # the future leaves the batch: what it did is the label
            labels = label(laq, frames) if not cached or config.feature_weight else {}
            if args.shuffle_latents:
                labels = shuffled(batch | labels)
            with run.accumulate(model):
                loss, metrics = model(batch | labels)
                run.backward(loss)
                grad_norm = run.clip_grad_norm(model)
                optimizer.step()
            run.advance(loss, grad_norm, lr, metrics)
            if run.must_validate():
                validate(laq)
            if run.must_save():
                run.save(model, optimizer, data=uris)
        run.print(summary(args))


def summary(args: Args) -> str:
    """Where things are, and what comes next."""
    folder, grids = args.output_dir / "checkpoints" / "last" / "pretrained_model", args.output_dir / "grids"
    lines = [f"\nVLA       {folder}", *([f"pictures  {grids / 'index.html'}"] if grids.is_dir() else [])]
    lines.append(f"next      python finetune_policy.py --policy.vla {folder} --laq {args.laq}")
    return "\n".join(lines)


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
