import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hlrp import pictures
from hlrp.clips import Clips
from hlrp.pictures import (
    CAPTIONS,
    Binding,
    bindings_of,
    check_fields,
    draw_pictures,
    fill,
    parse_bucket,
    read_buckets,
    write_page,
)
from hlrp.strategies import STRATEGIES, Latents, Skip
from hlrp.world import World

BUCKETS = read_buckets(["left: task~left", "cows: task~cow"])


class Model(nn.Module):
    """What `BucketSamples` asks of a LAQ."""

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
    ("given", "message"),
    [
        ("transfers", "no strategy 'transfers'; expected one of every, reconstructions"),
        ("transfer:right", "no bucket 'right'; there are all, left, cows"),
        ("transfer@30", "expected a multiple of eval_freq=20 behind @"),
        ("transfer@often", "a multiple of eval_freq=20"),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        bindings_of([given], BUCKETS, 20)


@pytest.fixture(scope="module")
def sets() -> dict[str, Clips]:
    worlds = [World(name, 30) for name in ("arm", "hand")]
    return {world.name: Clips(world, range(30), (0.0, 0.2), 64, number) for number, world in enumerate(worlds)}


@pytest.mark.parametrize(
    ("rule", "fits", "does_not"),
    [
        ("dataset=bridge", {"dataset": "bridge"}, {"dataset": "bridge2"}),
        ("dataset!=bridge", {"dataset": "fractal"}, {"dataset": "bridge"}),
        ("dataset in ego4d, ssv2", {"dataset": "ssv2"}, {"dataset": "ssv"}),
        ("task~Left", {"task": "go LEFT now"}, {"task": "go right"}),
        ("embodiment=1", {"embodiment": 1}, {"embodiment": 0}),
        ("episode=3", {"episode": torch.tensor(3)}, {"episode": torch.tensor(30)}),
        ("task~push and dataset=a", {"task": "push", "dataset": "a"}, {"task": "push", "dataset": "b"}),
        ("embodiment=1", {"embodiment": 1}, {"task": "push"}),
    ],
)
def test_a_condition_says_which_samples_a_bucket_holds(rule, fits, does_not):
    bucket = parse_bucket(f"some: {rule}")
    assert bucket.name == "some" and bucket.holds(fits) and not bucket.holds(does_not)


def test_buckets_come_from_flags_and_from_files_of_lines(tmp_path):
    file = tmp_path / "buckets.txt"
    file.write_text("# by hand\nleft: task~left  # the edge\n\nhands: dataset=world-hand\n")
    buckets = read_buckets(["first: index=0", str(file)])
    assert [bucket.name for bucket in buckets] == ["all", "first", "left", "hands"]
    assert buckets[2].holds({"task": "to the left"}) and buckets[0].holds({})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["left task~left"], "is neither a file nor a bucket"),
        (["left: task"], "'task' is no condition"),
        (["a/b: task~left"], "its name is 'a/b'"),
        (["a: task~left", "a: task~right"], "two are named 'a'"),
        (["all: task~left"], "two are named 'all'"),
    ],
)
def test_a_bad_bucket_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        read_buckets(given)


def test_a_field_that_no_sample_has_is_named_with_those_that_there_are(sets):
    check_fields(read_buckets(["hands: embodiment=1"]), sets)
    with pytest.raises(ValueError, match="bucket x: no sample has the field 'colour'; there are dataset, embodiment"):
        check_fields(read_buckets(["x: colour=red"]), sets)


def test_buckets_are_filled_with_what_they_hold_and_all_sets_alike(sets):
    buckets = read_buckets(["left: task~left", "hands: dataset=world-hand", "none: task~cow"])
    found = fill(buckets, sets, limit=40, seed=0)
    samples, source = found["all"]
    assert len(samples) == 40 and source.bincount().tolist() == [21, 19]
    samples, source = found["left"]
    assert len(samples) == 40 and all("left" in sample["task"] for sample in samples)
    assert source.unique().tolist() == [0, 1]
    samples, source = found["hands"]
    assert len(samples) == 40 and {sample["dataset"] for sample in samples} == {"world-hand"}
    assert found["none"] == ([], found["none"][1]) and not len(found["none"][1])
    again = fill(buckets, sets, limit=40, seed=0)["left"][0]
    assert [(s["episode"], s["index"]) for s in again] == [(s["episode"], s["index"]) for s in found["left"][0]]
    other = fill(buckets, sets, limit=40, seed=1)["left"][0]
    assert [(s["episode"], s["index"]) for s in other] != [(s["episode"], s["index"]) for s in again]


def test_a_rare_bucket_finds_every_sample_that_there_is_and_none_twice(sets):
    found, _ = fill(read_buckets(["one: episode=3"]), sets, limit=1000, seed=0)["one"]
    places = {(sample["dataset"], sample["index"]) for sample in found}
    expected = sum(int(clips.ends[3] - clips.ends[2]) for clips in sets.values())
    assert len(found) == len(places) == expected


def test_no_set_is_read_for_buckets_that_cannot_hold_it(sets):
    class Unread:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            raise AssertionError("read")

    bucket = parse_bucket("hands: dataset=world-hand")
    found, _ = fill([bucket], sets | {"other": Unread()}, limit=10, seed=0)["hands"]
    assert len(found) == 10


def test_a_page_shows_the_last_picture_of_each_kind_with_a_caption_and_earlier_ones_below(tmp_path):
    assert CAPTIONS.keys() == STRATEGIES.keys()
    for name in ("transfer_000600", "reconstructions_000300", "reconstructions_000600", "left & right/usage_000600"):
        (tmp_path / f"{name}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(b"")
    write_page(tmp_path, "What <it> does")
    page = (tmp_path / "index.html").read_text()
    assert "<h1>What &lt;it&gt; does</h1>" in page
    assert re.findall("<h3>(.*?)</h3>", page) == ["Reconstructions", "Transfer", "Usage, samples of left &amp; right"]
    sources = re.findall('src="(.*?)"', page)
    assert sources[:3] == ["reconstructions_000600.png", "reconstructions_000300.png", "transfer_000600.png"]
    assert sources[3:] == ["left%20%26%20right/usage_000600.png"]
    assert page.count("<details>") == 1 and page.index("<details>") < page.index("reconstructions_000300.png")
