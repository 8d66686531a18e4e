"""Pictures during training: which strategies are drawn, for which buckets of samples, and how often.

A bucket is a named set of validation samples. It is a line `NAME: CONDITION and CONDITION ...`, where a condition is

    dataset=bridge          the field has this text
    dataset!=bridge         the field has another text
    dataset in ego4d,ssv2   the field has one of these texts
    task~left               the field contains this text, in capitals or not

The fields of a sample are dataset, task, episode, index (its first frame), fps, and what its source adds
(`embodiment` in the built-in world). The bucket `all` always exists.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor

from hlrp.card_page import document
from hlrp.checkpoints import write_text
from hlrp.contract import SampleSet
from hlrp.data import subset
from hlrp.laq import LAQ
from hlrp.plots import STYLE
from hlrp.strategies import STRATEGIES, BucketSamples, Latents, Skip

EVERYTHING = "all"
EXAMPLE = "expected a bucket such as 'left: task~left', or a file of such lines"


class Condition(NamedTuple):
    field: str
    test: str  # "=", "!=", "in" or "~"
    values: tuple[str, ...]

    def holds(self, value: object) -> bool:
        value = str(value)
        match self.test:
            case "~":
                return self.values[0].lower() in value.lower()
            case "!=":
                return value != self.values[0]
            case _:
                return value in self.values


class Bucket(NamedTuple):
    name: str
    conditions: tuple[Condition, ...] = ()

    def __str__(self) -> str:
        return " and ".join(f"{field} {test} {','.join(values)}" for field, test, values in self.conditions)

    def holds(self, sample: dict) -> bool:
        """Whether a sample is in this bucket. A sample without the field of a condition is not."""
        return all(c.field in sample and c.holds(plain(sample[c.field])) for c in self.conditions)

    def may_hold(self, dataset: str) -> bool:
        """False where no sample of this data set can be in this bucket."""
        return all(c.holds(dataset) for c in self.conditions if c.field == "dataset")


def plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) else value


def read_buckets(given: Sequence[str]) -> list[Bucket]:
    """The bucket `all`, and the buckets of `given`, each a line or a file of lines. Raises ValueError for a bad one."""
    lines = []
    for text in given:
        if ":" in text and not Path(text).is_file():
            lines.append(text)
        elif Path(text).is_file():
            every = (line.partition("#")[0].strip() for line in Path(text).read_text().splitlines())
            lines += [line for line in every if line]
        else:
            raise ValueError(f"buckets={text!r} is neither a file nor a bucket; {EXAMPLE}")
    buckets = [Bucket(EVERYTHING), *map(parse_bucket, lines)]
    names = [bucket.name for bucket in buckets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"buckets: two are named {name!r}; expected different names ({EVERYTHING!r} always exists)"
            )
    return buckets


def parse_bucket(line: str) -> Bucket:
    name, _, rule = (part.strip() for part in line.partition(":"))
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"bucket {line!r}: its name is {name!r}; expected letters, digits, _ and -")
    return Bucket(name, tuple(parse_condition(text, line) for text in re.split(r"\s+and\s+", rule)))


def parse_condition(text: str, line: str) -> Condition:
    found = re.fullmatch(r"([\w.]+)\s*(!=|=|~|\sin\s)\s*(.+)", text.strip())
    if found is None:
        raise ValueError(
            f"bucket {line!r}: {text!r} is no condition; expected FIELD=VALUE, FIELD!=VALUE, FIELD in A,B or FIELD~TEXT"
        )
    field, test, value = (part.strip() for part in found.groups())
    values = tuple(part.strip() for part in value.split(",")) if test == "in" else (value,)
    return Condition(field, test, values)


def check_fields(buckets: Sequence[Bucket], sets: Mapping[str, SampleSet]) -> None:
    """Raises ValueError for a field that the first sample of no set has."""
    if not any(bucket.conditions for bucket in buckets):
        return
    known = {
        key
        for dataset in sets.values()
        for key, value in dataset[0].items()
        if not isinstance(value, Tensor) or value.ndim == 0
    }
    for bucket in buckets:
        for condition in bucket.conditions:
            if condition.field not in known:
                fields = ", ".join(sorted(known))
                raise ValueError(
                    f"bucket {bucket.name}: no sample has the field {condition.field!r}; there are {fields}"
                )


def fill(
    buckets: Sequence[Bucket], sets: Mapping[str, SampleSet], limit: int, seed: int
) -> dict[str, tuple[list[dict], Tensor]]:
    """At most `limit` random samples of each bucket, and for each sample the number of its set, int64 (b,).

    All sets give the same number of samples while they last. They are read in turns until the buckets are full.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(dataset), generator=generator).tolist() for dataset in sets.values()]
    per_turn = limit // max(1, len(sets)) + 1
    found: dict[str, tuple[list[dict], list[int]]] = {bucket.name: ([], []) for bucket in buckets}
    while any(orders):
        for number, (name, dataset) in enumerate(sets.items()):
            open_ones = [b for b in buckets if len(found[b.name][0]) < limit and b.may_hold(name)]
            if not open_ones:
                orders[number] = []
            picks, orders[number] = orders[number][:per_turn], orders[number][per_turn:]
            samples = subset(dataset, picks).__getitems__(list(range(len(picks)))) if picks else []
            for bucket in open_ones:
                mine = [sample for sample in samples if bucket.holds(sample)]
                mine = mine[: limit - len(found[bucket.name][0])]
                found[bucket.name][0].extend(mine)
                found[bucket.name][1].extend([number] * len(mine))
    return {name: (samples, torch.tensor(numbers)) for name, (samples, numbers) in found.items()}


log = logging.getLogger(__name__)

MAX_SAMPLES = 512  # of each bucket
EVERY = "every"  # in place of a strategy: all of them


class Binding(NamedTuple):
    """A strategy, the buckets to draw it for, and how often, in steps."""

    strategy: str
    buckets: tuple[str, ...]
    freq: int

    def is_due(self, step: int | None, last: int | None) -> bool:
        return step is None or step % self.freq == 0 or step == last


def bindings_of(pictures: Sequence[str], buckets: Sequence[Bucket], eval_freq: int = 1) -> list[Binding]:
    """What `STRATEGY`, `STRATEGY:BUCKET,BUCKET` and `STRATEGY@STEPS` ask for. The default is all buckets, at every
    validation; `every` stands for all strategies. Raises ValueError for an unknown strategy or bucket and bad steps."""
    names, bindings = [bucket.name for bucket in buckets], []
    for text in pictures:
        rest, _, freq = text.partition("@")
        strategy, _, chosen = rest.partition(":")
        if strategy not in (EVERY, *STRATEGIES):
            known = ", ".join((EVERY, *STRATEGIES))
            raise ValueError(f"pictures={text!r}: no strategy {strategy!r}; expected one of {known}")
        if freq and (not freq.isdecimal() or int(freq) < 1 or int(freq) % eval_freq):
            raise ValueError(f"pictures={text!r}: expected a multiple of eval_freq={eval_freq} behind @")
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
    sets: Mapping[str, SampleSet],
    buckets: Sequence[Bucket],
    bindings: Sequence[Binding],
    folder: Path,
    step: int | None = None,
    last: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Draws the pictures that are due at a step, and returns figures by "bucket/strategy/figure".

    latents_of: gives the latent actions of a batch of samples of `sets`; last: the step at which everything is due.
    A file is named STRATEGY.png, or STRATEGY_STEP.png where there is a step; a bucket other than `all` has a folder of
    its name. A seed chooses the samples, the same at every step. The log names what is skipped, with the reason.
    """
    import matplotlib

    due = [binding for binding in bindings if binding.is_due(step, last)]
    wanted = [bucket for bucket in buckets if any(bucket.name in binding.buckets for binding in due)]
    was_training = laq.training
    laq.eval()
    figures, skipped = {}, []
    for bucket, (samples, source) in zip(wanted, fill(wanted, sets, MAX_SAMPLES, seed).values(), strict=True):
        if not samples:
            skipped.append(f"all of bucket {bucket.name}: no held-out sample has {bucket}, in {', '.join(sets)}")
            continue
        pictured = BucketSamples(laq, latents_of, samples, source, seed)
        place = folder if not bucket.conditions else folder / bucket.name
        place.mkdir(parents=True, exist_ok=True)
        for strategy in (binding.strategy for binding in due if bucket.name in binding.buckets):
            end = "" if step is None else f"_{step:06d}"
            title = f"{strategy.replace('-', ' ').capitalize()}" + ("" if step is None else f", step {step}")
            title += f". {bucket.name}: {len(samples)} held-out samples" if bucket.conditions else ""
            try:
                with matplotlib.rc_context(STYLE):
                    result = STRATEGIES[strategy](pictured, place / f"{strategy}{end}.png", title)
            except Skip as reason:
                skipped.append(f"{strategy} of bucket {bucket.name}: {reason}")
                continue
            figures |= {f"{bucket.name}/{strategy}/{name}": value for name, value in result.items()}
    laq.train(was_training)
    for reason in skipped:
        log.warning("no picture %s", reason)
    return figures


CAPTIONS = {  # of each strategy: what its picture shows, and what to look for
    "reconstructions": (
        "Held-out pairs: the first frame, the second one, what is decoded from the first frame and the latent action, "
        "and from that of another pair. Wanted: the third picture moves as the second, the fourth does not."
    ),
    "transfer": (
        "The latent action of one sample, applied to the first frame of another episode, of another source where there "
        "are several. Wanted: the same motion in both, though they show different scenes."
    ),
    "permuted": "Pairs decoded with their own latent actions and with those of others. Wanted: the second are wrong.",
    "one-code": "One latent action in each row, applied to many first frames. Wanted: the same motion along a row.",
    "many-codes": "The most frequent latent actions on one frame. Wanted: motions that differ, and look like actions.",
    "usage": "How often each code stands at each token. Wanted: many codes in use, none alone.",
    "sequences": "How often each whole sequence of codes occurs. Wanted: many sequences, none that covers nearly all.",
    "examples": "Pairs that have exactly the same codes, a row for each sequence. Wanted: the same motion along a row.",
    "embedding": (
        "Each pair as a point: its latent action in two principal components, coloured by the direction of the true "
        "action. Wanted: colours that lie apart."
    ),
    "actions": "True actions, coloured by the code that says most of them. Wanted: colours that lie apart.",
    "states": "States of the robot, coloured likewise. Wanted: mixed colours, since an action is no place.",
    "compass": (
        "Arrows: the mean motion in the image of the pairs with each code, as it is and without the motion that all "
        "pairs of a source share. Wanted: arrows in different directions."
    ),
    "sources": "The share of each code in every source. Wanted: like rows, since a code should not tell the source.",
}


def write_page(folder: Path, title: str) -> None:
    """Writes index.html beside the pictures of a run: the last of each kind with its caption, earlier ones below."""
    steps: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.rglob("*_[0-9]*.png")):
        bucket = "" if file.parent == folder else str(file.parent.relative_to(folder))
        steps.setdefault((bucket, file.stem.rpartition("_")[0]), []).append(file)
    body = f"<h1>{escape(title)}</h1><p class=why>All samples are held out: the model has not learned from them.</p>"
    order = [*STRATEGIES]
    for (bucket, strategy), files in sorted(steps.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        of = f", samples of {bucket}" if bucket else ""
        *earlier, last = [
            f"<figure class=grid><figcaption>After step {int(file.stem.rpartition('_')[2])}: {file.name}</figcaption>"
            f'<img alt="{escape(strategy)}" loading=lazy src="{quote(str(file.relative_to(folder)))}"></figure>'
            for file in files
        ]
        older = f"<details><summary>Earlier steps</summary>{''.join(reversed(earlier))}</details>" if earlier else ""
        head = escape(strategy.replace("-", " ").capitalize() + of)
        caption = f"<p class=why>{escape(CAPTIONS[strategy])}</p>"
        body += f"<section><h3>{head}</h3>{caption}{last}{older}</section>"
    write_text(folder / "index.html", document(title, body))


class Pictures:
    """The pictures of a run: chosen by the settings `pictures`, `buckets` and `eval_freq`, drawn into `grids`."""

    def __init__(self, args, sets: Mapping[str, SampleSet]):
        """sets: the held-out samples of each source. Raises ValueError for an unknown bucket or picture."""
        self.buckets, self.sets = read_buckets(args.buckets), sets
        self.bindings = bindings_of(args.pictures, self.buckets, args.eval_freq)
        self.folder, self.last = args.output_dir / "grids", args.steps
        check_fields(self.buckets, sets)

    def draw(self, run, laq: LAQ, latents_of: Callable[[dict], Latents]) -> None:
        """Draws on the main rank what is due at this step, logs the figures and shows the files; the others wait."""
        if run.is_main:
            place = {"folder": self.folder, "step": run.step, "last": self.last}
            figures = draw_pictures(laq, latents_of, self.sets, self.buckets, self.bindings, **place)
            run.log("pictures", figures)
            if self.folder.is_dir():
                write_page(self.folder, f"What the latent actions of {self.folder.parent.name} do")
            run.show(self.folder.rglob(f"*_{run.step:06d}.png"))
        run.wait_for_all()
