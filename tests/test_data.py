import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toys import Counting, write_lerobot, write_video

import train_laq
from hlrp import shards
from hlrp.clips import Clips
from hlrp.contract import Source, choose_demonstrations, labelled_episodes, labelled_share, split_episodes
from hlrp.data import BLOCK_SIZE, Mixture, action_statistics, choose_clips, collate, loader, open_data
from hlrp.demonstrations import choose_parts
from hlrp.laq import LAQConfig
from hlrp.sources import FORMATS, Format, expand, instructions, open_source, open_sources, parse_uri


def clips_of(source, times=(0.0, 0.5), index=0):
    return Clips(source, range(len(source.lengths)), times, image_size=8, source_index=index)


def shown(sample):
    return sample["frames"][:, :2, 0, 0].tolist()  # (episode, index) of each frame


def ids(batches):
    keys = "source", "episode", "index"
    return [clip for b in batches for clip in zip(*(b[key].tolist() for key in keys), strict=True)]


def test_ten_and_thirty_fps_give_pairs_of_the_same_duration():
    slow, fast = clips_of(Counting([20], fps=10)), clips_of(Counting([60], fps=30))
    assert shown(slow[3]) == [[0, 3], [0, 8]]
    assert shown(fast[3]) == [[0, 3], [0, 18]]
    both = clips_of(Counting([20, 60], fps=[10, 30]))
    assert shown(both[15 + 3]) == [[1, 3], [1, 18]]


def test_every_clip_lies_inside_one_episode_and_none_is_missing():
    source = Counting([7, 3, 5, 6, 9])  # at 10 fps and 0.5 s: 2, 0, 0, 1 and 4 clips
    clips = clips_of(source)
    assert [shown(clips[i]) for i in range(len(clips))] == [
        [[e, i], [e, i + 5]] for e, n in enumerate(source.lengths) for i in range(n - 5)
    ]
    assert len(clips) == 7


def test_a_batch_of_clips_is_read_once_an_episode_and_comes_in_order():
    source = Counting([20, 20, 20])
    clips = clips_of(source)
    wanted = [31, 0, 44, 2, 31, 17]
    samples = clips.__getitems__(wanted)
    assert source.reads == 3
    assert [shown(s) for s in samples] == [shown(clips[i]) for i in wanted]


def test_three_times_actions_state_and_truth_belong_to_their_frames():
    sample = clips_of(Counting([30], action_dim=2, state_dim=1), times=(0.0, 0.2, 0.5))[4]
    assert [i for _, i in shown(sample)] == [4, 6, 9]
    assert sample["action"].tolist() == [[i, i] for i in range(4, 9)]  # up to, not including, the last time
    assert not sample["action_is_pad"].any()
    assert sample["state"].tolist() == [4]
    assert sample["truth"].tolist() == [[4], [9]] and sample["embodiment"] == 0
    assert sample["index"] == 4 and sample["fps"] == 10 and sample["task"] == "episode 0"


@pytest.mark.parametrize(("fps", "delta", "fits"), [(1, 0.4, 1), (10, 0.16, 0.2), (5, 0.3, 0.4), (30, 0.01, 0.0333)])
def test_a_delta_far_from_a_whole_number_of_frames_names_what_would_fit(fps, delta, fits):
    message = f"2 of 2 episodes, first episode 0: delta={delta} s .* at its {fps} fps, .* such as {fits}"
    with pytest.raises(ValueError, match=message):
        clips_of(Counting([99, 99], fps=[fps, fps]), times=(0.0, delta))
    source = Counting([99, 99], fps=[100, fps])
    assert clips_of(source, times=(0.0, 0.9)).offsets[1].tolist() == [0, round(0.9 * fps)]


def test_episodes_all_too_short_name_the_longest():
    with pytest.raises(ValueError, match="longest episode only 0.5 s"):
        clips_of(Counting([3, 5]))


def test_a_broken_clip_names_its_episode_and_source_from_a_worker_too():
    class Broken(Counting):
        def read(self, episode, indices):
            raise ValueError("kitchen.mp4: cannot be decoded")

    mixture = Mixture([clips_of(Broken([9]))])
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match="test:counting, episode 0: kitchen.mp4: cannot be decoded"):
            next(iter(loader(mixture, batch_size=2, num_workers=num_workers)))


def test_a_process_that_fails_ends_though_its_workers_wait_for_it():
    code = """
import sys
sys.path.append("tests")
from test_data import Counting, Mixture, clips_of, loader
class Broken(Counting):
    def read(self, episode, indices):
        raise ValueError("cannot be decoded")
batches = iter(loader(Mixture([clips_of(Broken([9]))]), batch_size=2, num_workers=1))
next(batches)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "cannot be decoded" in done.stderr


@pytest.mark.parametrize(("num_episodes", "val_fraction"), [(2, 0.01), (2, 0.99), (11, 0.2), (100, 0.05)])
def test_no_episode_is_in_both_splits_and_each_has_one(num_episodes, val_fraction):
    source = Counting([9] * num_episodes)
    train, val = split_episodes(source, val_fraction, seed=3)
    assert sorted([*train, *val]) == list(range(num_episodes))
    assert len(train) >= 1 and len(val) >= 1
    again, other = split_episodes(source, val_fraction, seed=3), split_episodes(source, val_fraction, seed=4)
    assert again[1].tolist() == val.tolist()
    assert num_episodes < 10 or other[1].tolist() != val.tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lengths", [[2] * 6 + [40] * 2, [40] * 8, [3] * 3 + [6, 40, 40]])
def test_all_stages_hold_out_the_same_episodes_and_one_that_has_clips(lengths, seed):
    source = Counting(lengths, action_dim=1)
    args = {"val_fraction": 0.25, "seed": seed, "demonstrations": None, "episodes": None, "pseudo_actions": None}
    args |= {"val_samples": 4, "label_fraction": 1.0, "skip_broken": False, "temperature": None}
    args = SimpleNamespace(**args)
    train = [
        open_data(args, [source], [1.0], times).clips[0].episodes.tolist() for times in ((0.0, 0.5), (0.0, 0.5, 1.0))
    ]
    (part,) = choose_parts(args, [source], [1.0])
    assert train[0] == train[1] == part.train.tolist()
    assert source.lengths[part.val].max() == source.lengths[part.train].max() == 40


def test_one_episode_cannot_be_split():
    with pytest.raises(ValueError, match="test:counting: 1 episode"):
        split_episodes(Counting([9]), 0.1, seed=0)


def test_chosen_clips_are_spread_over_the_episodes_and_seeded():
    clips = clips_of(Counting([105] * 10))
    chosen = choose_clips(clips, 20, seed=0)
    assert np.bincount([s["episode"] for s in chosen.__getitems__(range(20))]).tolist() == [2] * 10
    again, other = choose_clips(clips, 20, seed=0), choose_clips(clips, 20, seed=1)
    assert chosen.indices == again.indices != other.indices
    assert choose_clips(clips, 5000, seed=0).indices == list(range(1000))


class Tasks(Counting):
    """Ten tasks one after another, of 20 episodes each, and the 10 episodes of the last task of texts of their own."""

    def __init__(self):
        super().__init__([30] * 210, action_dim=1)

    def instructions(self, episode, indices):
        return [f"task {episode // 20}" if episode < 200 else f"text {episode}"] * len(indices)


def test_a_share_of_the_labels_is_one_of_each_task_and_part_of_a_larger_share():
    source, before = Tasks(), set()
    for share, of_each, alone in ((0, 0, 0), (0.01, 1, 1), (0.1, 2, 1), (0.5, 10, 5), (1, 20, 10)):
        found = labelled_share(source, np.arange(210), share, seed=3)
        assert np.bincount(found // 20, minlength=11).tolist() == [of_each] * 10 + [alone]
        assert before <= set(found.tolist()) and found.tolist() == sorted(found)
        before = set(found.tolist())
    some, other = (labelled_share(source, np.arange(210), 0.1, seed) for seed in (3, 4))
    assert some.tolist() != other.tolist() and some[:2].tolist() != [0, 1]
    assert source.reads == 0  # no frame is decoded


def test_all_three_stages_label_the_same_demonstrations():
    source = Tasks()
    train = np.arange(0, 200, 3)
    labelled = labelled_episodes(source, train, demonstrations=2, label_fraction=1.0, seed=5)
    assert labelled.tolist() == choose_demonstrations(source, train, 2, seed=5).tolist()
    assert np.bincount(labelled // 20).tolist() == [2] * 10 and set(labelled) <= set(train.tolist())
    with pytest.raises(ValueError, match="demonstrations=9, but test:counting has 7 training episodes of 'task "):
        labelled_episodes(source, train, demonstrations=9, label_fraction=1.0, seed=5)


def test_statistics_of_actions_are_those_of_all_tasks_exact_and_finite():
    class Robot(Tasks):
        def __init__(self):
            super().__init__()
            self.lengths = np.full(2100, 50)
            self.fps = np.full(2100, 10.0)

        def actions(self, episode, indices):
            noise = np.random.default_rng(episode).normal(90 + episode // 210, 0.3, (50, 1))
            return torch.from_numpy(noise.astype(np.float32))[np.asarray(indices)]

    mean, std = action_statistics(Clips(Robot(), range(2100), (0.0, 0.5), 8))
    assert mean.item() == pytest.approx(94.5, abs=0.3)
    mean, std = action_statistics(Clips(Robot(), range(2100), (0.0, 0.5), 8, labelled_episodes=range(210)))
    assert mean.item() == pytest.approx(90, abs=0.02) and std.item() == pytest.approx(0.3, abs=5e-3)

    source = Robot()
    source.actions = lambda episode, indices: torch.full((50, 1), torch.inf if episode == 7 else 0.1)[indices]
    with pytest.raises(ValueError, match=r"test:counting, episode 7: action of frame 0: expected finite .* \[inf\]"):
        action_statistics(Clips(source, range(9), (0.0, 0.5), 8))
    mean, std = action_statistics(Clips(source, range(7), (0.0, 0.5), 8))  # it never moves
    assert ((torch.tensor([0.1, 0.101]) - mean) / std).tolist() == pytest.approx([0, 1], abs=1e-3)


def two_sources(seed=0, **second):
    a = clips_of(Counting([25, 15], name="a"), index=0)  # 30 clips
    b = clips_of(Counting([105], name="b", **second), index=1)  # 100 clips
    return Mixture([a, b], weights=[3, 1], seed=seed)


def test_shares_are_exact_in_every_block_and_consumed_counts_them():
    mixture = two_sources()
    source, _ = mixture.locate(range(3 * BLOCK_SIZE))
    assert np.bincount(source[BLOCK_SIZE : 2 * BLOCK_SIZE]).tolist() == [3 * BLOCK_SIZE // 4, BLOCK_SIZE // 4]
    assert not np.array_equal(source[:BLOCK_SIZE], source[BLOCK_SIZE : 2 * BLOCK_SIZE])
    prefix = np.arange(1, BLOCK_SIZE + 1)
    assert np.abs(source[:BLOCK_SIZE].cumsum() - 0.25 * prefix).max() < 2  # at any time
    assert len({tuple(four) for four in source[:BLOCK_SIZE].reshape(-1, 4)}) == 4  # in any order
    for start, stop in [(0, 0), (0, 7), (100, BLOCK_SIZE), (5000, 9001), (BLOCK_SIZE, 3 * BLOCK_SIZE)]:
        assert mixture.consumed(start, stop).tolist() == np.bincount(source[start:stop], minlength=2).tolist()


def test_every_clip_comes_exactly_once_an_epoch_in_another_order_each():
    mixture = two_sources()
    source, index = mixture.locate(range(4 * BLOCK_SIZE))
    for i, clips in enumerate(mixture.clips):
        epochs = index[source == i]
        epochs = epochs[: len(epochs) // len(clips) * len(clips)].reshape(-1, len(clips))
        assert (np.sort(epochs, axis=1) == np.arange(len(clips))).all()
        assert len({tuple(e) for e in epochs}) == len(epochs) > 10


@pytest.mark.parametrize("lengths", [[6], [7], [8], [9, 9], [2005], [4101]])
def test_a_permutation_covers_ranges_of_any_size(lengths):
    clips = clips_of(Counting(lengths))
    index = Mixture([clips]).locate(range(len(clips)))[1]
    assert sorted(index) == list(range(len(clips)))
    assert len(clips) < 100 or abs(np.corrcoef(index, np.arange(len(clips)))[0, 1]) < 0.1


def test_the_stream_is_a_function_of_the_seed():
    where = [np.stack(two_sources(seed).locate(range(300))).tolist() for seed in (0, 0, 1)]
    assert where[0] == where[1] != where[2]


def test_workers_ranks_and_a_resume_see_one_stream():
    mixture = two_sources()

    def stream(num_batches, **kwargs):
        return ids(itertools.islice(iter(loader(mixture, **kwargs)), num_batches))

    alone = stream(12, batch_size=8)
    assert len(set(alone)) > 40
    assert stream(12, batch_size=8, num_workers=2) == stream(12, batch_size=8, num_workers=4) == alone
    assert stream(5, batch_size=8, start=7 * 8) == alone[7 * 8 :]
    ranks = [stream(6, batch_size=8, rank=r, num_ranks=2) for r in range(2)]
    assert [x for step in range(6) for r in range(2) for x in ranks[r][8 * step : 8 * step + 8]] == alone


@pytest.fixture(scope="module")
def million():
    return Mixture([clips_of(Counting([105] * 10_000)), two_sources().clips[0]], weights=[1, 1])


def test_a_position_is_restored_however_far_it_is(million):
    for step in (1, 10**6, 10**10):
        numbers = np.arange(64 * step, 64 * step + 64)
        where = million.locate(numbers)
        assert np.array_equal(np.stack(where)[:, 40:], np.stack(Mixture(million.clips).locate(numbers[40:])))


@pytest.mark.timing
def test_a_position_is_restored_at_once(million):
    million.locate([0])
    for step in (2, 2 * 10**6, 2 * 10**10):
        start = time.process_time()
        million.locate(np.arange(64 * step, 64 * step + 64))
        assert time.process_time() - start < 0.02


def test_the_ranks_together_see_every_clip_of_an_epoch_once():
    clips = clips_of(Counting([25, 15, 45], name="a"))  # 70 clips
    seen = [
        clip
        for rank in range(2)
        for clip in ids(itertools.islice(loader(Mixture([clips]), 5, rank=rank, num_ranks=2), 7))
    ]
    assert len(seen) == len(set(seen)) == len(clips) == 70


def test_reading_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(loader(two_sources(), batch_size=4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_weight_too_small_to_be_drawn_is_refused():
    a, b = clips_of(Counting([9], name="a")), clips_of(Counting([9], name="b"))
    with pytest.raises(ValueError, match="test:b@1e-06 would never be drawn"):
        Mixture([a, b], weights=[1, 1e-6])
    with pytest.raises(ValueError, match="one name"):
        Mixture([a, a])


def test_a_temperature_weighs_sources_by_their_size():
    clips = two_sources().clips  # of 30 and 100 clips
    by_size = Mixture(clips, temperature=1.0).counts
    assert by_size[1] / by_size[0] == pytest.approx(100 / 30, rel=0.01)
    milder = Mixture(clips, [2, 1], temperature=2.0).counts
    assert milder[1] / milder[0] == pytest.approx((100 / 30) ** 0.5 / 2, rel=0.01)


def test_a_clip_that_cannot_be_read_gives_way_to_another_and_is_told():
    class Partly(Counting):
        def read(self, episode, indices):
            if episode == 1:
                raise ValueError("kitchen.mp4: cannot be decoded")
            return super().read(episode, indices)

    whole = Mixture([clips_of(Counting([105, 55]))])
    mixture = Mixture([clips_of(Partly([105, 55]))], skip_broken=True)
    expected, found = (list(itertools.islice(loader(m, 8), 12)) for m in (whole, mixture))
    told = sum(len(batch.get("skipped", ())) for batch in found)
    assert told >= sum(episode == 1 for _, episode, _ in ids(expected)) > 5  # what takes the place may be broken
    assert found[0]["skipped"][0].endswith("episode 1: kitchen.mp4: cannot be decoded")
    samples = mixture.__getitems__(range(8))
    assert samples.skipped == found[0]["skipped"] and "skipped" not in set().union(*samples)
    pairs = zip(ids(expected), ids(found), strict=True)
    assert all(new == old or old[1] == 1 for old, new in pairs)
    assert all(episode == 0 for _, episode, _ in ids(found))
    with pytest.raises(ValueError, match="kitchen.mp4"):
        next(iter(loader(Mixture(mixture.clips), 64)))
    broken = Mixture([Clips(Partly([105, 55]), [1], (0.0, 0.5), 8)], skip_broken=True)
    with pytest.raises(ValueError, match=r"none of \d+ clips all over it can be read: .* kitchen.mp4"):
        next(iter(loader(broken, 8)))


def test_a_chosen_clip_that_cannot_be_read_gives_way_too(caplog):
    class Partly(Counting):
        def read(self, episode, indices):
            if episode == 1:
                raise ValueError("kitchen.mp4: cannot be decoded")
            return super().read(episode, indices)

    clips = clips_of(Partly([105, 55]))
    with pytest.raises(ValueError, match="kitchen.mp4"):
        list(DataLoader(choose_clips(clips, 20, seed=0), 8, collate_fn=collate))
    batches = list(DataLoader(choose_clips(clips, 20, seed=0, skip_broken=True), 8, collate_fn=collate))
    assert sum(len(batch["episode"]) for batch in batches) == 20 and "kitchen.mp4" in caplog.text
    assert not any(batch["episode"].any() for batch in batches)


def test_more_broken_files_than_allowed_stop_before_training(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    with av.open(str(tmp_path / "c.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = 16
        for _ in range(9):
            out.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        out.mux(stream.encode())
    assert len(open_sources([f"videos:{tmp_path}"], True, 2)[0]) == 1
    with pytest.raises(ValueError, match="max_broken=1, but 2 files or episodes cannot be read"):
        open_sources([f"videos:{tmp_path}"], True, 1)


def test_facts_of_any_kind_and_arrays_of_other_shapes_stack_or_stay_apart():
    sample = clips_of(Counting([9]))[0]
    some = [sample | {"place": 1, "note": None, "x": torch.zeros(2)}]
    some.append(sample | {"place": 2, "note": "dark", "x": torch.zeros(3)})
    batch = collate(some)
    assert batch["place"].tolist() == [1, 2] and batch["note"] == [None, "dark"] and "x" not in batch


def test_robot_data_and_human_video_share_a_batch():
    mixture = two_sources(action_dim=3, state_dim=2)
    batch = next(iter(loader(mixture, batch_size=64)))
    human, robot = batch["source"] == 0, batch["source"] == 1
    assert human.any() and robot.any()
    assert batch["action"].shape == (64, 5, 3) and batch["state"].shape == (64, 2)
    assert batch["action_is_pad"][human].all()
    assert not batch["action"][human].any() and not batch["state"][human].any()
    assert not batch["action_is_pad"][robot].any()
    assert (batch["action"][robot, :, 0] == batch["index"][robot, None] + torch.arange(5)).all()
    assert batch["frames"].dtype == torch.uint8 and batch["fps"].dtype == torch.float32
    assert batch["dataset"][0] in "ab" and len(batch["task"]) == 64

    some = [mixture.clips[0][0], mixture.clips[1][0] | {"point": torch.full((2,), 0.5)}]
    point = collate(some, sizes=mixture.sizes)["point"]
    assert point[0].isnan().all() and (point[1] == 0.5).all() and "point" not in batch

    only_human = collate([mixture.clips[0][0]] * 2, sizes=mixture.sizes)
    assert only_human["action"].shape == (2, 5, 3) and only_human["action_is_pad"].all()
    assert "action" not in collate([mixture.clips[0][0]])


def test_action_chunks_of_two_frame_rates_are_padded_to_the_longer():
    slow = clips_of(Counting([20], fps=10, name="slow", action_dim=1))
    fast = clips_of(Counting([60], fps=30, name="fast", action_dim=2), index=1)
    batch = collate([slow[0], fast[0]])
    assert batch["action"].shape == (2, 15, 2)
    assert batch["action_is_pad"].sum(1).tolist() == [10, 0]


def test_the_fingerprint_follows_data_split_times_and_size():
    source = Counting([50, 50])
    prints = {
        Mixture([Clips(source, episodes, (0.0, delta), image_size)]).fingerprint
        for episodes, delta, image_size in [([0], 0.5, 8), ([1], 0.5, 8), ([0], 0.4, 8), ([0], 0.5, 16)]
    }
    assert len(prints) == 4
    assert clips_of(source).source.fingerprint == "counting"
    assert Mixture([clips_of(source)]).fingerprint == Mixture([clips_of(source)], seed=5).fingerprint


def test_uris_carry_options_and_a_weight():
    assert parse_uri("videos:/data/kitchen") == ("videos:/data/kitchen", "videos", "/data/kitchen", {}, 1.0)
    assert parse_uri("videos:/data@home/x").location == "/data@home/x"
    uri = parse_uri("lerobot:lerobot/pusht?camera=observation.image@0.5")
    assert uri.location == "lerobot/pusht" and uri.weight == 0.5
    assert uri.options == {"camera": "observation.image"}
    uri = parse_uri("world:clean?episodes=200&seed=1")
    assert uri.options == {"episodes": 200, "seed": 1} and uri.uri == "world:clean?episodes=200&seed=1"
    assert parse_uri("rlds:octo24?root=/data/a+b%20c").options == {"root": "/data/a+b c"}
    uri = parse_uri("shards:https://host/a.tar?sig=x%3D&fps=5@2")
    assert (uri.location, uri.options) == ("https://host/a.tar?sig=x%3D", {"fps": 5.0})
    uri = parse_uri("metaworld:reach-v3,push-v3?episodes=5@2")
    assert uri.location == "reach-v3,push-v3" and uri.weight == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("film:/data", "videos:..., lerobot:..."),
        ("/data/kitchen", "not a data source"),
        ("videos:", "not a data source"),
        ("videos:/data@0", "expected a weight above 0, such as @0.5, got '0'"),
        ("videos:/data@half", "expected a weight above 0, such as @0.5, got 'half'"),
        ("videos:/data@nan", "expected a weight above 0, such as @0.5, got 'nan'"),
        ("lerobot:x?view=top", "unknown option 'view'; options of lerobot: camera"),
        ("world:clean?episodes=many", "expected episodes of type int, got 'many'"),
        ("rlds:/data?bgr=2", "expected bgr of type boolean, got '2'"),
        ("rlds:octo24", "rlds:octo24: no folder of its data sets; expected .root=DIR"),
    ],
)
def test_a_wrong_uri_says_what_would_fit(text, message):
    with pytest.raises(ValueError, match=message):
        open_source(text)


class Flat(Source):
    """No more than the contract demands of a format."""

    def __init__(self, location, uri, skip_broken, length=5):
        self.uri, self.name, self.fingerprint = uri, location, location
        self.lengths, self.fps = np.array([length] * 3), np.full(3, 10.0)

    def read(self, episode, indices):
        return {"frames": torch.full((len(indices), 3, 8, 8), episode, dtype=torch.uint8)}


def test_a_new_format_is_one_class_and_one_line_of_the_table(monkeypatch):
    monkeypatch.setitem(FORMATS, "flat", Format(f"{__name__}:Flat", {"length": int}))
    with pytest.raises(ValueError, match="expected length of type int, got 'long'"):
        open_source("flat:grey?length=long")
    [source], weights = open_sources(["flat:grey?length=20@2"], False, 0)
    assert weights == [2] and len(choose_demonstrations(source, range(3), 1, seed=0)) == 0
    train, val = split_episodes(source, 0.3, seed=0)
    assert len(train) == 2 and len(val) == 1 and instructions([source]) == [""]
    batch = next(iter(loader(Mixture([clips_of(source)]), 4)))
    assert batch["frames"].shape == (4, 2, 3, 8, 8) and batch["task"] == [""] * 4 and "action" not in batch
    assert batch["place"] == [f"episode {episode}" for episode in batch["episode"].tolist()]
    with pytest.raises(NotImplementedError, match=r"flat:grey\?length=20: Flat has action_dim=0, but no actions"):
        source.actions(0, [0])


def test_a_mixture_of_open_x_becomes_its_data_sets_which_share_its_weight():
    every = [parse_uri(uri) for uri in expand(["world:clean@3", "rlds:octo24?root=/data@2"])]
    assert every[0].uri == "world:clean" and len(every) == 25
    assert sum(uri.weight for uri in every[1:]) == pytest.approx(2, rel=1e-4)
    assert "rlds:/data/bc_z" in [uri.uri for uri in every]
    with pytest.raises(ValueError, match="a whole mixture takes the option root, not camera"):
        expand(["rlds:octo24?root=/data&camera=image"])


def for_a_policy(source, **settings):
    episodes = range(len(source.lengths))
    settings = {"image_size": 8, "input_size": 8, "min_times": 1, "chunk_size": 4} | settings
    return Clips(source, episodes, (0.0, 0.2, 0.4), **settings)


def test_a_policy_acts_in_every_frame_and_what_lies_past_the_episode_is_padding():
    clips = for_a_policy(Counting([6, 3], action_dim=1, state_dim=1))
    assert len(clips) == 9
    sample = clips[4]  # frames 4 and 5 of the first episode are left
    assert sample["action"].flatten().tolist() == [4, 5, 5, 5]
    assert sample["action_is_pad"].tolist() == [False, False, True, True]
    assert sample["latent_is_pad"].tolist() == [True, True]  # 0.2 s are 2 frames
    assert clips[1]["latent_is_pad"].tolist() == [False, False] and not clips[1]["action_is_pad"].any()
    assert clips[2]["latent_is_pad"].tolist() == [False, True]
    assert [i for _, i in shown(clips[2])] == [2, 4, 5] and sample["state"].tolist() == [4]


def test_a_chunk_of_latent_actions_may_end_with_padding():
    clips = for_a_policy(Counting([7], action_dim=1), min_times=2, chunk_size=None)
    assert [clips[i]["index"] for i in range(len(clips))] == [0, 1, 2, 3, 4]
    assert [clips[i]["latent_is_pad"].tolist() for i in (2, 3)] == [[False, False], [False, True]]
    assert clips[4]["action_is_pad"].tolist() == [False, False, False, True]


def test_a_history_of_images_begins_with_the_first_frame_and_never_shows_the_future():
    clips = for_a_policy(Counting([6], action_dim=1), num_images=3)
    seen = [clips[i]["images"][:, 1, 0, 0].tolist() for i in range(6)]
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


RLDS = Path(__file__).parent / "data" / "rlds_fixture"
MODEL = {"image_size": 16, "patch_size": 8, "codebook_size": 8, "num_tokens": 2}
SETTINGS = {"val_samples": 8, "steps": 40, "batch_size": 8, "warmup_steps": 2, "num_workers": 2}
SETTINGS["pictures"] = ("reconstructions",)
EVERY = {"log_freq": 40, "eval_freq": 40, "save_freq": 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    shards.main(shards.Args(folder / "shards", ("world:clean?episodes=12",), frames_per_shard=100))
    write_lerobot(folder / "robot")
    (folder / "clips").mkdir()
    for i in range(2):
        write_video(folder / "clips" / f"{i}.mp4")
    return (
        f"shards:{folder}/shards@2",
        f"rlds:{RLDS}?fps=10&camera=image&split=train,val@1",
        f"lerobot:{folder}/robot@1",
        f"videos:{folder}/clips@0.5",
    )


def train(output_dir, data, **settings):
    model = LAQConfig(**MODEL)
    train_laq.main(
        train_laq.Args(
            **SETTINGS | EVERY | {"data": data, "val_fraction": 0.3} | settings, model=model, output_dir=output_dir
        )
    )
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("fresh_process")
def test_shards_open_x_lerobot_and_videos_train_as_one_mixture(data, tmp_path, capfd):
    lines = train(tmp_path / "run", data)
    (logged,) = (line for line in lines if line["split"] == "train")
    shares = [value for name, value in logged.items() if name.startswith("share/")]
    weights = np.array([parse_uri(uri).weight for uri in data])
    assert np.abs(shares - weights / weights.sum()).max() < 0.02
    (found,) = (line for line in lines if line["split"] == "val")
    assert len({name.split("/")[0] for name in found if "true_over_copy" in name}) == 4
    out = capfd.readouterr()
    assert re.search(r"rlds-tiny_robot-image: a stream of \d shards, ", out.err)

    step = json.loads((tmp_path / "run/checkpoints/000020/training_state/training_step.json").read_text())
    assert step["turns"]["rlds-tiny_robot-image"] > 0
    shutil.rmtree(tmp_path / "run/checkpoints/000040")
    train(tmp_path / "run", data)
    assert "is a stream: it goes on at the beginning of shard" in "".join(capfd.readouterr())
