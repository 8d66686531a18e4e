from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torchvision.io import encode_png

from hlrp import streams
from hlrp.contract import Stream, labelled_share, split_episodes
from hlrp.data import Mixture, action_statistics, choose_clips, loader
from hlrp.sources import instructions
from hlrp.streams import MAX_EPISODES, Episode, StreamClips


class Passing(Stream):
    """A stream of shards whose frames show (shard, place of the episode, index)."""

    uri, name, camera, fingerprint, fps, skip_broken = "test:passing", "passing", "", "passing", 10.0, False
    action_dim, state_dim = 2, 0

    def __init__(self, num_shards=6, lengths=(9, 3, 12, 7), broken=()):
        self.num_shards, self.lengths, self.broken = num_shards, lengths, broken

    def episodes(self, shard):
        for place, length in enumerate(self.lengths):
            if (shard, place) in self.broken:
                raise ValueError(f"{shard}.tar: member {place} is cut off")
            frames = [torch.tensor([shard, place, i], dtype=torch.uint8) for i in range(length)]
            encoded = [bytes(encode_png(frame[:, None, None].expand(3, 4, 4)).numpy()) for frame in frames]
            action = np.arange(2 * length, dtype=np.float32).reshape(length, 2)
            yield Episode(f"{shard}.tar, {place}", encoded, self.fps, "push", action=action)


def clips(source, val_fraction=0.2, **settings):
    train, _ = split_episodes(source, val_fraction, seed=1)
    return StreamClips(source, train, (0.0, 0.5), image_size=4, **settings)


def shown(batch):
    """The clips of a batch as (shard, place, index) of the first frame."""
    return [tuple(frame) for frame in batch["frames"][:, 0, :, 0, 0].tolist()]


def expected(source, episodes):
    """All clips of these episodes, by what a sample shows of them."""
    return {
        (shard, place, i)
        for shard in range(source.num_shards)
        for place, length in enumerate(source.lengths)
        if shard * MAX_EPISODES + place in episodes
        for i in range(length - 5)
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_readers_of_all_ranks_share_the_shards_out(num_workers):
    source = Passing()
    train = clips(source)
    every = expected(source, train.episodes)
    seen = Counter()
    for rank in range(2):
        batches = loader(Mixture([train]), 1, rank=rank, num_ranks=2, num_workers=num_workers)
        turns = {}
        for batch in batches:
            ((_, reader, turn),) = batch["turns"]
            turns[reader] = turn
            seen.update(shown(batch))
            if len(turns) == max(1, num_workers) and min(turns.values()) >= 2 * source.num_shards:
                break
    assert set(seen) == every and min(seen.values()) >= 2


def test_frames_of_a_stream_are_cropped_where_it_says_so():
    source = Passing()
    wide = [torch.arange(3 * 4 * 8, dtype=torch.uint8).reshape(3, 4, 8) + i for i in range(9)]
    encoded = [bytes(encode_png(frame).numpy()) for frame in wide]
    source.episodes = lambda shard: iter([Episode(f"{shard}.tar", encoded, 10.0)])
    source.action_dim, source.crop = 0, True
    for sample in clips(source).draw(4):
        assert torch.equal(sample["frames"][0], wide[sample["index"]][..., 2:6])


def test_one_reader_gives_each_clip_once_before_it_gives_one_twice():
    source = Passing(num_shards=1, lengths=[30] * 20)
    train = clips(source)
    batches = loader(Mixture([train]), 5)
    every = expected(source, train.episodes)
    first = [clip for batch in islice(batches, len(every) // 5) for clip in shown(batch)]
    assert len(set(first)) > 0.9 * len(every)
    assert [place for _, place, _ in first] != sorted(place for _, place, _ in first)  # mixed


def test_the_parts_of_a_stream_are_apart_and_a_share_of_one_lies_in_it():
    train, val = split_episodes(Passing(), 0.2, seed=3)
    labelled = labelled_share(Passing(), train, 0.5, seed=0)
    parts = [[e in part for e in range(3000)] for part in (train, val, labelled)]
    assert [sum(part) / 3000 for part in parts] == pytest.approx([0.8, 0.2, 0.4], abs=0.03)
    assert not any(a and b for a, b in zip(*parts[:2], strict=True))
    assert all(a or not b for a, b in zip(parts[0], parts[2], strict=True))


def test_a_stream_goes_on_at_the_beginning_of_a_shard_and_misses_nothing(monkeypatch):
    monkeypatch.setattr(streams, "BUFFER_SIZE", 2000)
    source = Passing(num_shards=40, lengths=(9, 12))
    train = clips(source)
    mixture = Mixture([train])
    seen, turns = [], {}
    for batch in islice(loader(mixture, 4, num_workers=2), 12):
        seen += shown(batch)
        turns |= {reader: turn for _, reader, turn in batch["turns"]}
    start = min(turns.values())
    assert start > 0
    again = [clip for b in islice(loader(mixture, 4, turns={"passing": start}), 150) for clip in shown(b)]
    earlier = {clip for clip in seen if clip not in set(again)}
    done = {train.shard(turn) for turn in range(start)}
    assert {shard for shard, _, _ in earlier} <= done
    assert expected(source, train.episodes) <= earlier | set(again)


def test_labelled_episodes_show_their_actions_and_others_none():
    source = Passing()
    train = split_episodes(source, 0.2, seed=1)[0]
    half = clips(source, labelled_episodes=labelled_share(source, train, 0.5, seed=0))
    for sample in half.draw(30):
        assert ("action" in sample) == (sample["episode"] in half.labelled_episodes)
        if "action" in sample:
            first = sample["index"]
            assert sample["action"].tolist() == [[2 * i, 2 * i + 1] for i in range(first, first + 5)]


def test_validation_holds_clips_of_held_out_episodes_and_frees_the_other_frames():
    source = Passing(num_shards=60, lengths=(29, 3, 32, 27))
    _, val = split_episodes(source, 0.2, seed=1)
    chosen = choose_clips(StreamClips(source, val, (0.0, 0.5), image_size=4), 32, seed=0)
    assert len(chosen) == 32
    for sample in chosen:
        shard, place, index = sample["frames"][0, :, 0, 0].tolist()
        assert sample["episode"] == shard * MAX_EPISODES + place in val and index == sample["index"]
    frames = [data for episode in chosen.dataset.source.episodes for data in episode.frames]
    assert 0 < sum(map(bool, frames)) <= 64 < len(frames)
    mean, std = action_statistics(clips(source))
    assert mean[1] - mean[0] == pytest.approx(1) and std.shape == (2,)


def test_what_is_held_and_the_words_of_a_tokenizer_come_from_shards_all_over_a_stream():
    class Tasks(Passing):
        def episodes(self, shard):
            for episode in super().episodes(shard):
                episode.task = f"task {shard // 10}"
                yield episode

    source = Tasks(num_shards=100, lengths=[20] * 300)  # task by task, as MetaWorld lies
    assert len(instructions([source])) == 10
    held = clips(source).hold(64)
    assert len({held.source.episode_numbers[i] // MAX_EPISODES // 10 for i in range(64)}) >= 9
    assert held.source.episode_numbers == clips(source).hold(64).source.episode_numbers


def test_a_fault_stops_by_name_or_is_told_and_what_can_be_read_goes_on():
    source = Passing(broken={(2, 1)})
    with pytest.raises(ValueError, match="test:passing, shard 2: 2.tar: member 1 is cut off"):
        clips(source).draw(200)
    source.skip_broken = True
    mixture = Mixture([clips(source)])
    batches = list(islice(loader(mixture, 8), 20))
    told = [text for batch in batches for text in batch.get("skipped", ())]
    assert told and set(told) == {"test:passing, shard 2: 2.tar: member 1 is cut off"}
    assert all(place < 1 for batch in batches for shard, place, _ in shown(batch) if shard == 2)


def test_a_frame_that_cannot_be_decoded_costs_its_episode(monkeypatch):
    source = Passing(num_shards=1, lengths=(9, 9, 9))
    whole = list(source.episodes(0))
    whole[1].frames[0] = whole[1].frames[0][:40]
    monkeypatch.setattr(source, "episodes", lambda shard: iter(whole))
    with pytest.raises(ValueError, match="0.tar, 1, frame 0: not a readable image"):
        clips(source, 0.001).draw(20)
    source.skip_broken = True
    reader = clips(source, 0.001)
    assert len(reader.draw(30)) == 30 and "0.tar, 1, frame 0" in reader.skipped[0]


def test_a_stream_of_which_nothing_can_be_read_ends(monkeypatch):
    source = Passing(num_shards=2, lengths=(9, 9))
    source.skip_broken = True
    rotten = [Episode("0.tar", [b"no image"] * 9, 10.0, action=np.zeros((9, 2), np.float32))]
    monkeypatch.setattr(source, "episodes", lambda shard: iter(rotten))
    with pytest.raises(ValueError, match="test:passing: none of its clips can be read: .* 0.tar, frame"):
        clips(source, 0.001).draw(1)


def test_an_episode_of_a_higher_rate_than_the_first_is_named_where_actions_would_not_fit(monkeypatch):
    source = Passing(num_shards=1, lengths=(40, 40))
    slow, fast = source.episodes(0)
    fast.fps = 20.0
    monkeypatch.setattr(source, "episodes", lambda shard: iter([slow, fast]))
    with pytest.raises(
        ValueError, match="0.tar, 1: 20 fps make 10 actions of 0.5 s, the 10 fps .* 5; make a source with hlrp.shards"
    ):
        clips(source, 0.001).draw(50)
    source.skip_broken = True
    batch = next(iter(loader(Mixture([clips(source, 0.001)]), 50)))
    assert batch["action"].shape == (50, 5, 2) and all(place == 0 for _, place, _ in shown(batch))


def test_what_a_stream_cannot_give_names_what_fits():
    source = Passing(lengths=(3, 4))
    with pytest.raises(ValueError, match="none of its episodes .* lasts 0.5 s"):
        clips(source).draw(1)
    with pytest.raises(ValueError, match="stream, for which latent_space .* hlrp.shards"):
        clips(source, latent_space={})
    with pytest.raises(ValueError, match="an episode without frames"):
        Episode("a.tar, 0", [], 10.0)
    with pytest.raises(ValueError, match="2 frames, but action has 3 rows"):
        Episode("a.tar, 0", [b"", b""], 10.0, action=np.zeros((3, 2), np.float32))
