"""The probe card: what the latent actions of a LAQ, or of any other model, are worth, every figure beside its control.

    python -m hlrp.probe --latents outputs/laq/checkpoints/last/pretrained_model    # on the data it learned from
    python -m hlrp.probe --latents latents.npz --data lerobot:REPO --delta 0.2  # of another model
    python -m hlrp.probe --compare outputs/probe outputs/other_probe

Prints a table and a verdict, and writes OUTPUT_DIR/card.json and the page OUTPUT_DIR/card.html, one file that needs no
network. The card of a checkpoint on the data that it learned from is also kept as probe.json beside its config.json;
stage 2 refuses a LAQ whose card failed.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro

from hlrp.cli import tell_mistakes


@dataclass
class Args:
    # what to judge: pretrained_model folder of a LAQ, or .npz or .parquet (hlrp.card_subjects)
    latents: Path | None = None
    data: tuple[str, ...] = ()  # sources, as for train_laq.py; default: the sources that the LAQ learned from
    compare: tuple[Path, ...] = ()  # put these cards side by side: folders, or card.json files

    pairs: int = 5000  # pairs of frames of each source: three fifths to fit probes on, the rest to score them
    val_fraction: float | None = None  # share of the episodes that are scored, as in train_laq.py; None: from run.json
    split_seed: int | None = None  # --seed of train_laq.py, which chose the held-out episodes; None: from run.json
    seed: int = 0  # chooses the pairs of frames
    delta: float | None = None  # time between the two frames [s], for a file that does not say it
    groups: tuple[str, ...] = ()  # groups of action dimensions to report apart: position=0-2 gripper=6
    transfer_to: tuple[str, ...] = ()  # sources of other embodiments to score the probes on too

    shuffled: Path | None = None  # a LAQ trained on shuffled futures, as a control
    train_shuffled: int = 0  # train this control into OUTPUT_DIR for this many steps; 1000 are enough
    # share of the training episodes whose actions the LAQ used, as in train_laq.py; None: from run.json
    label_fraction: float | None = None
    label_steps: int = 600  # optimizer steps of the rival that learns from these labels alone

    output_dir: Path = Path("outputs/probe")  # folder for card.json and card.html
    batch_size: int = 64  # pairs of frames that are encoded together
    num_workers: int = 2  # processes that load data

    @property
    def subject(self) -> Path:
        """The `latents`, where a card is made."""
        assert self.latents is not None
        return self.latents


def main(args: Args) -> None:
    if bool(args.compare) == (args.latents is not None):
        raise ValueError("give --latents CHECKPOINT_OR_FILE to make a card, or --compare A B to show cards")
    if args.compare:
        compare(args.compare, args.output_dir)
        return
    check(args)
    from hlrp.card_page import page, text
    from hlrp.card_verdict import CARD
    from hlrp.checkpoints import write_json, write_text

    args.output_dir.mkdir(parents=True, exist_ok=True)
    document, pictures = judge(args)
    write_json(args.output_dir / "card.json", document)
    write_text(args.output_dir / "card.html", page(document, pictures))
    if args.subject.is_dir() and is_of_its_data(args):
        write_json(args.subject / CARD, document)
    elif args.subject.is_dir():
        print(f"{args.subject} keeps the card that it has: this one is of other data than it learned from")
    print(text(document))
    print(f"{args.output_dir / 'card.html'}")


def is_of_its_data(args: Args) -> bool:
    """Whether a checkpoint is judged on the sources that it learned from, all of them and no others."""
    from hlrp.sources import expand, parse_uri

    learned = json.loads((args.subject / "config.json").read_text()).get("data", ())
    own, judged = ({parse_uri(uri).uri for uri in expand(uris)} for uris in (learned, args.data or learned))
    return own == judged


def check(args: Args) -> None:
    """Raises ValueError for settings that make no card."""
    if args.pairs < 100:
        raise ValueError(f"pairs={args.pairs}; expected 100 or more, some thousand give narrow intervals")
    if args.train_shuffled < 0 or args.label_steps < 1 or args.batch_size < 1:
        raise ValueError(
            f"train_shuffled={args.train_shuffled}, label_steps={args.label_steps}, batch_size={args.batch_size}; "
            "expected 0 or more, 1 or more, 1 or more"
        )
    if args.shuffled and args.train_shuffled:
        raise ValueError("shuffled and train_shuffled are the same control: give one")
    if args.subject.is_file() and any([args.shuffled, args.train_shuffled, *args.transfer_to]):
        raise ValueError(
            f"shuffled, train_shuffled and transfer_to need a model, but {args.subject} is a file of latents"
        )
    if args.subject.is_file() and len(args.data) != 1:
        raise ValueError(f"{args.subject} is of one source; --data names {len(args.data)}")
    parse_groups(args.groups)


def parse_groups(texts: tuple[str, ...]) -> dict[str, list[int]]:
    """position=0-2 or gripper=6,7 -> the dimensions by the group's name."""
    groups = {}
    for text in texts:
        name, _, spans = text.partition("=")
        try:
            ends = [[int(end) for end in span.split("-")] for span in spans.split(",")]
            groups[name] = [i for span in ends for i in range(span[0], span[-1] + 1)]
        except ValueError:
            groups[name] = []
        if not name or not groups[name]:
            raise ValueError(f"groups: {text!r}; expected a name and dimensions, such as position=0-2 or gripper=6,7")
    return groups


def judge(args: Args) -> tuple[dict, dict[str, dict[str, bytes]]]:
    """The card as plain JSON, and the pictures of each source, PNG by name."""
    from hlrp.card_subjects import Checkpoint, File, read_latents
    from hlrp.card_verdict import passed, verdict
    from hlrp.distributed import keep_freed_memory
    from hlrp.laq import LAQ
    from hlrp.laq_validation import Share
    from hlrp.sources import expand, named_apart, open_source, parse_uri

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    share = Share(0, 1, args.batch_size, args.num_workers, device)
    groups = parse_groups(args.groups)
    if args.subject.is_file() or args.subject.suffix in (".npz", ".parquet"):
        subject, data = File(read_latents(args.subject, args.delta), args.pairs, args.seed), args.data
    else:
        laq = LAQ.from_pretrained(args.subject).requires_grad_(False).to(device)
        config = json.loads((args.subject / "config.json").read_text())
        subject, data = Checkpoint(laq, args), expand(args.data or tuple(config["data"]))

    if not data:
        raise ValueError("data names no source; expected one or more")
    sources = named_apart([open_source(parse_uri(uri).uri) for uri in data])
    cards, pictures = {}, {}
    for uri, source in zip(data, sources, strict=True):
        if args.groups and (stray := [i for g in groups.values() for i in g if i >= source.action_dim]):
            raise ValueError(f"groups: dimension {stray[0]}, but the actions of {uri} have {source.action_dim}")
        card, pictures[source.name] = subject.card(source, groups, share)
        lines = verdict(source.name, card)
        head = {"uri": source.uri, "passed": passed(lines), "verdict": [line._asdict() for line in lines]}
        cards[source.name] = head | card
    return {
        "type": "card",
        "hlrp_version": version("lerobot_policy_hlrp"),
        "latents": str(args.subject),
        "fingerprint": subject.fingerprint,
        "delta": subject.delta,
        "about": subject.about,
        "seed": args.seed,
        "passed": all(card["passed"] for card in cards.values()),
        "sources": cards,
    }, pictures


def read_card(path: Path) -> dict:
    """A card from its file, or from the folder of a card or of a checkpoint."""
    places = [path, path / "card.json", path / "probe.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"compare: {path} has neither card.json nor probe.json; python -m hlrp.probe makes them")
    document = json.loads(file.read_text())
    if document.get("type") != "card":
        raise ValueError(f"compare: {file} is no probe card")
    return document


def compare(paths: tuple[Path, ...], output_dir: Path) -> None:
    """Prints cards side by side, and writes compare.html."""
    from hlrp.card_page import compare_page, side_by_side
    from hlrp.checkpoints import write_text
    from hlrp.runs import text_table

    documents = {str(path): read_card(path) for path in paths}
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "compare.html", compare_page(documents))
    print(text_table(side_by_side(documents)))
    print(f"\n{output_dir / 'compare.html'}")


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
