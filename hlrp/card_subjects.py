"""What a probe card judges: the checkpoint of a LAQ, or the latent actions of any model in a file.

A file has `.npz` arrays or parquet columns, one row a pair of frames:
    episode            int: the number of the episode in the source
    time or index      of the first frame in the episode: [s], or int
    vector             float (e,): the latent action
    codes              int (m,): its discrete tokens; a file has vector, codes or both
    delta              [s], from the first frame to the second: one number

The models that a checkpoint is compared with are made here too: an encoder that has learned nothing, one that has
learned from shuffled futures, and one that has learned from the labels alone.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hlrp.card import (
    LABELS,
    RANDOM,
    SHUFFLED,
    Pairs,
    Z,
    dependence,
    episode_identity,
    features_of,
    few_shots,
    health,
    information,
    leakage,
    ratio_of_transfer,
    read_pairs,
    transfer,
)
from hlrp.card_plots import draw
from hlrp.clips import Clips
from hlrp.contract import Stream, labelled_episodes, split_episodes
from hlrp.data import Chosen, Mixture, action_statistics, choose_clips, collate, loader
from hlrp.laq import LAQ, LAQConfig, LatentActions
from hlrp.laq_validation import Share, algebra, code_use, encode_all
from hlrp.metrics import MIN_EPISODES, episode_split, principal_components
from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
from hlrp.pictures import bindings_of, draw_pictures, read_buckets
from hlrp.sources import named_apart, open_source, parse_uri
from hlrp.strategies import encoded
from hlrp.streams import clips_of
from hlrp.transformer import Block, mean_action

if TYPE_CHECKING:
    from hlrp.inverse import InverseModel

COLUMNS = ("episode", "time", "index", "vector", "codes", "delta")


class LatentFile(NamedTuple):
    """Rows of a file, in its order."""

    path: Path
    delta: float  # [s]
    episode: np.ndarray  # int64 (b,)
    time: np.ndarray | None  # float64 (b,) [s], or
    index: np.ndarray | None  # int64 (b,)
    vectors: Tensor  # float32 (b, n, d); of codes alone, empty: (b, 0, 0)
    indices: Tensor | None  # int64 (b, m)

    @property
    def codebook_size(self) -> int | None:
        return None if self.indices is None else int(self.indices.max()) + 1

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]


def read_latents(path: Path, delta: float | None = None) -> LatentFile:
    """Reads a file. delta: of a file that does not say it [s]. Raises ValueError for a missing or a bad column."""
    columns = read_columns(path)
    if "episode" not in columns or not columns.keys() & {"time", "index"}:
        raise ValueError(f"{path} has {', '.join(columns) or 'nothing'}; episode, and time or index, are needed")
    if not columns.keys() & {"vector", "codes"}:
        raise ValueError(f"{path} has {', '.join(columns)}; vector or codes, or both, are needed")
    length = len(columns["episode"])
    for name, column in columns.items():
        if name != "delta" and len(column) != length:
            raise ValueError(f"{path}: {name} has {len(column)} rows, episode {length}; expected one row a pair")
    if "delta" in columns:
        deltas = np.unique(columns["delta"])
        if len(deltas) != 1 or (delta is not None and not np.isclose(deltas[0], delta)):
            raise ValueError(f"{path}: delta is {deltas[:4].tolist()} s, --delta {delta}; expected one number")
        delta = float(deltas[0])
    if delta is None:
        raise ValueError(f"{path} has no delta: say by --delta how many seconds lie between the two frames")
    if not length:
        raise ValueError(f"{path} has no rows; expected some thousand pairs")

    vectors, indices = torch.zeros(length, 0, 0), None
    if "vector" in columns:
        vectors = torch.from_numpy(columns["vector"].reshape(length, 1, -1).astype(np.float32))
        if not vectors.isfinite().all():
            row = int((~vectors.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"{path}: vector of row {row} is not finite")
    if "codes" in columns:
        indices = torch.from_numpy(integers(path, "codes", columns["codes"]).reshape(length, -1))
        if indices.min() < 0:
            raise ValueError(f"{path}: a code is {indices.min()}; expected 0 or more")
    index = integers(path, "index", columns["index"]) if "index" in columns else None
    time = columns["time"].astype(np.float64) if index is None else None
    return LatentFile(path, delta, integers(path, "episode", columns["episode"]), time, index, vectors, indices)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint's pretrained_model folder, .npz or .parquet")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: np.atleast_1d(arrays[name]) for name in COLUMNS if name in arrays}
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: {path.suffix or 'no suffix'}; expected .npz or .parquet")
    import pyarrow.parquet as pq

    known = [name for name in COLUMNS if name in pq.read_schema(path).names]
    table = pq.read_table(path, columns=known)
    columns = {}
    for name in known:
        values = table[name].to_pylist()
        sizes = {np.shape(value) for value in values}
        if len(sizes) > 1:
            raise ValueError(f"{path}: rows of {name} have the sizes {sorted(sizes)}; expected one size")
        columns[name] = np.array(values)
    return columns


def integers(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """Raises ValueError where the values are no whole numbers."""
    rounded = np.rint(values).astype(np.int64)
    if (rounded != values).any():
        raise ValueError(f"{path}: {name} has {values[rounded != values].flat[0]}; expected whole numbers")
    return rounded


def pairs_of(file: LatentFile, source, image_size: int) -> Chosen:
    """The pairs of frames that the rows are of, in their order.

    Raises ValueError for a row whose pair the source does not have.
    """
    if isinstance(source, Stream):
        raise ValueError(f"{source.uri} is a stream, whose episodes have no numbers; expected an indexed source")
    clips = Clips(source, np.arange(len(source.lengths)), (0.0, file.delta), image_size)
    outside = (file.episode < 0) | (file.episode >= len(source.lengths))
    if outside.any():
        row = outside.nonzero()[0][0]
        raise ValueError(
            f"{file.path}, row {row}: episode {file.episode[row]}; {source.uri} has 0 to {len(source.lengths) - 1}"
        )
    fps = source.fps[file.episode]
    if file.time is None:
        assert file.index is not None
        index = file.index
    else:
        index = np.rint(file.time * fps).astype(np.int64)
        if (aside := np.abs(file.time * fps - index) > 0.25).any():
            row = aside.nonzero()[0][0]
            raise ValueError(
                f"{file.path}, row {row}: no frame at {file.time[row]} s of {fps[row]:g} fps; expected k / fps"
            )
    last = (clips.ends - clips.firsts)[file.episode] - 1
    if (beyond := (index < 0) | (index > last)).any():
        row = beyond.nonzero()[0][0]
        raise ValueError(
            f"{file.path}, row {row}: frame {index[row]} of episode {file.episode[row]}; pairs {file.delta:g} s "
            f"apart start at 0 to {last[row]}"
        )
    return Chosen(clips, (clips.firsts[file.episode] + index).tolist(), skip_broken=False)


def untrained(config: LAQConfig, seed: int) -> LAQ:
    """A LAQ of the same architecture, as it begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LAQ(config).eval()


def train[M: nn.Module](
    model: M,
    clips: list,
    steps: int,
    batch_size: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    num_workers: int = 0,
    edit: Callable[[dict], dict] = lambda batch: batch,
) -> M:
    """Trains a model on batches of the clips, each changed by `edit`, and returns it in evaluation mode."""
    device = next(model.parameters()).device
    optimizer = make_optimizer("muon", model, {Block}, lr, weight_decay=0.05)
    mixture = Mixture(clips, seed=seed)
    batches = iter(loader(mixture, batch_size, num_workers=num_workers))
    model.train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for step in range(steps):
            set_lr(optimizer, cosine_lr(step, lr, max(1, min(100, steps // 8)), steps))
            batch = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in next(batches).items()}
            loss, _ = model(edit(batch | {"step": step}))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def with_shuffled_futures(batch: dict) -> dict:
    """Each pair with the second frame of another pair: no action leads from one to the other."""
    first, second = batch["frames"].unbind(1)
    return batch | {"frames": torch.stack([first, second.roll(1, dims=0)], dim=1)}


def trained_on_shuffled_futures(config: LAQConfig, clips: list, steps: int, device, **settings) -> LAQ:
    """Trains a LAQ of the same architecture where there is nothing to learn about actions."""
    config = replace(config, action_weight=0.0)
    laq = untrained(config, settings.get("seed", 0)).to(device)
    return train(laq, clips, steps, edit=with_shuffled_futures, **settings)


def with_mean_action(batch: dict) -> dict:
    return batch | {"action": mean_action(batch["action"], batch["action_is_pad"])[0][:, None]}


def trained_on_labels(
    image_size: int, num_views: int, clips, steps: int, device, statistics, **settings
) -> "InverseModel":
    """Trains a model from two frames to the mean action between them, on the labelled clips alone."""
    from hlrp.inverse import InverseModel  # which loads LeRobot

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.get("seed", 0))
        model = InverseModel(image_size, len(statistics[0]), 1, num_views).to(device)
    model.mean[:], model.std[:] = statistics
    return train(model, [clips], steps, edit=with_mean_action, **settings)


@torch.no_grad()
def predicted_actions(model: "InverseModel", frames: Tensor) -> Tensor:
    """frames uint8 (b, 2, c, h, w) -> (b, a)."""
    return model.standardised(frames)[:, 0] * model.std + model.mean


logger = logging.getLogger(__name__)

FIT_SHARE = 0.6  # share of the pairs that probes are fitted on; the others are scored
DECODED = ("reconstructions", "one-code", "many-codes")  # pictures that the card of a checkpoint shows
NUM_DECODED, NUM_TRIPLES = 384, 192  # pairs that are decoded, and triples of frames for `algebra`
PICTURE_SIZE = 96  # side of the frames that a file's card shows [pixel]


def judged(
    pairs: Pairs, codebook_sizes: dict[str, int | None], groups: dict[str, list[int]], seed: int
) -> tuple[dict, Tensor | None]:
    """The figures that need no decoder, and the actions that the better probe predicts for the scored pairs."""
    features = {name: features_of(x, codebook_sizes[name]) for name, x in pairs.latents.items()}
    if RANDOM in features:
        features[RANDOM] = principal_components(features[RANDOM], pairs.is_fit, features[Z].shape[1])
    fitted, scored = (pairs.episodes[side].unique() for side in (pairs.is_fit, ~pairs.is_fit))
    if len(fitted) < MIN_EPISODES - 1 or not len(scored):
        raise ValueError(
            f"{len(fitted)} episode(s) to fit probes on and {len(scored)} to score; two and one are needed"
        )
    card = {
        "pairs": len(pairs.episodes),
        "scored_pairs": int((~pairs.is_fit).sum()),
        "episodes": len(fitted) + len(scored),
        "scored_episodes": len(scored),
        "health": health(pairs.latents[Z], codebook_sizes[Z]),
        "leakage": leakage(pairs, features, seed),
        "episode_identity": episode_identity(pairs, features),
    }
    predicted = None
    if pairs.actions is not None:
        card["information"], z = information(pairs, features, groups, seed)
        predicted = z.pred
        vectors = {name: x.vectors.flatten(1) for name, x in pairs.latents.items() if x.vectors.numel()}
        card["few_shots"] = few_shots(pairs, features | vectors, seed)
        if (indices := pairs.latents[Z].indices) is not None:
            card["dependence"] = dependence(indices, pairs.actions, seed)
        if pairs.embodiments is not None and len(pairs.embodiments.unique()) > 1:
            names = {i: f"embodiment {i}" for i in pairs.embodiments.unique().tolist()}
            cells = transfer(features[Z], pairs.actions, pairs, pairs.embodiments, names, seed)
            card["transfer"] = {"cells": cells, "ratio": ratio_of_transfer(cells)}
    return card, predicted


class File:
    """Judges the latent actions of another model, from a file."""

    def __init__(self, file: LatentFile, max_pairs: int, seed: int):
        self.file, self.max_pairs, self.seed = file, max_pairs, seed
        self.fingerprint, self.delta = file.fingerprint, file.delta
        sizes = [f"vectors of {file.vectors.shape[-1]}"] if file.vectors.numel() else []
        sizes += [f"{file.indices.shape[1]} codes"] if file.indices is not None else []
        self.about = f"a file, {' and '.join(sizes)}"

    def card(self, source, groups: dict[str, list[int]], share: Share) -> tuple[dict, dict[str, bytes]]:
        """The card of a source, and its pictures, PNG by name. groups: dimensions of an action to report apart."""
        everything, episodes = pairs_of(self.file, source, PICTURE_SIZE), torch.from_numpy(self.file.episode)
        is_fit = episode_split(episodes, FIT_SHARE, self.seed)
        rows = np.random.default_rng(self.seed).permutation(len(episodes))[: self.max_pairs]
        sides = [torch.from_numpy(np.sort(rows))[side[np.sort(rows)]] for side in (is_fit, ~is_fit)]
        sets = [Chosen(everything.dataset, [everything.indices[i] for i in side.tolist()], False) for side in sides]
        pairs, order = read_pairs(sets, {}, share), torch.cat(sides)
        indices = None if self.file.indices is None else self.file.indices[order]
        pairs = pairs._replace(latents={Z: LatentActions(self.file.vectors[order], indices)})
        card, predicted = judged(pairs, {Z: self.file.codebook_size}, groups, self.seed)
        return card, draw(card, pairs, predicted, sets[1], self.file.codebook_size)


class Checkpoint:
    """Judges a LAQ, from its checkpoint."""

    def __init__(self, laq: LAQ, args):
        """args: of `hlrp.probe`."""
        self.laq, self.args, config = laq, args, laq.config
        self.fingerprint, self.delta = laq.fingerprint, config.delta
        self.about = (
            f"a LAQ of {config.num_tokens} tokens, quantizer {config.quantizer}, codebook {config.codebook_size}, "
            f"{config.image_size} pixels"
        )
        self.shuffled = None
        if args.shuffled is not None:
            self.shuffled = LAQ.from_pretrained(args.shuffled).to(laq.queries.device)
            for name in ("delta", "image_size", "num_views"):
                value, expected = getattr(self.shuffled.config, name), getattr(config, name)
                if value != expected:
                    raise ValueError(
                        f"shuffled={args.shuffled} has {name}={value}; expected {expected}, as {args.latents} has"
                    )

    def card(self, source, groups: dict[str, list[int]], share: Share) -> tuple[dict, dict[str, bytes]]:
        """As `File.card`."""
        laq, args, seed = self.laq, self.args, self.args.seed
        train, val = self.split(source)
        times = {
            "times": (0.0, laq.config.delta),
            "image_size": laq.image_size,
            "num_views": laq.num_views,
            "seed": seed,
        }
        train_clips, val_clips = (clips_of(source, part, **times) for part in (train, val))
        num_fit = round(FIT_SHARE * args.pairs)
        sets = [choose_clips(train_clips, num_fit, seed), choose_clips(val_clips, args.pairs - num_fit, seed)]

        models = {Z: laq}
        if args.train_shuffled:
            models[SHUFFLED] = self.train_shuffled(train_clips, share.device)
        elif self.shuffled is not None:
            models[SHUFFLED] = self.shuffled
        encoders: dict[str, Callable[[Tensor], LatentActions]]
        encoders = {name: partial(encode, model) for name, model in models.items()}
        codebook_sizes = {name: model.quantizer.codebook_size for name, model in models.items()}
        encoders[RANDOM] = partial(encode_unquantized, untrained(laq.config, seed).to(share.device))
        codebook_sizes[RANDOM] = None
        if laq.config.action_weight and source.action_dim:
            model = self.train_on_labels(clips_of(source, self.labelled(source, train), **times), share.device)
            encoders[LABELS] = lambda frames: LatentActions(predicted_actions(model, frames)[:, None], None)
            codebook_sizes[LABELS] = None
        pairs = read_pairs(sets, encoders, share)
        card, predicted = judged(pairs, codebook_sizes, groups, seed)

        chosen = torch.randperm(len(sets[1]), generator=torch.Generator().manual_seed(seed))[:NUM_DECODED]
        samples = [sets[1][i] for i in chosen.sort().values.tolist()]
        card["use"] = code_use(laq, samples, encode_all(laq, samples, share), share, seed)
        times |= {"times": (0.0, laq.config.delta, 2 * laq.config.delta), "min_times": 2}
        triples = choose_clips(clips_of(source, val, **times), NUM_TRIPLES, seed)
        batch = collate(triples.__getitems__(list(range(len(triples)))))
        has_third = ~batch["latent_is_pad"][:, 1]
        card["algebra"] = algebra(laq, batch["frames"], batch["task"], batch["episode"], has_third, seed)
        if args.transfer_to and pairs.actions is not None:
            self.add_transfer(card, source, pairs, share)

        pictures = draw(card, pairs, predicted, sets[1], laq.quantizer.codebook_size)
        with tempfile.TemporaryDirectory() as folder:
            buckets = read_buckets(())
            bindings, sets_of_samples = bindings_of(DECODED, buckets), {source.name: samples}
            draw_pictures(laq, partial(encoded, laq), sets_of_samples, buckets, bindings, Path(folder), seed=seed)
            pictures |= {path.stem: path.read_bytes() for path in Path(folder).glob("*.png")}
        return card, pictures

    def add_transfer(self, card: dict, source, pairs: Pairs, share: Share) -> None:
        """Scores the probes on the sources of --transfer-to too, each as a further embodiment."""
        every, groups = [pairs], [torch.zeros_like(pairs.episodes)]
        others = [open_source(parse_uri(uri).uri) for uri in self.args.transfer_to]
        own = source.name  # the card is stored under it
        names = dict(enumerate(other.name for other in named_apart([source, *others])))
        source.name = own
        for number, (uri, other) in enumerate(zip(self.args.transfer_to, others, strict=True), start=1):
            if other.action_dim != source.action_dim:
                raise ValueError(
                    f"transfer_to={uri} has actions of {other.action_dim} dimensions, {source.uri} of "
                    f"{source.action_dim}; expected the same action space"
                )
            split = self.split(other)
            settings = {"times": (0.0, self.laq.config.delta), "image_size": self.laq.image_size}
            settings |= {"num_views": self.laq.num_views, "seed": self.args.seed}
            clips = [clips_of(other, part, **settings) for part in split]
            sets = [choose_clips(part, self.args.pairs // 2, self.args.seed) for part in clips]
            further = read_pairs(sets, {Z: partial(encode, self.laq)}, share)
            every.append(further._replace(episodes=further.episodes + number * 2**40))
            groups.append(torch.full_like(further.episodes, number))
        x = torch.cat([features_of(p.latents[Z], self.laq.quantizer.codebook_size) for p in every])
        joined = pairs._replace(
            episodes=torch.cat([p.episodes for p in every]), is_fit=torch.cat([p.is_fit for p in every])
        )
        actions = torch.cat([p.actions for p in every if p.actions is not None])  # all have the same action space
        cells = transfer(x, actions, joined, torch.cat(groups), names, self.args.seed)
        card["transfer"] = {"cells": cells, "ratio": ratio_of_transfer(cells)}

    def train_shuffled(self, clips, device) -> LAQ:
        args, folder = self.args, self.args.output_dir / "shuffled_futures"
        laq = trained_on_shuffled_futures(
            self.laq.config, [clips], args.train_shuffled, device, seed=args.seed, num_workers=args.num_workers
        )
        folder.mkdir(parents=True, exist_ok=True)
        laq.save_pretrained(folder, data=list(args.data), step=args.train_shuffled, report=None)
        return laq

    def run_file(self) -> Path:
        return self.args.latents.resolve().parent.parent.parent / "run.json"

    def record(self) -> dict:
        """The settings of the run that trained the LAQ; {} where they are not known."""
        file = self.run_file()
        return json.loads(file.read_text())["settings"] if file.is_file() else {}

    def setting[N: float](self, name: str, given: N | None, default: N | None = None) -> N:
        """A setting that the LAQ was trained with: as given, or from its run.json, or the default with a warning."""
        if given is not None:
            return given
        if record := self.record():
            return record[name]
        file = self.run_file()
        if default is None:
            raise ValueError(f"{file} is missing, which has it: give --{name.replace('_', '-')}")
        warning = "%s is missing: %s=%s is assumed, so the LAQ may have seen episodes that are scored"
        logger.warning(warning, file, name, default)
        return default

    def split(self, source):
        """The episodes that the LAQ has learned from, and the held-out ones."""
        fraction = self.setting("val_fraction", self.args.val_fraction, 0.1)
        return split_episodes(source, fraction, self.setting("seed", self.args.split_seed, 0))

    def labelled(self, source, train):
        """The training episodes whose actions the LAQ has learned."""
        given, seed = self.args.label_fraction, self.setting("seed", self.args.split_seed, 0)
        demonstrations = None if given is not None else self.record().get("demonstrations")
        share = 1.0 if demonstrations is not None else self.setting("label_fraction", given)
        return labelled_episodes(source, train, demonstrations, share, seed)

    def train_on_labels(self, clips, device):
        return trained_on_labels(
            self.laq.image_size,
            self.laq.num_views,
            clips,
            self.args.label_steps,
            device,
            action_statistics(clips),
            seed=self.args.seed,
            num_workers=self.args.num_workers,
        )


@torch.no_grad()
def encode(laq: LAQ, frames: Tensor) -> LatentActions:
    return laq.label(frames).map(lambda x: x[:, 0])


@torch.no_grad()
def encode_unquantized(laq: LAQ, frames: Tensor) -> LatentActions:
    """The encoder's output before the quantizer, which throws most of it away: the stronger control."""
    return LatentActions(laq.latents(*laq.embed(laq.observe(frames)).unbind(1)), None)
