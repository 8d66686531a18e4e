"""Strategies: each draws one picture of the latent actions of some samples, and returns the figures that go with it.

Stages 1 and 2 share them: stage 1 encodes the latent action of each pair of frames, stage 2 predicts it from the first
frame and the text. A strategy that has nothing to show raises `Skip` with the reason. `hlrp.pictures` calls them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hlrp.backbones import farneback, mean_flow
from hlrp.clips import short
from hlrp.data import collate
from hlrp.laq import LAQ
from hlrp.laq_validation import joined, partners
from hlrp.metrics import code_counts, explained_variance, is_constant, k_means, psnr
from hlrp.plots import (
    GAIN,
    Row,
    Scatter,
    codes_grid,
    compasses,
    difference,
    frequent,
    heat_map,
    latent_map,
    moving,
    pairs_grid,
    picture,
    scatters,
    sequences_chart,
    sheet,
    transfer_grid,
    usage_chart,
)
from hlrp.transformer import mean_action

NUM_ROWS = 6  # pairs in a picture
NUM_GROUPS = 8  # of continuous latent actions, by k-means


class Skip(Exception):
    """Why a strategy has nothing to show."""


class Latents(NamedTuple):
    """Latent actions of samples, on the CPU."""

    codes: Tensor  # (b, n, d)
    indices: Tensor | None  # int64 (b, m), None if continuous
    true: Tensor | None = None  # (b, n, d): of the pairs, where codes are predicted ones


def encoded(laq: LAQ, batch: dict) -> Latents:
    """The latent action of each pair of frames of a batch."""
    device = next(laq.parameters()).device
    parts = [Latents(*laq.encode(frames.to(device))) for frames in batch["frames"][:, :2].split(64)]
    return joined(parts, Tensor.cpu)


class BucketSamples:
    """The samples of a bucket, with their latent actions and the LAQ that decodes these."""

    def __init__(self, laq: LAQ, latents_of: Callable[[dict], Latents], samples: list[dict], source: Tensor, seed: int):
        batch = collate(samples)
        self.laq, self.source, self.seed = laq, source, seed
        self.frames, self.tasks = batch["frames"][:, :2], batch["task"]  # uint8 (b, 2, c, h, w)
        self.datasets, self.episodes = batch["dataset"], batch["episode"]
        self.names = [f"{name}, {short(i)}" for name, i in zip(self.datasets, batch["place"], strict=True)]
        self.captions = [
            f"{name}, frame {i}. {task}" for name, i, task in zip(self.names, batch["index"], self.tasks, strict=True)
        ]
        self.codes, self.indices, self.true = latents_of(batch)
        self.action, self.has_action = None, torch.zeros(len(samples), dtype=torch.bool)
        if "action" in batch:  # over the time between the two frames
            num_steps = (batch["fps"] * laq.config.delta).round().clamp(min=1)
            later = torch.arange(batch["action"].shape[1]) >= num_steps[:, None]
            self.action, self.has_action = mean_action(batch["action"].double(), batch["action_is_pad"] | later)
        self.state = batch.get("state")
        self.has_state = torch.tensor(["state" in sample for sample in samples])
        self.decoded = {"pixels", "flow"} & set(laq.weights)
        self.moving = moving(self.frames, source, self.episodes)
        self.rows = self.moving[:NUM_ROWS]

    def groups(self) -> Tensor:
        """Labels int64 (b, g) of the latent actions: their codes, or the k-means cluster of a continuous one."""
        if self.indices is not None:
            return self.indices
        return k_means(self.codes.flatten(1), min(NUM_GROUPS, len(self.codes)), self.seed)[:, None]

    def discrete(self) -> tuple[Tensor, int]:
        """The codes int64 (b, m) and the codebook size. Raises Skip where latent actions are continuous."""
        codebook_size = self.laq.quantizer.codebook_size
        if self.indices is None or codebook_size is None:
            raise Skip("latent actions are continuous, there are no codes")
        return self.indices, codebook_size

    def sequences(self) -> tuple[list[str], Tensor, Tensor]:
        """The different sequences of codes, the most frequent first, their counts, and the number of each sample's
        sequence."""
        indices, _ = self.discrete()
        unique, number, counts = indices.unique(dim=0, return_inverse=True, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        names = [" ".join(map(str, unique[i].tolist())) for i in order]
        return names, counts[order], order.argsort()[number]

    def decode(self, samples: Sequence[int], codes: Tensor) -> Tensor:
        """Codes (r, n, d), applied to the first frames of r samples, as pictures (r, c, h, w) in [0, 1]."""
        if not self.decoded:
            raise Skip(f"the LAQ decodes {', '.join(self.laq.weights)}, neither pixels nor flow")
        device = next(self.laq.parameters()).device
        parts = []
        for some, part in zip(torch.tensor(samples).split(64), codes.split(64), strict=True):
            first, second = self.frames[some].to(device).unbind(1)
            tasks = [self.tasks[i] for i in some]
            parts.append(self.laq.decode(first, part.to(device), tasks, second))
        return picture({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    @property
    def pairs(self) -> dict[str, Tensor]:
        """The frames of the pairs in the rows of a picture, by their labels."""
        first, second = self.frames[self.rows].unbind(1)
        return {"first frame": first / 255, f"{self.laq.config.delta:g} s later": second / 255}


NUM_ANCHORS = 6  # frames that a code is applied to
NUM_PERMUTATIONS = 4
MAX_DECODED = 128  # samples whose decoded frames make a figure
MAX_TOKENS = 8  # positions with a chart
MIN_COUNT = 3  # samples of a code that has an arrow


def reconstructions(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """Pairs, and what the LAQ decodes from the first frame with the pair's own latent action and with another's."""
    rows = samples.rows
    others = partners(samples.source, samples.seed)
    decoded = {"decoded": samples.decode(rows, samples.codes[rows])}
    if samples.true is not None:
        decoded = {
            "decoded, true code": samples.decode(rows, samples.true[rows]),
            "decoded, predicted": decoded["decoded"],
        }
    decoded["with another code"] = samples.decode(rows, samples.codes[others[rows]])
    first, second = samples.pairs.values()
    captions = [samples.captions[i] for i in rows]
    if "pixels" in samples.decoded:
        *_, mine, _ = decoded.values()
        decoded[f"|error| x {GAIN}"] = difference(mine, second)
        scores = {
            "PSNR": psnr(mine, second),
            "another code": psnr(decoded["with another code"], second),
            "first frame": psnr(first, second),
        }
        notes = [", ".join(f"{name} {score[i]:.1f}" for name, score in scores.items()) for i in range(len(rows))]
        captions = [f"{note} dB. {caption}" for note, caption in zip(notes, captions, strict=True)]
    else:
        decoded[f"|change| x {GAIN}"] = difference(first, second)
    pairs_grid(path, title, samples.pairs | decoded, captions)
    return {}


def transfer(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """The latent action of a sample, applied to the first frame of a sample of another episode (of another source where
    there are several). `cycle`: share of the codes that the LAQ reads again from the decoded frame."""
    groups = samples.source if len(samples.source.unique()) > 1 else samples.episodes
    if len(groups.unique()) < 2:
        raise Skip("its samples are all of one episode")
    takers = elsewhere(groups, samples.seed)
    rows = samples.rows
    decoded = samples.decode(takers[rows].tolist(), samples.codes[rows])
    (first, second), there = samples.pairs.values(), samples.frames[takers[rows], 0] / 255
    columns = {"from: first frame": first, "then": second, f"|change| x {GAIN}": difference(first, second)}
    columns |= {"to: first frame": there, "its code applied": decoded}
    figures = {}
    if "pixels" in samples.decoded:
        columns[f"its |change| x {GAIN}"] = difference(decoded, there)
        if samples.indices is not None:
            figures["cycle"] = cycle(samples, takers)
    captions = [f"{samples.captions[i]}  ->  {samples.captions[takers[i]]}" for i in rows]
    pairs_grid(path, title, columns, captions)
    return figures


def elsewhere(groups: Tensor, seed: int) -> Tensor:
    """For each sample the number of a random sample of another group: int64 (b,)."""
    generator = torch.Generator().manual_seed(seed)
    differs = (groups[:, None] != groups).float()
    return torch.multinomial(differs, 1, generator=generator)[:, 0]


def cycle(samples: BucketSamples, takers: Tensor) -> float:
    """Share of the codes that the LAQ reads again from a frame and the frame that it decoded with the code."""
    some = torch.arange(len(takers))[:MAX_DECODED]
    decoded = (255 * samples.decode(takers[some].tolist(), samples.codes[some])).round().byte()
    pairs = torch.stack([samples.frames[takers[some], 0], decoded], dim=1)
    again, (indices, _) = encoded(samples.laq, {"frames": pairs}).indices, samples.discrete()
    assert again is not None
    return float((again == indices[some]).double().mean())


def permuted(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """Pairs, decoded with their own latent actions, and with the latent actions of the bucket permuted at random.
    `over_true`: the error with permuted latent actions over the error with the true ones, by target where there are
    several."""
    if len(samples.codes) < 2:
        raise Skip("it has one sample")
    orders = [partners(torch.zeros_like(samples.source), samples.seed + i) for i in range(1, NUM_PERMUTATIONS + 1)]
    device = next(samples.laq.parameters()).device
    sums: list[dict[str, float]] = [{}, {}]
    for some in torch.arange(len(samples.codes))[:MAX_DECODED].split(64):
        variants = [samples.codes[some].to(device), samples.codes[orders[0][some]].to(device)]
        tasks = [samples.tasks[i] for i in some]
        for total, errors in zip(
            sums, samples.laq.errors(samples.frames[some].to(device), variants, tasks), strict=True
        ):
            for target, error in errors.items():
                total[target] = total.get(target, 0.0) + float(error.double().sum())
    ratios = {target: (sums[1][target] + 1e-12) / (sums[0][target] + 1e-12) for target in sums[0]}
    figures = {"over_true" if len(ratios) == 1 else f"over_true/{t}": ratio for t, ratio in ratios.items()}
    if samples.decoded:
        rows = samples.rows
        columns = samples.pairs | {"its own code": samples.decode(rows, samples.codes[rows])}
        for i, order in enumerate(orders, 1):
            columns[f"permutation {i}"] = samples.decode(rows, samples.codes[order[rows]])
        pairs_grid(path, title, columns, [samples.captions[i] for i in rows])
    return figures


def one_code(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """The code of a pair, applied to the first frames of many samples, in one row for each code."""
    rows, anchors = samples.rows, samples.moving[: NUM_ROWS + NUM_ANCHORS][-NUM_ANCHORS:]
    applied = samples.decode(anchors * len(rows), samples.codes[rows].repeat_interleave(len(anchors), dim=0))
    applied = rearrange(applied, "(r n) c h w -> r n c h w", n=len(anchors))
    above = Row(samples.frames[anchors, 0] / 255, labels=[samples.names[i] for i in anchors])
    transfer_grid(path, title, samples.pairs, above, applied, [samples.captions[i] for i in rows])
    return {}


def many_codes(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """The most frequent codes, applied to one frame. `spread`: mean distance of two pictures, over the mean change of a
    pair; 0 where all codes have the same effect."""
    anchor = samples.moving[: NUM_ROWS + NUM_ANCHORS][-NUM_ANCHORS:][0]
    givers = {f"code {i + 1}": i for i in samples.moving[: NUM_ROWS + NUM_ANCHORS]}
    if samples.indices is not None:
        givers = frequent(samples.indices)
    decoded = samples.decode([anchor] * len(givers), samples.codes[[*givers.values()]])
    change = "pixels" in samples.decoded
    codes_grid(path, title, samples.frames[anchor, 0] / 255, dict(zip(givers, decoded, strict=True)), change=change)
    if not change or len(givers) < 2:
        return {}
    apart = torch.pdist(decoded.flatten(1), p=1).mean() / decoded[0].numel()
    first, second = (samples.frames[samples.moving].float() / 255).unbind(1)
    return {"spread": float(apart / (second - first).abs().mean().clamp(min=1e-6))}


def usage(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """How often each code is used at each token position."""
    indices, codebook_size = samples.discrete()
    save(usage_chart(indices[:, :MAX_TOKENS], codebook_size), path, title)
    return {}


def sequences(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """How often each whole sequence of codes occurs. `most_frequent`: share of the samples with the first."""
    names, counts, _ = samples.sequences()
    if counts[0] < 2:
        raise Skip("no sequence of codes occurs twice")
    save(sequences_chart(names, counts.tolist()), path, title)
    return {"different": float(len(names)), "most_frequent": float(counts[0] / counts.sum())}


def examples(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """Pairs with exactly the same sequence of codes, one row for each sequence: they should show the same motion."""
    names, counts, number = samples.sequences()
    rows = []
    for i, name in enumerate(names[:NUM_ROWS]):
        if counts[i] < 2:
            break
        mine = torch.where(number == i)[0]
        mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(samples.seed))[:4]]
        frames = samples.frames[mine].flatten(0, 1)
        labels = [label for j in mine for label in (samples.names[j], "then")]
        rows.append(Row([*frames], f"codes {name}, {counts[i]} of {len(number)} samples", labels))
    if not rows:
        raise Skip("no sequence of codes occurs twice")
    sheet(path, title, rows)
    return {}


def embedding(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """The latent actions in their first two principal components, coloured by the direction of the action."""
    if len(samples.codes) < 3:
        raise Skip(f"it has {len(samples.codes)} samples, fewer than 3")
    actions = samples.action if samples.action is not None and samples.has_action.all() else None
    save(latent_map(samples.codes.flatten(1), actions), path, title)
    return {}


def actions(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """The actions of each source, coloured by the code of the token position that explains most of them. `explained`:
    share of a dimension's variance that the best token position explains, the mean over dimensions and sources."""
    if samples.action is None or not samples.has_action.any():
        raise Skip("its samples have no actions")
    return scattered(samples, samples.action, samples.has_action, "action", path, title)


def states(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """The states, drawn as the actions are: a code should say how the robot moves, and not where it is."""
    if samples.state is None or not samples.has_state.any():
        raise Skip("its samples have no states")
    return scattered(samples, samples.state.double(), samples.has_state, "state", path, title)


def scattered(
    samples: BucketSamples, values: Tensor, has_value: Tensor, word: str, path: Path, title: str
) -> dict[str, float]:
    groups, parts, explained = samples.groups(), [], []
    for number in samples.source[has_value].unique():
        mine = has_value & (samples.source == number)
        dims = (~is_constant(values[mine])).nonzero().flatten() if mine.sum() > NUM_GROUPS else []
        if not len(dims):
            continue
        x, labels = values[mine][:, dims], groups[mine]
        of_tokens = torch.stack([explained_variance(x, column) for column in labels.unbind(1)])  # m d
        token = int(of_tokens.mean(dim=1).argmax())
        explained.append(float(of_tokens.amax(dim=0).mean()))
        best = of_tokens[token].argsort(descending=True)[:2].sort().values
        pair = x[:, best] if len(best) > 1 else torch.cat([x, torch.zeros_like(x)], dim=1)
        names = [*(f"{word} {int(dims[i])}" for i in best), ""]
        name = samples.datasets[int(mine.nonzero()[0])]
        what = f"token {token}" if samples.indices is not None else "k-means"
        parts.append(
            Scatter(
                f"{name}: {what} explains {float(of_tokens[token].mean()):z.2f}",
                pair,
                labels[:, token],
                (names[0], names[1]),
            )
        )
    if not parts:
        raise Skip(f"no source has more than {NUM_GROUPS} samples whose {word}s vary")
    save(scatters(parts[:6]), path, title)
    return {"explained": sum(explained) / len(explained)}


def compass(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """The mean optical flow of the pairs with each code, raw, and less the mean of their source, which a moving camera
    has in all its pairs. `explained`, `explained_centred`: the share of its variance that the best token position
    explains, the mean over both axes; `consistency`: cosine of the centred flows of a code in two sources, the mean."""
    flow = mean_flow(farneback(samples.frames)).double()
    centred = flow.clone()
    for number in samples.source.unique():
        centred[samples.source == number] -= flow[samples.source == number].mean(dim=0)
    groups = samples.groups()[:, :MAX_TOKENS]
    kinds, rows, figures = {"raw": flow, "centred": centred}, {}, {}
    for kind, values in kinds.items():
        rows[kind] = [means_of(values, column) for column in groups.unbind(1)]
        explained = torch.stack([explained_variance(values, column) for column in groups.unbind(1)])  # m xy
        figures["explained" if kind == "raw" else "explained_centred"] = float(explained.amax(dim=0).mean())
    if not any(rows["raw"]):
        raise Skip(f"no code occurs {MIN_COUNT} times")
    cosines = []
    for column in groups.unbind(1):
        per_source = [
            means_of(centred[samples.source == i], column[samples.source == i]) for i in samples.source.unique()
        ]
        for i, some in enumerate(per_source):
            for others in per_source[:i]:
                for code in some.keys() & others.keys():
                    cosines.append(float(F.cosine_similarity(some[code], others[code], dim=0)))
    if cosines:
        figures["consistency"] = sum(cosines) / len(cosines)
    save(compasses(rows), path, title)
    return figures


def means_of(values: Tensor, groups: Tensor) -> dict[int, Tensor]:
    """The mean of values (b, d) in each group of MIN_COUNT samples or more."""
    names, counts = groups.unique(return_counts=True)
    return {int(name): values[groups == name].mean(dim=0) for name in names[counts >= MIN_COUNT]}


def sources(samples: BucketSamples, path: Path, title: str) -> dict[str, float]:
    """How often each source has each code. `apart`: the distance of two sources' shares at a token position, half the
    sum of the differences, from 0 to 1: the mean over positions and sources. At 1 a code tells the source."""
    indices, codebook_size = samples.discrete()
    numbers = samples.source.unique()
    if len(numbers) < 2:
        raise Skip("its samples are all of one data set")
    counts = [code_counts(indices[samples.source == i], codebook_size) for i in numbers]
    shares = torch.stack([count / count.sum(dim=1, keepdim=True) for count in counts], dim=-1)  # m k s
    names = [samples.datasets[int((samples.source == i).nonzero()[0])] for i in numbers]
    save(heat_map(shares[:MAX_TOKENS], names), path, title)
    i, j = torch.triu_indices(len(numbers), len(numbers), offset=1)
    return {"apart": float((shares[..., i] - shares[..., j]).abs().sum(dim=1).mean() / 2)}


def save(figure, path: Path, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
    figure.savefig(path, dpi=100)


STRATEGIES = {
    "reconstructions": reconstructions,
    "transfer": transfer,
    "permuted": permuted,
    "one-code": one_code,
    "many-codes": many_codes,
    "usage": usage,
    "sequences": sequences,
    "examples": examples,
    "embedding": embedding,
    "actions": actions,
    "states": states,
    "compass": compass,
    "sources": sources,
}
