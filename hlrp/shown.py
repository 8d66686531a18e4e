"""What pictures show: samples of a bucket, their latent actions, and the LAQ that decodes these."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hlrp.clips import short
from hlrp.data import collate
from hlrp.laq import LAQ
from hlrp.losses import mean_action
from hlrp.metrics import k_means
from hlrp.plots import moving, picture

NUM_ROWS = 6  # pairs shown
NUM_GROUPS = 8  # of continuous latent actions, by k-means


class Skip(Exception):
    """Why a strategy has nothing to show."""


class Latents(NamedTuple):
    """Latent actions of samples, on the CPU."""

    codes: Tensor  # (b, n, d)
    indices: Tensor | None  # int64 (b, m), None if continuous
    true: Tensor | None = None  # (b, n, d): of the pairs, where codes are predicted ones


def encoded(laq: LAQ, batch: dict) -> Latents:
    """Those of the pairs of frames of a batch."""
    device = next(laq.parameters()).device
    parts = [laq.encode(frames.to(device)) for frames in batch["frames"][:, :2].split(64)]
    return Latents(*(None if xs[0] is None else torch.cat(xs).cpu() for xs in zip(*parts, strict=True)))


class Shown:
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
        """Labels int64 (b, g) of the latent actions: their codes, or what k-means makes of continuous ones."""
        if self.indices is not None:
            return self.indices
        return k_means(self.codes.flatten(1), min(NUM_GROUPS, len(self.codes)), self.seed)[:, None]

    def sequences(self) -> tuple[list[str], Tensor, Tensor]:
        """Each sequence of codes and its count, the most frequent first, and the number of each sample's one."""
        if self.indices is None:
            raise Skip("latent actions are continuous, there are no codes")
        found, number, counts = self.indices.unique(dim=0, return_inverse=True, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        names = [" ".join(map(str, found[i].tolist())) for i in order]
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
        """The pairs shown, by their labels."""
        first, second = self.frames[self.rows].unbind(1)
        return {"first frame": first / 255, f"{self.laq.config.delta:g} s later": second / 255}
