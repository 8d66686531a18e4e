import pytest
import torch

from hlrp.clips import Clips
from hlrp.pictures import check_fields, fill, parse_bucket, read_buckets
from hlrp.world import World


@pytest.fixture(scope="module")
def sets() -> dict[str, Clips]:
    worlds = [World(name, 30) for name in ("arm", "hand")]
    return {world.name: Clips(world, range(30), (0.0, 0.2), 64, number) for number, world in enumerate(worlds)}


@pytest.mark.parametrize(
    "rule, fits, does_not",
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
    "given, message",
    [
        (["left task~left"], "is no file, and no bucket"),
        (["left: task"], "'task' is no condition"),
        (["a/b: task~left"], "its name is 'a/b'"),
        (["a: task~left", "a: task~right"], "'a' is there twice"),
        (["all: task~left"], "'all' is there twice"),
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
