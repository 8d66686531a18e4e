from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hlrp.card import algebra
from hlrp.laq import LatentActions


def square(place: torch.Tensor) -> torch.Tensor:
    """Frames (b, 3, 32, 32) with a bright square of 4 pixels at the places int (b, 2)."""
    frames = torch.full((len(place), 3, 32, 32), 20, dtype=torch.uint8)
    for frame, (x, y) in zip(frames, place.tolist(), strict=True):
        frame[:, y : y + 4, x : x + 4] = 200
    return frames


def found(frames: torch.Tensor) -> torch.Tensor:
    weight = (frames[..., 0, :, :].float() > 100).flatten(1).float()
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return torch.stack([weight @ x.flatten(), weight @ y.flatten()], dim=1) / 16


class Motion(nn.Module):
    """A LAQ whose latent action is the motion of the square, plus a constant; it decodes what it says, or does not."""

    def __init__(self, decodes: bool = True):
        super().__init__()
        self.decodes, self.weights = decodes, {"pixels": 1.0}
        self.config = SimpleNamespace(image_size=32)
        self.unused = nn.Parameter(torch.zeros(()))

    def label(self, frames):
        motion = found(frames[:, 1]) - found(frames[:, 0]) + 7
        return LatentActions(motion[:, None, None], motion[:, None].round().long())

    def encode(self, frames):
        return self.label(frames).vectors[:, 0], None

    def decode(self, first, codes, task, second):
        motion = codes[:, 0] - 7 if self.decodes else 0 * codes[:, 0]
        return {"pixels": square((found(first) - 1.5 + motion).round().long()).float() / 255}


@pytest.fixture
def triples():
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(10, 18, (60, 2), generator=generator)
    steps = torch.randint(-4, 5, (60, 2, 2), generator=generator)
    places = torch.cat([start[:, None], start[:, None] + steps.cumsum(1)], dim=1)
    frames = torch.stack([square(places[:, t]) for t in range(3)], dim=1)
    return frames, [""] * 60, torch.arange(60) // 2, torch.ones(60, dtype=torch.bool)


def test_true_motions_obey_every_rule_and_others_do_not(triples):
    figures = algebra(Motion(), *triples)
    assert figures["zero_transition"] == 0
    assert figures["crop"] == figures["brightness"] == 0
    assert figures["camera_shift"] == pytest.approx(1 / 3.5, abs=0.15)  # one pixel, where motions are of some
    for rule in ("reversal", "additivity", "cycle"):
        assert figures[rule]["true"] < 1e-6
        assert figures[rule]["shuffled"] > 0.5
    for rule in ("reversal", "additivity"):
        assert figures[rule]["linear"] < 1e-3 < 0.3 < figures[rule]["linear_shuffled"]
    assert figures["cycle_tokens"]["true"] == 1 > 0.5 > figures["cycle_tokens"]["shuffled"]


def test_a_decoder_that_shows_no_motion_breaks_the_cycle(triples):
    figures = algebra(Motion(decodes=False), *triples)
    assert figures["cycle"]["true"] > 0.9
    assert figures["cycle_tokens"]["true"] < 0.5


def test_what_cannot_be_measured_is_none(triples):
    frames, tasks, episodes, has_third = triples
    laq = Motion()
    laq.weights = {"features": 1.0}
    figures = algebra(laq, frames, tasks, episodes, has_third & (episodes < 3))
    assert figures["additivity"] is figures["cycle"] is figures["cycle_tokens"] is None


def test_lengths_are_relative_to_nothing_where_half_of_the_latent_actions_are_that_of_no_change(triples):
    frames, *rest = triples
    still = frames[:, :1].expand(-1, 3, -1, -1, -1).contiguous()
    figures = algebra(Motion(), still, *rest)
    assert figures["zero_transition"] is figures["camera_shift"] is None
