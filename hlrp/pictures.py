"""Pictures during training: which strategies are drawn, of which buckets of samples, and how often."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch.utils.data import Dataset

from hlrp import charts
from hlrp.buckets import Bucket, fill
from hlrp.laq import LAQ
from hlrp.shown import Latents, Shown, Skip
from hlrp.strategies import STRATEGIES

log = logging.getLogger(__name__)

MAX_SAMPLES = 512  # of a bucket, encoded and counted
EVERY = "every"  # strategy


class Binding(NamedTuple):
    """A strategy, the buckets that it is drawn of, and every how many steps."""

    strategy: str
    buckets: tuple[str, ...]
    freq: int

    def is_due(self, step: int | None, last: int | None) -> bool:
        return step is None or step % self.freq == 0 or step == last


def bindings_of(pictures: Sequence[str], buckets: Sequence[Bucket], eval_freq: int = 1) -> list[Binding]:
    """Those that `STRATEGY`, `STRATEGY:BUCKET,BUCKET` and `STRATEGY@STEPS` ask for; of all buckets at every validation,
    else. `every` is every strategy. Raises ValueError naming what does not fit."""
    names, bindings = [bucket.name for bucket in buckets], []
    for text in pictures:
        rest, _, freq = text.partition("@")
        strategy, _, chosen = rest.partition(":")
        if strategy not in (EVERY, *STRATEGIES):
            fits = ", ".join((EVERY, *STRATEGIES))
            raise ValueError(f"pictures={text!r}: no strategy {strategy!r}; {fits} fit")
        if freq and (not freq.isdecimal() or int(freq) < 1 or int(freq) % eval_freq):
            raise ValueError(f"pictures={text!r}: a multiple of eval_freq={eval_freq} fits behind @")
        wanted = chosen.split(",") if chosen else names
        for name in wanted:
            if name not in names:
                raise ValueError(f"pictures={text!r}: no bucket {name!r}; there are {', '.join(names)}")
        for name in STRATEGIES if strategy == EVERY else [strategy]:
            bindings.append(Binding(name, tuple(wanted), int(freq or eval_freq)))
    return bindings


@torch.no_grad()
def draw_pictures(
    laq: LAQ,
    latents_of: Callable[[dict], Latents],
    sets: dict[str, Dataset],
    buckets: Sequence[Bucket],
    bindings: Sequence[Binding],
    folder: Path,
    step: int | None = None,
    last: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Draws what is due at a step, and returns figures by "bucket/strategy/figure".

    latents_of: of a batch of samples of `sets`; last: the step at which everything is due. Files are named after their
    strategies, and the step where there is one; those of buckets other than `all` lie in folders of their names. The
    samples are a seeded choice, the same at every step. What is skipped is named in the log, with the reason.
    """
    due = [binding for binding in bindings if binding.is_due(step, last)]
    wanted = [bucket for bucket in buckets if any(bucket.name in binding.buckets for binding in due)]
    was_training = laq.training
    laq.eval()
    figures, skipped = {}, []
    for bucket, (samples, source) in zip(wanted, fill(wanted, sets, MAX_SAMPLES, seed).values(), strict=True):
        if not samples:
            skipped.append(f"all of bucket {bucket.name}: no held-out sample has {bucket}, in {', '.join(sets)}")
            continue
        shown = Shown(laq, latents_of, samples, source, seed)
        place = folder if not bucket.conditions else folder / bucket.name
        place.mkdir(parents=True, exist_ok=True)
        for strategy in (binding.strategy for binding in due if bucket.name in binding.buckets):
            end = "" if step is None else f"_{step:06d}"
            title = f"{strategy.replace('-', ' ').capitalize()}" + ("" if step is None else f", step {step}")
            title += f". {bucket.name}: {len(samples)} held-out samples" if bucket.conditions else ""
            try:
                with matplotlib.rc_context(charts.STYLE):
                    found = STRATEGIES[strategy](shown, place / f"{strategy}{end}.png", title)
            except Skip as reason:
                skipped.append(f"{strategy} of bucket {bucket.name}: {reason}")
                continue
            figures |= {f"{bucket.name}/{strategy}/{name}": value for name, value in found.items()}
    laq.train(was_training)
    for reason in skipped:
        log.warning("no picture %s", reason)
    return figures
