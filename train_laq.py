"""Stage 1: LAQ learns a few discrete latent actions from video without action labels.

    python train_laq.py                                                          # MetaWorld, rendered here
    python train_laq.py --data videos:DIR lerobot:REPO@0.5 --delta 0.5 --size small
    accelerate launch --config_file slurm/ddp.yaml --num_processes 8 train_laq.py --size base --data lerobot:REPO

The same command resumes an interrupted run. Everything is written to --output-dir; the checkpoint that stage 2
reads is OUTPUT_DIR/checkpoints/last/pretrained_model.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hlrp  # noqa: F401, before torch: it says how OpenMP's threads wait

# isort: split
import torch
import tyro

from hlrp.cli import tell_mistakes
from hlrp.data import action_statistics, open_data
from hlrp.distributed import distribute, first_alone, gathered
from hlrp.laq import LAQ, LAQConfig
from hlrp.laq_validation import alarms, evaluate, findings
from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
from hlrp.pictures import Pictures
from hlrp.sources import num_views, open_sources
from hlrp.strategies import encoded
from hlrp.training import Run, VideoArgs
from hlrp.transformer import Block


@dataclass
class Args(VideoArgs):
    # sources to learn from: videos:DIR lerobot:REPO_OR_DIR hdf5:DIR shards:DIR rlds:DIR world:NAME ...; @0.5: a weight
    data: tuple[str, ...] = ("metaworld:mt10",)
    output_dir: Path = Path("outputs/laq")  # folder of this run: checkpoints, pictures and log
    lr: float = 3e-3  # highest learning rate; use 3e-4 or less for the larger sizes

    model: tyro.conf.OmitArgPrefixes[LAQConfig] = field(default_factory=LAQConfig)


def main(args: Args) -> None:
    args = args.resolved()
    config = args.model.resolved()
    with Run(args) as run:
        with first_alone():  # which renders what is not there yet
            sources, weights = open_sources(args.data, args.skip_broken, args.max_broken)
        config = config.with_views(num_views(sources))
        sizes = {"image_size": config.image_size, "num_views": config.num_views}
        data = open_data(args, sources, weights, times=(0.0, config.delta), **sizes)
        pictures = Pictures(args, data.val)

        torch.manual_seed(args.seed)
        if config.action_weight:
            config = config.with_actions(data.mixture.sizes.action, len(sources))
        laq = LAQ(config)
        if config.action_weight:
            laq.to_action.set_statistics([action_statistics(clips) for clips in data.clips])
        if args.compile:
            for block in (module for module in laq.modules() if isinstance(module, Block)):
                block.compile()
        model = distribute(laq, {Block}, run.accelerator)  # what a rank holds, the optimizer too
        optimizer = make_optimizer(args.optimizer, laq, {Block}, args.lr, args.weight_decay)
        optimizer = run.accelerator.prepare_optimizer(optimizer)
        run.start(args.settings(model=config), data.mixture)
        run.load(model, optimizer)

        @gathered(laq)
        def validate() -> None:
            report = evaluate(laq, data.val, data.fit, **run.ranks, num_workers=args.num_workers)
            run.log_report(report, findings(report), alarms(report))
            pictures.draw(run, laq, partial(encoded, laq))

        run.announce(laq)
        for batch in run.batches(optimizer):
            lr = cosine_lr(run.step, args.lr, args.warmup_steps, args.steps)
            set_lr(optimizer, lr)
            with run.accumulate(model):
                loss, metrics = model(batch)
                run.backward(loss)
                grad_norm = run.clip_grad_norm(model)
                optimizer.step()
            run.advance(loss, grad_norm, lr, metrics)
            if run.must_validate():
                validate()
            if run.must_save():
                run.save(model, optimizer, data=args.data)
        run.print(summary(args.output_dir, run.report))


def summary(output_dir: Path, report: dict) -> str:
    """Where things are, and what comes next."""
    folder, grids = output_dir / "checkpoints" / "last" / "pretrained_model", output_dir / "grids"
    lines = [f"\nLAQ       {folder}"]
    if grids.is_dir():
        lines.append(f"pictures  {grids / 'index.html'}")
        if not any("action_r2" in figures for figures in report.values()):
            lines.append(
                "          there are no actions here: see under Transfer whether a code does the same elsewhere"
            )
    lines.append(f"next      python -m hlrp.probe --latents {folder}")
    lines.append(f"          python train_vla.py --laq {folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
