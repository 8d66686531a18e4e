"""A probe card's subjects: a checkpoint, which is asked, and a file, which says what it has."""

import json
import logging
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from hlrp.algebra import algebra
from hlrp.buckets import read_buckets
from hlrp.card import (
    LABELS,
    RANDOM,
    SHUFFLED,
    Pairs,
    Z,
    dependence,
    episode_identity,
    features_of,
    health,
    information,
    leakage,
    ratio_of_transfer,
    read_pairs,
    transfer,
)
from hlrp.card_plots import draw
from hlrp.chosen import action_statistics, choose_clips, labelled_episodes
from hlrp.controls import (
    predicted_actions,
    principal_components,
    trained_on_labels,
    trained_on_shuffled_futures,
    untrained,
)
from hlrp.data import collate
from hlrp.laq import LAQ, LatentActions
from hlrp.latents import LatentFile, pairs_of
from hlrp.pictures import bindings_of, draw_pictures
from hlrp.probes import MIN_EPISODES, episode_split
from hlrp.shown import encoded
from hlrp.sources import named_apart, open_source, parse_uri
from hlrp.splits import split_episodes
from hlrp.streams import clips_of
from hlrp.validation import Share, code_use, encode_all

logger = logging.getLogger(__name__)

FIT_SHARE = 0.6  # of the pairs
DECODED = ("reconstructions", "one-code", "many-codes")  # pictures
NUM_DECODED, NUM_TRIPLES = 384, 192
PICTURE_SIZE = 96  # side of the frames that a file's card shows [pixel]


def judged(
    pairs: Pairs, codebook_sizes: dict[str, int | None], groups: dict[str, list[int]], seed: int
) -> tuple[dict, Tensor | None]:
    """What a card says of pairs whoever encoded them, and the predicted actions of the scored ones."""
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
        if pairs.latents[Z].indices is not None:
            card["dependence"] = dependence(pairs.latents[Z].indices, pairs.actions, seed)
        if pairs.embodiments is not None and len(pairs.embodiments.unique()) > 1:
            names = {i: f"embodiment {i}" for i in pairs.embodiments.unique().tolist()}
            cells = transfer(features[Z], pairs.actions, pairs, pairs.embodiments, names, seed)
            card["transfer"] = {"cells": cells, "ratio": ratio_of_transfer(cells)}
    return card, predicted


class File:
    """The latent actions of another model."""

    def __init__(self, file: LatentFile, max_pairs: int, seed: int):
        self.file, self.max_pairs, self.seed = file, max_pairs, seed
        self.fingerprint, self.delta = file.fingerprint, file.delta
        sizes = [f"vectors of {file.vectors.shape[-1]}"] if file.vectors.numel() else []
        sizes += [f"{file.indices.shape[1]} codes"] if file.indices is not None else []
        self.about = f"a file, {' and '.join(sizes)}"

    def card(self, source, groups: dict[str, list[int]], share: Share) -> tuple[dict, dict[str, bytes]]:
        everything, episodes = pairs_of(self.file, source, PICTURE_SIZE), torch.from_numpy(self.file.episode)
        is_fit = episode_split(episodes, FIT_SHARE, self.seed)
        rows = np.random.default_rng(self.seed).permutation(len(episodes))[: self.max_pairs]
        sides = [torch.from_numpy(np.sort(rows))[side[np.sort(rows)]] for side in (is_fit, ~is_fit)]
        sets = [Subset(everything.dataset, [everything.indices[i] for i in side.tolist()]) for side in sides]
        pairs, order = read_pairs(sets, {}, share), torch.cat(sides)
        indices = None if self.file.indices is None else self.file.indices[order]
        pairs = pairs._replace(latents={Z: LatentActions(self.file.vectors[order], indices)})
        card, predicted = judged(pairs, {Z: self.file.codebook_size}, groups, self.seed)
        return card, draw(card, pairs, predicted, sets[1], self.file.codebook_size)


class Checkpoint:
    """A LAQ."""

    def __init__(self, laq: LAQ, args):
        self.laq, self.args, config = laq, args, laq.config
        self.fingerprint, self.delta = laq.fingerprint, config.delta
        self.about = (
            f"a LAQ of {config.num_tokens} tokens, quantizer {config.quantizer}, codebook {config.codebook_size}, "
            f"{config.image_size} pixels"
        )
        self.shuffled = None
        if args.shuffled is not None:
            self.shuffled = LAQ.from_pretrained(args.shuffled).to(laq.queries.device)
            for name in ("delta", "image_size"):
                found, expected = getattr(self.shuffled.config, name), getattr(config, name)
                if found != expected:
                    raise ValueError(f"shuffled={args.shuffled} has {name}={found}; {expected} fits {args.latents}")

    def card(self, source, groups: dict[str, list[int]], share: Share) -> tuple[dict, dict[str, bytes]]:
        laq, args, seed = self.laq, self.args, self.args.seed
        train, val = self.split(source)
        times = {"times": (0.0, laq.config.delta), "image_size": laq.config.image_size, "seed": seed}
        train_clips, val_clips = (clips_of(source, part, **times) for part in (train, val))
        num_fit = round(FIT_SHARE * args.pairs)
        sets = [choose_clips(train_clips, num_fit, seed), choose_clips(val_clips, args.pairs - num_fit, seed)]

        models = {Z: laq}
        if args.train_shuffled:
            models[SHUFFLED] = self.train_shuffled(train_clips, share.device)
        elif self.shuffled is not None:
            models[SHUFFLED] = self.shuffled
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
        held = [sets[1][i] for i in chosen.sort().values.tolist()]
        card["use"] = code_use(laq, held, encode_all(laq, held, share), share, seed)
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
            shown = bindings_of(DECODED, buckets)
            draw_pictures(laq, partial(encoded, laq), {source.name: held}, buckets, shown, Path(folder), seed=seed)
            pictures |= {path.stem: path.read_bytes() for path in Path(folder).glob("*.png")}
        return card, pictures

    def add_transfer(self, card: dict, source, pairs: Pairs, share: Share) -> None:
        """The sources of --transfer-to as further embodiments."""
        every, groups = [pairs], [torch.zeros_like(pairs.episodes)]
        others = [open_source(parse_uri(uri).uri) for uri in self.args.transfer_to]
        own = source.name  # under which the card is kept
        names = dict(enumerate(other.name for other in named_apart([source, *others])))
        source.name = own
        for number, (uri, other) in enumerate(zip(self.args.transfer_to, others, strict=True), start=1):
            if other.action_dim != source.action_dim:
                raise ValueError(
                    f"transfer_to={uri} has actions of {other.action_dim} dimensions, {source.uri} of "
                    f"{source.action_dim}; the same action space fits"
                )
            split = self.split(other)
            config, count = self.laq.config, self.args.pairs // 2
            sets = [
                choose_clips(
                    clips_of(other, part, (0.0, config.delta), config.image_size, seed=self.args.seed),
                    count,
                    self.args.seed,
                )
                for part in split
            ]
            found = read_pairs(sets, {Z: partial(encode, self.laq)}, share)
            every.append(found._replace(episodes=found.episodes + number * 2**40))
            groups.append(torch.full_like(found.episodes, number))
        x = torch.cat([features_of(p.latents[Z], self.laq.quantizer.codebook_size) for p in every])
        joined = pairs._replace(
            episodes=torch.cat([p.episodes for p in every]), is_fit=torch.cat([p.is_fit for p in every])
        )
        actions = torch.cat([p.actions for p in every])
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

    def setting(self, name: str, given: float | None, default: float | None = None) -> float:
        """One that the LAQ was trained with: the given one, or that of its run.json, or the default with a warning."""
        if given is None and (found := self.record()):
            return found[name]
        record = self.run_file()
        if given is None and default is None:
            raise ValueError(f"{record} is missing, which has it: give --{name.replace('_', '-')}")
        if given is None:
            logger.warning(
                "%s is missing: %s=%s is taken, by which episodes may be scored that it has seen", record, name, default
            )
        return default if given is None else given

    def split(self, source):
        """The episodes that the LAQ has learned from, and those held out."""
        fraction = self.setting("val_fraction", self.args.val_fraction, 0.1)
        seed, times = self.setting("seed", self.args.split_seed, 0), (0.0, self.laq.config.delta)
        return split_episodes(source, fraction, seed, times)

    def labelled(self, source, train):
        """Those of the training episodes whose actions the LAQ has learned."""
        given, seed = self.args.label_fraction, self.setting("seed", self.args.split_seed, 0)
        demonstrations = None if given is not None else self.record().get("demonstrations")
        share = 1.0 if demonstrations is not None else self.setting("label_fraction", given)
        return labelled_episodes(source, train, demonstrations, share, seed)

    def train_on_labels(self, clips, device):
        return trained_on_labels(
            self.laq.config.image_size,
            clips,
            self.args.label_steps,
            device,
            action_statistics(clips),
            seed=self.args.seed,
            num_workers=self.args.num_workers,
        )


@torch.no_grad()
def encode(laq: LAQ, frames: Tensor) -> LatentActions:
    actions = laq.label(frames)
    return LatentActions(*(None if x is None else x[:, 0] for x in actions))


@torch.no_grad()
def encode_unquantized(laq: LAQ, frames: Tensor) -> LatentActions:
    """What an encoder that has not learned knows, before its quantizer throws most of it away: the stronger control."""
    return LatentActions(laq.latents(*laq.embed(laq.observe(frames)).unbind(1)), None)
