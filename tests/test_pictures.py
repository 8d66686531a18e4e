from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hlrp import pictures
from hlrp.clips import Clips
from hlrp.pictures import Binding, bindings_of, draw_pictures, read_buckets
from hlrp.strategies import Latents, Skip
from hlrp.world import World

BUCKETS = read_buckets(["left: task~left", "cows: task~cow"])


class Model(nn.Module):
    """What `Shown` asks of a LAQ."""

    config, weights = SimpleNamespace(delta=0.2), {"pixels": 1.0}


def latents_of(batch: dict) -> Latents:
    return Latents(torch.zeros(len(batch["frames"]), 2, 1), None)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """draw(bindings, ...) -> what was drawn, and the figures, with strategies that only note what they are shown."""
    seen = []

    def strategy(name):
        def note(shown, path, title):
            if name == "usage":
                raise Skip("there are no codes")
            seen.append((str(path.relative_to(tmp_path)), title, shown))
            return {"share": 0.5}

        return note

    monkeypatch.setattr(pictures, "STRATEGIES", {name: strategy(name) for name in pictures.STRATEGIES})

    def draw(given, **place):
        seen.clear()
        world = World("clean", 20)
        sets = {world.name: Clips(world, range(20), (0.0, 0.2), 64)}
        bindings = bindings_of(given, BUCKETS, 10)
        figures = draw_pictures(Model(), latents_of, sets, BUCKETS, bindings, tmp_path, **place)
        return [*seen], figures

    return draw


def test_a_strategy_is_drawn_of_its_buckets_into_their_folders(drawn):
    seen, figures = drawn(["transfer:left", "one-code"], step=20)
    assert sorted(path for path, *_ in seen) == [
        "left/one-code_000020.png",
        "left/transfer_000020.png",
        "one-code_000020.png",
    ]
    assert set(figures) == {"left/transfer/share", "all/one-code/share", "left/one-code/share"}
    of_left = next(shown for path, _, shown in seen if path.startswith("left/"))
    assert all("left" in task for task in of_left.tasks)
    titles = {path: title for path, title, _ in seen}
    assert titles["one-code_000020.png"] == "One code, step 20"
    assert titles["left/one-code_000020.png"].startswith("One code, step 20. left: ")


def test_a_cadence_holds_and_everything_is_drawn_at_the_last_step(drawn):
    due = {step: len(drawn(["transfer:all@20", "one-code:all"], step=step, last=50)[0]) for step in (10, 20, 50)}
    assert due == {10: 1, 20: 2, 50: 2}


def test_what_is_left_out_is_named_with_the_reason(drawn, caplog):
    seen, _ = drawn(["usage", "one-code:cows"], step=10)
    assert not seen
    assert "no picture usage of bucket all: there are no codes" in caplog.text
    assert "no picture all of bucket cows: no held-out sample has task ~ cow, in world-clean" in caplog.text


def test_a_model_is_left_in_the_mode_that_it_was_in_and_the_random_state_as_it_was(drawn):
    state = torch.get_rng_state()
    seen, _ = drawn(["one-code"])
    assert seen[0][0] == "one-code.png" and seen[0][2].laq.training
    assert torch.equal(torch.get_rng_state(), state)


def test_bindings_are_read_from_flags():
    assert bindings_of(["transfer", "usage:left@40"], BUCKETS, 20) == [
        Binding("transfer", ("all", "left", "cows"), 20),
        Binding("usage", ("left",), 40),
    ]
    every = bindings_of(["every:left"], BUCKETS, 20)
    assert [binding.strategy for binding in every] == [*pictures.STRATEGIES]


@pytest.mark.parametrize(
    "given, message",
    [
        ("transfers", "no strategy 'transfers'; every, reconstructions"),
        ("transfer:right", "no bucket 'right'; there are all, left, cows"),
        ("transfer@30", "a multiple of eval_freq=20 fits behind @"),
        ("transfer@often", "a multiple of eval_freq=20"),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        bindings_of([given], BUCKETS, 20)
