import errno
import gzip
import io
import json
import logging
import os
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from safetensors.numpy import load_file
from torchvision.io import encode_jpeg, encode_png
from toys import numbers, write_video

from hlrp import idle, shards
from hlrp.clips import Clips
from hlrp.contract import EpisodeRange, Stream
from hlrp.data import Mixture, collate
from hlrp.images import decode, fit
from hlrp.label import write_dataset
from hlrp.lerobot_data import LeRobotData
from hlrp.shard_data import Shards, ShardStream, is_indexed
from hlrp.shard_index import SUFFIX, read_index, row_of, to_safetensors
from hlrp.shards import Args, main, record, view_of
from hlrp.sources import instructions, open_source
from hlrp.streams import Episode, InMemory, VideoFrames, clips_of, open_in_memory
from hlrp.tars import END, array_bytes, member_bytes, read_members
from hlrp.world import World

WORLD = "world:default?episodes=12&seed=3"
LABELLED = {"num_tokens": 2, "delta": 0.5, "camera": "", "source": "test"}


@pytest.fixture(scope="session")
def world():
    return open_source(WORLD)


@pytest.fixture(scope="session")
def png(tmp_path_factory):
    """The world as three shards, lossless."""
    folder = tmp_path_factory.mktemp("png")
    write(folder)
    return folder


def write(folder, *data, codec="png", frames_per_shard=80, **settings):
    return main(Args(folder, data or (WORLD,), codec=codec, frames_per_shard=frames_per_shard, **settings))


def copied(folder, target):
    """A copy to damage."""
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)
        else:
            assert found[key] == value


def assert_same_source(found, expected, episodes=None):
    for number, episode in enumerate(range(len(expected.lengths)) if episodes is None else episodes):
        indices = np.random.default_rng(episode).permutation(int(expected.lengths[episode]))
        assert_equal(found.read(number, indices), expected.read(episode, indices))
        assert torch.equal(found.actions(number, indices), expected.actions(episode, indices))
        assert torch.equal(found.states(number, indices), expected.states(episode, indices))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def member(tar, suffix, number=0):
    """A member of a TAR whose name ends so."""
    with open(tar, "rb") as file:
        return [m for m in read_members(file, str(tar)) if m.name.endswith(suffix)][number]


def jpeg(seed=0, size=(24, 32)):
    image = np.random.default_rng(seed).integers(0, 256, (3, 4, 4)).repeat(size[0] // 4, 1).repeat(size[1] // 4, 2)
    return encode_jpeg(torch.from_numpy(image.astype(np.uint8))).numpy().tobytes()


def plain_tar(path, *samples):
    """Written by webdataset itself."""
    with wds.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def raw_tar(path, members):
    path.write_bytes(b"".join(member_bytes(name, data) for name, data in members.items()) + END)
    return path


def plain_sample(key="a/e0", num_frames=3, fps=10.0, task="open the door"):
    frames = {f"{i}.jpg": jpeg(i) for i in range(num_frames)}
    action = np.arange(2 * num_frames, dtype=np.float64).reshape(num_frames, 2)
    return {"__key__": key, "json": {"fps": fps, "instruction": task}, "action.npy": action} | frames


def test_shards_hold_what_the_source_gives(world, png):
    source = Shards(png)
    assert is_indexed(str(png)) and len(source.shards) == 3
    assert source.lengths.tolist() == world.lengths.tolist() and source.fps.tolist() == world.fps.tolist()
    assert (source.state_dim, source.action_dim, source.camera) == (2, 2, "")
    assert_same_source(source, world)
    assert Shards(png / "{000000..000002}.tar").fingerprint == source.fingerprint
    assert Shards(png / "000001.tar").fingerprint != source.fingerprint


def test_an_index_is_a_safetensors_file_with_the_statistics_of_its_tar(world, png):
    tables = load_file(png / "000000.index")
    assert tables["frames"].shape == (tables["lengths"].sum(), 16)
    actions = torch.cat([world.actions(e, range(n)) for e, n in enumerate(world.lengths)]).double().numpy()
    found = Shards(png).statistics("action")
    for name, expected in {"mean": actions.mean(0), "std": actions.std(0), "max": actions.max(0)}.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-9)
    assert found["count"].tolist() == [len(actions)] * 2
    np.testing.assert_allclose(found["q99"], np.quantile(actions, 0.99, axis=0), atol=0.3)


@pytest.mark.parametrize(("codec", "tolerance"), [("jpeg", 6), ("yuv420", 6)])
def test_lossy_frames_are_near_and_the_bytes_as_they_lie_decode_to_them(tmp_path, world, codec, tolerance):
    write(tmp_path, codec=codec, quality=95)
    source = Shards(tmp_path)
    found, expected = source.read(5, [3, 0])["frames"], world.read(5, [3, 0])["frames"]
    assert (found.float() - expected).abs().mean() < tolerance
    assert torch.equal(found, torch.stack([decode(data, "") for data in source.encoded(5, [3, 0])]))


@pytest.mark.parametrize("codec", ["jpeg", "png", "yuv420"])
def test_webdataset_reads_the_same(tmp_path, codec):
    write(tmp_path, codec=codec)
    source, number = Shards(tmp_path), 0
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    for sample in wds.WebDataset(urls, shardshuffle=False).decode("rgb8"):
        frames = [sample[key] for key in sorted(sample) if key.endswith((".jpg", ".png", ".yuv.npy"))]
        if codec == "yuv420":
            frames = [decode(array_bytes(planes), "").permute(1, 2, 0).numpy() for planes in frames]
        read = source.read(number, range(len(frames)))
        shown = read["frames"].permute(0, 2, 3, 1).numpy()
        assert np.abs(np.stack(frames).astype(int) - shown).max() <= (1 if codec == "jpeg" else 0)
        assert (
            sample["json"]["task"] == source.instructions(number, [0])[0]
            and sample["json"]["dataset"] == "world-default"
        )
        assert np.array_equal(sample["action.npy"], source.actions(number, range(len(frames))))
        assert np.array_equal(sample["state.npy"], read["state"])
        np.testing.assert_allclose(sample["timestamp.npy"], np.arange(len(frames)) / 10)
        number += 1
    assert number == len(source.lengths)


def test_what_webdataset_wrote_is_streamed_and_with_indexes_read_at_random(tmp_path):
    samples = [plain_sample(f"a/e{i}", 12, task=f"task {i}") for i in range(3)]
    plain_tar(tmp_path / "x0.tar", *samples[:2])
    plain_tar(tmp_path / "x1.tar", samples[2])
    assert not is_indexed(str(tmp_path))
    stream = ShardStream(tmp_path)
    assert (stream.num_shards, stream.action_dim, stream.state_dim, stream.fps) == (2, 2, 0, 10.0)
    episodes = [episode for shard in range(2) for episode in stream.episodes(shard)]
    main(Args(tmp_path, index=True))
    source = Shards(tmp_path)
    for number, (episode, sample) in enumerate(zip(episodes, samples, strict=True)):
        order = [11, 0, 10, 2]  # by number: "10.jpg" comes after "9.jpg"
        expected = torch.stack([decode(sample[f"{i}.jpg"], "") for i in order])
        for read in (episode.read(order), source.read(number, order)):
            assert torch.equal(read["frames"], expected)
        assert episode.instructions(order) == source.instructions(number, order) == [f"task {number}"] * 4
        actions = torch.from_numpy(sample["action.npy"][order]).float()
        assert torch.equal(episode.actions(order), actions)
        assert torch.equal(source.actions(number, order), actions)
    assert main(Args(tmp_path, verify=True)) == 0


@pytest.mark.parametrize(
    "url", ["pipe:cat {folder}/{{a,b}}.tar", "pipe:gzip -c {folder}/{{a,b}}.tar", "file:{folder}/{{a,b}}.tar"]
)
def test_urls_are_streamed(tmp_path, url):
    for name in "ab":
        plain_tar(tmp_path / f"{name}.tar", plain_sample(f"{name}0", task=name))
    stream = ShardStream(url.format(folder=tmp_path))
    assert not is_indexed(stream.urls[0])
    assert [episode.task for shard in range(2) for episode in stream.episodes(shard)] == ["a", "b"]


def test_a_command_that_fails_is_an_error(tmp_path):
    plain_tar(tmp_path / "a.tar", plain_sample())
    with pytest.raises(ValueError, match=r"pipe:cat .*a.tar; exit 3.* exit 3"):
        list(ShardStream(f"pipe:cat {tmp_path}/a.tar; exit 3").episodes(0))


def test_the_fingerprint_of_a_stream_is_of_its_bytes_and_not_of_their_place(tmp_path):
    samples = [plain_sample("a"), plain_sample("b")]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        plain_tar(tmp_path / folder / "0.tar", *samples)
    shutil.copy(tmp_path / "one/0.tar", tmp_path / "two/0.tar")
    one, two = (ShardStream(tmp_path / folder) for folder in ("one", "two"))
    assert one.fingerprint == two.fingerprint and one.name != two.name
    clips = [clips_of(stream, EpisodeRange(0, 0.0, 1.0), (0.0, 0.1), 16, name=stream.name) for stream in (one, two)]
    assert clips[0].fingerprint == clips[1].fingerprint
    samples[1]["action.npy"][0] += 1  # behind the first sample, of equal size
    plain_tar(tmp_path / "two/0.tar", *samples)
    assert ShardStream(tmp_path / "two").fingerprint != one.fingerprint


def test_a_frame_rate_is_by_json_by_time_stamps_or_by_option(tmp_path):
    sample = plain_sample()
    sample["timestamp.npy"] = np.arange(3) / 4
    assert ShardStream(plain_tar(tmp_path / "a.tar", sample), fps=7.0).fps == 10
    del sample["json"]
    assert ShardStream(plain_tar(tmp_path / "a.tar", sample), fps=7.0).fps == 4
    for times in ([0.0, 0.1, 1.0], [0.0, np.nan, 0.2], [0.0, 0.1, np.nan]):
        sample["timestamp.npy"] = np.array(times)
        with pytest.raises(ValueError, match=r"a.tar: a/e0.timestamp.npy: not the times of a regular"):
            ShardStream(plain_tar(tmp_path / "a.tar", sample), fps=7.0)
    del sample["timestamp.npy"]
    assert ShardStream(plain_tar(tmp_path / "a.tar", sample), fps=7.0).fps == 7
    with pytest.raises(ValueError, match=r"a.tar: a/e0.json: without a frame rate; .*\?fps="):
        ShardStream(tmp_path / "a.tar")


def test_an_instruction_is_by_json_or_text_and_may_be_missing(tmp_path):
    named, text, missing, empty = map(plain_sample, "abcd")
    text["json"] = missing["json"] = empty["json"] = {"fps": 5}
    text["txt"], empty["txt"] = "close it\n", ""
    plain_tar(tmp_path / "a.tar", named, text, missing, empty)
    tasks = [episode.task for episode in ShardStream(tmp_path).episodes(0)]
    main(Args(tmp_path, index=True))
    source = Shards(tmp_path)
    found = [source.instructions(e, [0])[0] for e in range(4)]
    assert tasks == found == ["open the door", "close it", "", ""]


def test_idle_scores_cached_labels_and_facts_stay(tmp_path, world, monkeypatch):
    class Labelled(World):
        def __init__(self):
            self.__dict__.update(vars(world))
            self.latent_space, self.camera = LABELLED, "top"

        def labels(self, episode, indices):
            vectors = torch.tensor([[episode, i, 0.5] for i in indices], dtype=torch.float32)
            return {"latent_vectors": vectors, "latent_indices": vectors.long()[:, :2]}

    monkeypatch.setattr(shards, "opened", lambda *_: Labelled())
    monkeypatch.setattr(shards, "opened", lambda *_: Labelled())
    write(tmp_path, idle_span=0.2, codec="jpeg")
    source = Shards(tmp_path)
    assert source.latent_space == LABELLED and source.camera == "top"
    assert_equal(source.labels(4, [5, 2]), Labelled().labels(4, [5, 2]))
    expected = [idle.episode_scores(world, e, 0.2) for e in range(12)]
    for name, scores in source.idle_scores(0.2).items():
        np.testing.assert_allclose(scores, np.concatenate([part[name] for part in expected]))
    assert source.idle_scores(0.3) is None


def test_fewer_frames_are_those_nearest_to_the_grid(tmp_path, world):
    with pytest.raises(ValueError, match=r"world:.*, episode 0: fps=4, .*--drop-actions"):
        write(tmp_path, fps=4.0)
    with pytest.raises(ValueError, match="fps=20; expected at most the 10 fps"):
        write(tmp_path, fps=20.0)
    assert not list(tmp_path.iterdir())
    write(tmp_path, fps=4.0, drop_actions=True)
    source = Shards(tmp_path)
    assert source.action_dim == 0 and source.state_dim == 2 and set(source.fps) == {4.0}
    for episode in range(12):
        kept = np.rint(np.arange(source.lengths[episode]) * 2.5).astype(int)
        assert world.lengths[episode] - 2.5 <= kept[-1] + 0.5 <= world.lengths[episode]
        assert_equal(source.read(episode, range(len(kept))), world.read(episode, kept))


def test_frames_are_letterboxed_where_asked_for_and_batches_mix_sizes(tmp_path, world, png):
    write(tmp_path / "small", image_size=32)
    assert Shards(tmp_path / "small").read(0, [0])["frames"].shape == (1, 3, 32, 32)
    wide = plain_sample("w", 9)
    plain_tar(tmp_path / "wide.tar", wide, plain_sample("n", 9) | {f"{i}.jpg": jpeg(i, (40, 20)) for i in range(9)})
    main(Args(tmp_path, index=True))
    sources = [Shards(png), Shards(tmp_path)]
    clips = [Clips(s, range(len(s.lengths)), (0.0, 0.5), image_size=48, source_index=i) for i, s in enumerate(sources)]
    samples = Mixture(clips).__getitems__(range(32))
    expected = []
    for sample in samples:
        indices = [sample["index"], sample["index"] + round(sample["fps"] / 2)]
        expected.append(fit(sources[sample["source"]].read(sample["episode"], indices)["frames"], 48))
    assert torch.equal(collate(samples)["frames"], torch.stack(expected))


@pytest.mark.parametrize("image_size", [64, 48])
def test_a_batch_is_decoded_into_one_memory_and_not_copied(png, world, image_size):
    samples = Clips(Shards(png), range(12), (0.0, 0.5), image_size).__getitems__([120, 3, 90, 4, 4])
    first, frames = samples[0]["frames"], collate(samples)["frames"]
    assert frames.data_ptr() == first.data_ptr()
    for sample, found in zip(samples, frames, strict=True):
        indices = [sample["index"], sample["index"] + round(sample["fps"] / 2)]
        assert torch.equal(found, fit(world.read(sample["episode"], indices)["frames"], image_size))


def test_a_broken_image_of_a_batch_is_named(tmp_path):
    samples = [plain_sample(key, 9) for key in ("a", "b")]
    samples[1]["7.jpg"] = samples[1]["7.jpg"][:40]
    plain_tar(tmp_path / "0.tar", *samples)
    main(Args(tmp_path, index=True))
    source = Shards(tmp_path)
    clips = Clips(source, range(2), (0.0, 0.2), image_size=32)
    assert clips.offsets[0].tolist() == [0, 2]
    clips.__getitems__([0, 7, 6])
    with pytest.raises(ValueError, match=r"episode 1: .*0.tar, episode 1 in it, frame 7: not a readable image"):
        clips.__getitems__([0, 7, 12, 6])


def test_data_sets_lie_side_by_side_and_are_picked_by_name(tmp_path, world):
    write(tmp_path, WORLD, "world:human?episodes=5", frames_per_shard=100)
    with pytest.raises(ValueError, match=r"world-default .* world-human .*\?dataset=NAME"):
        Shards(tmp_path)
    with pytest.raises(ValueError, match="dataset=kitchen; expected one of world-default, world-human"):
        Shards(tmp_path, dataset="kitchen")
    assert_same_source(Shards(tmp_path, dataset="world-default"), world)
    human = Shards(tmp_path, dataset="world-human")
    assert (len(human.lengths), human.action_dim, human.name) == (5, 0, f"shards-{tmp_path.name}-world-human")


def test_two_parts_and_two_processes_write_what_one_writes(tmp_path, png):
    for part in (1, 0):
        write(tmp_path, part=part, num_parts=2, num_processes=2 if part == 0 else 1)
    assert contents(tmp_path) == contents(png)


def test_a_job_array_sets_the_part(monkeypatch):
    for name, value in {"ID": 14, "MIN": 10, "STEP": 2, "COUNT": 5}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    args = Args(Path("out"))
    assert (args.part, args.num_parts) == (2, 5)


def test_after_a_kill_the_same_command_finishes_and_touches_nothing_finished(tmp_path):
    settings = {"codec": "jpeg", "frames_per_shard": 20}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write(whole, **settings)
    process = get_context("fork").Process(target=write, args=(killed,), kwargs=settings)
    process.start()
    while len(list(killed.glob("*.index"))) < 2:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("*.index")}
    assert len(finished) < len(list(whole.glob("*.index")))
    (killed / "000005.tar.partial").write_bytes(b"half a shard")
    write(killed, **settings)
    assert contents(killed) == contents(whole)
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items())


def test_other_settings_are_refused_by_name(tmp_path, png):
    folder = copied(png, tmp_path / "copy")
    with pytest.raises(ValueError, match="shards.json: made with codec=png, but now codec=jpeg"):
        write(folder, codec="jpeg")
    with pytest.raises(ValueError, match="made with data="):
        write(folder, "world:clean?episodes=12")
    (folder / "shards.json").unlink()
    with pytest.raises(ValueError, match="has 000000.tar, but no shards.json"):
        write(folder)


@pytest.mark.parametrize("setting", [{"quality": 0}, {"part": 2}, {"frames_per_shard": 0}, {"fps": -1.0}])
def test_settings_that_no_shards_can_have_are_refused(tmp_path, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}="):
        write(tmp_path, **setting)


@pytest.mark.parametrize("ending", [".tar.partial", ".index.partial"])
def test_a_full_disk_leaves_no_half_file_and_is_named(tmp_path, monkeypatch, ending):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        def write(self, data):
            return super().write(data) if self.tell() < 100_000 else full()

    if ending == ".tar.partial":
        monkeypatch.setattr(shards, "open", lambda path, mode: io.BufferedWriter(Full(path, mode)), raising=False)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
    name = f"000000{ending.removesuffix('.partial')}"
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/{name}'"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shards.json"]
    monkeypatch.undo()
    write(tmp_path)
    assert main(Args(tmp_path, verify=True)) == 0


class Passing(Stream):
    """A stream of two shards of JPEG episodes, one of them broken."""

    uri, name, camera, fingerprint, fps = "test:passing", "passing", "", "passing", 10.0
    num_shards, action_dim, state_dim, broken = 2, 0, 0, b""

    def episodes(self, shard):
        return map(self.episode, [(shard, i) for i in range(3)])

    def episode(self, place):
        frames = [jpeg(10 * place[0] + place[1] + i) for i in range(4)]
        frames[2] = self.broken or frames[2] if place == (1, 1) else frames[2]
        return Episode(f"{place[0]}.tfrecord, {place[1]}", frames, self.fps, "push", facts={"success": True})


@pytest.fixture
def passing(monkeypatch):
    source = Passing()
    monkeypatch.setattr(shards, "opened", lambda *_: source)
    monkeypatch.setattr(shards, "opened", lambda *_: source)
    return source


def test_the_bytes_of_a_stream_are_copied_where_size_and_codec_stay(tmp_path, passing):
    write(tmp_path / "copied", codec="jpeg", quality=10)
    source = Shards(tmp_path / "copied")
    assert [len(index.lengths) for index in source.shards] == [3, 3]
    assert source.encoded(4, range(4)) == passing.episode((1, 1)).frames
    assert source.instructions(4, [0]) == ["push"] and source.read(4, [0])["success"] is True
    write(tmp_path / "small", codec="jpeg", image_size=16)
    assert Shards(tmp_path / "small").read(4, [1])["frames"].shape == (1, 3, 16, 16)


def test_an_episode_that_cannot_be_read_is_named_or_left_out_and_listed_up_to_a_limit(tmp_path, passing, caplog):
    passing.broken = b"no image"
    with pytest.raises(
        ValueError, match="episode 1: 1.tfrecord, 1, frame 2: not a readable image: it begins with b'no image'"
    ):
        write(tmp_path, codec="jpeg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.index", "000000.tar", "shards.json"]
    with pytest.raises(ValueError, match="1 episodes cannot be read; max_broken=0"):
        write(tmp_path, codec="jpeg", skip_broken=True, max_broken=0)
    write(tmp_path, codec="jpeg", skip_broken=True)
    index = read_index(tmp_path / "000001.index")
    assert len(index.lengths) == 2 and "frame 2" in index.facts["skipped"]["1"]
    assert "episode 1: 1.tfrecord, 1, frame 2" in caplog.text


def faulty(sample, **members):
    return sample | {name.replace("__", "."): data for name, data in members.items()}


def objects():
    file = io.BytesIO()
    np.save(file, np.array([{}, 1, 2], dtype=object), allow_pickle=True)
    return file.getvalue()


FOREIGN_FAULTS = [
    (faulty(plain_sample(), meta__pyd={"a": 1}), "a/e0.meta.pyd is a pickle"),
    (faulty(plain_sample(), x__pth=b"weights"), "a/e0.x.pth is a pickle"),
    (faulty(plain_sample(), x__npy=objects()), "a/e0.x.npy: .* Python objects, a pickle"),
    (faulty(plain_sample(), wav=b"sound"), r"a/e0.wav is no part of an episode; \?ignore=wav"),
    (plain_sample(num_frames=0), "a/e0: an episode without frames"),
    (faulty(plain_sample(), state__npy=np.zeros((4, 2))), r"a/e0.state.npy: of shape \(4, 2\), .* 3 frames"),
    (faulty(plain_sample(), **{"0.left__jpg": jpeg()}), r"a/e0: images of several kinds, #.jpg, #.left.jpg"),
    (faulty(plain_sample(), json={"fps": "fast"}), "a/e0.json: fps='fast'"),
    (faulty(plain_sample(), json=[1]), "a/e0.json: a JSON list"),
    (faulty(plain_sample(), json=b"{"), "a/e0.json: not readable as JSON"),
    (faulty(plain_sample(), json={"fps": 5, "facts": None}), "a/e0.json: facts=None; expected an object"),
    (faulty(plain_sample(), json={"fps": 5, "facts": {"fps": 9}}), "a/e0.json: facts has fps, which a sample has"),
    (faulty(plain_sample(), index__npy=np.zeros(3)), "a/e0.index.npy: a sample has its own index"),
    (faulty(plain_sample(), x__npy=array_bytes(np.zeros(3))[:-1]), "a/e0.x.npy: not a readable NPY array"),
]


@pytest.mark.parametrize(("sample", "message"), FOREIGN_FAULTS, ids=[message for _, message in FOREIGN_FAULTS])
def test_what_is_no_episode_is_refused_with_file_and_member(tmp_path, sample, message):
    tar = raw_tar(
        tmp_path / "a.tar",
        {
            f"{sample['__key__']}.{name}": data
            if isinstance(data, bytes)
            else array_bytes(data)
            if isinstance(data, np.ndarray)
            else json.dumps(data).encode()
            for name, data in sample.items()
            if name != "__key__"
        },
    )
    with pytest.raises(ValueError, match=f"{tar}: {message}"):
        list(ShardStream(tar).episodes(0))
    with pytest.raises(ValueError, match=f"{tar}: {message}"):
        main(Args(tmp_path, index=True))
    assert not tar.with_suffix(SUFFIX).exists()


def video_sample(tmp_path, key, num_frames=20, fps=10, suffix="mp4", **members):
    """As video2dataset writes it."""
    path = write_video(tmp_path / f"{key}.{suffix}", fps=fps, num_frames=num_frames)
    known = {"caption": f"caption {key}", "url": "https://", "clips": [[0.0, 2.0]], "status": "success"}
    return {"__key__": key, suffix: path.read_bytes(), "txt": f"text {key}", "json": known} | members


@pytest.mark.parametrize("packed", [False, True])
def test_videos_in_tars_are_streamed_and_written_as_shards(tmp_path, packed):
    samples = [video_sample(tmp_path, f"0000{i}", 20 + i, 10 * (1 + i % 2)) for i in range(3)]
    samples[2]["json"] = {"facts": {"room": "kitchen"}}
    samples[2]["action.npy"] = np.arange(44, dtype=np.float32).reshape(22, 2)
    samples[1]["action.npy"] = samples[0]["action.npy"] = np.zeros((20, 2), dtype=np.float32)
    samples[1]["action.npy"] = np.zeros((21, 2), dtype=np.float32)
    tar = plain_tar(tmp_path / "a.tar", *samples)
    if packed:
        (tmp_path / "a.tgz").write_bytes(gzip.compress(tar.read_bytes()))
        tar.unlink()
    stream = open_source(f"shards:{tmp_path}")
    assert isinstance(stream, ShardStream) and stream.num_shards == 1 and stream.action_dim == 2
    episodes = list(stream.episodes(0))
    assert [len(e.frames) for e in episodes] == [20, 21, 22] and [e.fps for e in episodes] == [10, 20, 10]
    assert [e.task for e in episodes] == ["caption 00000", "caption 00001", "text 00002"]
    for episode in episodes:
        assert numbers(episode.read([7, 3, 3, 19])["frames"]) == [7, 3, 3, 19]
        assert numbers(decode(episode.frames[5], "a")[None]) == [5] and episode.size < 20000
    assert episodes[2].facts == {"room": "kitchen"} and episodes[2].actions([3]).tolist() == [[6, 7]]
    held = InMemory(stream, episodes, [0, 1, 2])
    held.forget_all_but({1: {4, 9}})
    assert numbers(held.read(1, [9, 4])["frames"]) == [9, 4]

    write(tmp_path / "shards", f"shards:{tmp_path}", codec="png")
    written = open_source(f"shards:{tmp_path / 'shards'}")
    for number, episode in enumerate(stream.episodes(0)):
        found, expected = written.read(number, [0, 12]), episode.read([0, 12])
        assert torch.equal(found["frames"], expected["frames"]) and found["task"] == expected["task"]
        assert written.fps[number] == episode.fps
    with pytest.raises(
        ValueError, match="a.tgz: compressed" if packed else "00000 is a video, which is streamed; .*hlrp"
    ):
        main(Args(tmp_path, index=True))


def test_a_video_in_a_tar_that_cannot_be_read_names_its_member(tmp_path):
    good = video_sample(tmp_path, "good")
    broken = good | {"__key__": "broken", "mp4": good["mp4"][:2000]}
    for sample, message in [
        (broken, "a.tar: broken.mp4: not a readable video: .*is it cut off"),
        (good | {"jpg": jpeg()}, "a.tar: good: expected images or one video, got .*ignore=mp4 leaves it out"),
        (good | {"webm": b""}, "a.tar: good: expected images or one video, got"),
        (good | {"action.npy": np.zeros((19, 2))}, r"a.tar: good.action.npy: of shape \(19, 2\), .* has 20 frames"),
    ]:
        stream = plain_tar(tmp_path / "a.tar", sample)
        with pytest.raises(ValueError, match=message) as caught:
            open_source(f"shards:{stream}")
        assert "/proc/" not in str(caught.value)
    frames = VideoFrames(good["mp4"], "a.tar: good.mp4")
    frames.data = good["mp4"][:2000] + bytes(len(good["mp4"]) - 2000)
    open_in_memory.cache_clear()
    with pytest.raises(ValueError, match="a.tar: good.mp4: not a readable video"):
        frames.decoded([3])


def test_webp_images_are_frames(tmp_path):
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 32, 3)).astype(np.uint8)) for i in range(3)
    ]
    members = {}
    for i, image in enumerate(images):
        file = io.BytesIO()
        image.save(file, "WEBP", lossless=True)
        members[f"{i}.webp"] = file.getvalue()
    plain_tar(tmp_path / "a.tar", {"__key__": "e", "json": {"fps": 10}} | members)
    main(Args(tmp_path, index=True))
    source = open_source(f"shards:{tmp_path}")
    assert isinstance(source, Shards)
    for i, frame in zip((2, 0), source.read(0, [2, 0])["frames"], strict=True):
        assert np.array_equal(frame.permute(1, 2, 0), images[i])


def test_members_are_ignored_where_asked_for(tmp_path):
    plain_tar(tmp_path / "a.tar", faulty(plain_sample(), wav=b"sound"))
    assert len(list(ShardStream(tmp_path, ignore="mp3,wav").episodes(0))) == 1
    main(Args(tmp_path, index=True, ignore=("wav",)))
    assert main(Args(tmp_path, verify=True)) == 0


def test_a_tar_that_ends_early_or_is_broken_is_never_taken_for_whole(tmp_path):
    frames = {f"{i}.jpg": jpeg(i) for i in range(3)}
    members = {f"{key}.{name}": data for key in ("e0", "e1") for name, data in ({"json": b"{}"} | frames).items()}
    tar = raw_tar(tmp_path / "a.tar", members)
    data, second = tar.read_bytes(), member(tar, "e1.json").start - 512
    for name, content, message in [
        ("half", data[: second + 100], "half.tar: cut off at byte"),
        ("between", data[:second], "between.tar: cut off at byte"),
        ("inside", data[: second - 700], "inside.tar: cut off in e0.2.jpg, at byte"),
        (
            "garbage",
            data[:second] + b"x" * 512 + data[second + 512 :],
            f"garbage.tar: not a readable TAR at byte {second}",
        ),
        ("two", data + data, "two.tar: goes on past the end of the TAR, at byte"),
        ("zeros", bytes(10240), "zeros.tar: no episode in it"),
        ("empty", b"", "empty.tar: not a readable TAR at byte 0"),
        ("letter", b"Dear reader, " * 100, "letter.tar: not a readable TAR at byte 0"),
    ]:
        path = tmp_path / name / f"{name}.tar"
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(ShardStream(path, fps=10.0).episodes(0))
        with pytest.raises(ValueError, match=message):
            main(Args(path.parent, index=True, fps=10.0))


def damage(folder, name):
    """What a fault does to a copy of the shards, and what the error says."""
    tar, index = folder / "000001.tar", folder / "000001.index"
    key = member(tar, ".json").name.removesuffix(".json")
    if name == "truncated":
        os.truncate(tar, tar.stat().st_size - 3000)
        return "000001.tar: .* is it cut off"
    if name == "truncated index":
        os.truncate(index, index.stat().st_size - 5)
        return "000001.index: .* is it cut off"
    if name == "no index":
        index.unlink()
        return "000001.tar: no 000001.index beside it"
    if name == "no tar":
        tar.unlink()
        index.unlink()
        return "000001.tar is not there yet"
    if name in ("json", "state.npy", "action.npy", "000007.png"):
        place = member(tar, f"{key}.{name}")
        flip(tar, place.start + len(place.data) // 2)
        return f"000001.tar: {key}.{name}: checksum differs"
    found = read_index(index)
    if name == "header":
        flip(index, 300)
        return "000001.index: the checksum of its header differs"
    flip(index, found.tables[name].start + 3)
    if name in ("lengths", "fps"):
        return f"000001.index: the checksum of its table {name} differs"
    return f"000001.index: (its row of .* points to no place in|the checksum of its table {name} differs)"


FAULTS = ["truncated", "truncated index", "no index", "no tar", "json", "state.npy", "action.npy", "000007.png"]
FAULTS += ["header", "lengths", "fps", "members", "frames"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_that_names_file_and_member(tmp_path, png, world, fault, capsys, caplog):
    folder = copied(png, tmp_path / "copy")
    message = damage(folder, fault)

    def read_all():
        source = Shards(folder)
        for episode, length in enumerate(source.lengths):
            source.read(episode, range(length))
            source.actions(episode, range(length))

    with pytest.raises(ValueError, match=message):
        read_all()
    assert main(Args(folder, verify=True)) == 1
    assert "000001" in capsys.readouterr().out
    if fault in ("truncated", "truncated index", "no index", "no tar", "header", "lengths", "fps"):
        with caplog.at_level(logging.WARNING):
            source = Shards(folder, skip_broken=True)
        assert source.num_skipped == 1 and "skipped shards:" in caplog.text and "000001" in caplog.text
        left_out = len(read_index(png / "000001.index").lengths)
        first = len(read_index(png / "000000.index").lengths)
        kept = [e for e in range(12) if not first <= e < first + left_out]
        assert_same_source(source, world, kept)


def test_verify_names_every_damaged_member(tmp_path, png, capsys):
    folder = copied(png, tmp_path / "copy")
    assert main(Args(folder, verify=True)) == 0
    names = []
    for tar in sorted(folder.glob("*.tar")):
        place = member(tar, ".png", 4)
        flip(tar, place.start + 50)
        names.append(f"{tar}: {place.name}: checksum differs")
    assert main(Args(folder, verify=True)) == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and printed.count("checksum of the whole file") == 3


def test_a_tar_whose_structure_is_not_that_of_its_index_is_found(tmp_path, png, capsys):
    folder = copied(png, tmp_path / "copy")
    flip(folder / "000000.tar", member(folder / "000000.tar", ".png", 3).start - 512 + 3)  # a name
    assert main(Args(folder, verify=True)) == 1
    assert "000000.tar: not a readable TAR at byte" in capsys.readouterr().out


def test_frames_outside_an_episode_are_not_those_of_its_neighbour(png):
    source = Shards(png)
    for index in (-1, int(source.lengths[3])):
        with pytest.raises(ValueError, match=r"\.tar, episode \d in it: expected frames"):
            source.read(3, [0, index])


def test_a_file_that_breaks_under_the_reader_is_named(tmp_path, png):
    folder = copied(png, tmp_path / "copy")
    source = Shards(folder)
    os.truncate(folder / "000000.tar", 2048)
    with pytest.raises(ValueError, match=r"000000.tar: it has no byte \d+; is it cut off"):
        source.read(2, [0, 4])


def test_five_hundred_corruptions_never_give_a_wrong_pixel(tmp_path):
    """Flips, cuts and spans of zeros, in TARs and indexes: each read is exact, or an error that names a file."""
    folder = tmp_path / "fuzz"
    write(folder, "world:clean?episodes=3&seed=1", frames_per_shard=30, codec="png", image_size=16)
    expected = Shards(folder)

    def everything(source):
        for episode in range(len(expected.lengths)):
            indices = range(0, int(expected.lengths[episode]), 5)
            read = source.read(episode, indices)
            yield read | {"action": source.actions(episode, indices), "fps": float(source.fps[episode])}

    originals = contents(folder)
    truth = list(everything(expected))
    files = sorted(name for name in originals if name.endswith((".tar", ".index")))
    rng, num_errors = np.random.default_rng(0), 0
    for trial in range(500):
        name = files[trial % len(files)]
        data = bytearray(originals[name])
        position, kind = int(rng.integers(len(data))), rng.choice(["flip", "cut", "zero"], p=[0.6, 0.1, 0.3])
        if kind == "flip":
            data[position] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del data[position:]
        else:
            end = min(position + int(rng.integers(1, 600)), len(data))
            data[position:end] = bytes(end - position)
        (folder / name).write_bytes(data)
        try:
            source = Shards(folder)
            assert source.lengths.tolist() == expected.lengths.tolist()
            for found, right in zip(everything(source), truth, strict=True):
                assert_equal(found, right)
        except ValueError as error:
            assert name in str(error), (name, kind, str(error))
            num_errors += 1
        (folder / name).write_bytes(originals[name])
    assert num_errors > 250


def test_a_stream_of_corrupted_bytes_raises_nothing_but_errors_that_name_the_file(tmp_path):
    original = plain_tar(tmp_path / "a.tar", plain_sample("e0"), plain_sample("e1")).read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(200):
        data = bytearray(original)
        for position in rng.integers(len(data), size=3):
            data[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.tar").write_bytes(data[: rng.integers(1, 2 * len(data))])
        try:
            for episode in ShardStream(tmp_path / "a.tar").episodes(0):
                episode.read(range(len(episode.frames)))
        except ValueError as error:
            assert "a.tar" in str(error)


def test_a_png_member_and_a_plain_image_decode(tmp_path):
    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    sample = {"__key__": "one", "png": encode_png(image).numpy().tobytes()}
    (episode,) = ShardStream(plain_tar(tmp_path / "a.tar", sample), fps=1.0).episodes(0)
    assert torch.equal(episode.read([0])["frames"][0], image)
    main(Args(tmp_path, index=True, fps=1.0))
    assert torch.equal(Shards(tmp_path).read(0, [0])["frames"][0], image)


def test_of_16_bits_the_upper_ones_are_shown():
    file = io.BytesIO()
    Image.fromarray(np.array([[0x1280, 0xFF00]], dtype=np.uint16)).save(file, "PNG")
    assert decode(file.getvalue(), "").tolist() == [[[0x12, 0xFF]]] * 3


def test_an_index_of_another_format_is_refused(tmp_path, png):
    folder = copied(png, tmp_path / "copy")
    tables = {"lengths": np.ones(1, dtype=np.int64), "fps": np.ones(1)}
    (folder / "000001.index").write_bytes(to_safetensors(tables, {"format": 99}))
    with pytest.raises(ValueError, match="000001.index: expected format 1, .* got 99"):
        Shards(folder)
    assert row_of(member(folder / "000000.tar", ".json"))[1] > 0


def test_the_task_of_each_frame_survives_shards_streams_and_what_a_labelled_dataset_is_written_from(tmp_path):
    tasks = ["", "lift", "lift", "put", "put", "put", "lift"]
    episode = Episode("e", [jpeg(i) for i in range(7)], 10.0, tasks)
    held = InMemory(
        SimpleNamespace(uri="u", name="n", camera="", fingerprint="f", state_dim=0, action_dim=0, crop=False),
        [episode],
        [0],
    )
    members, _ = record(held, 0, view_of(held, 0), Args(tmp_path))
    assert json.loads(members["json"])["task_changes"] == [[0, ""], [1, "lift"], [3, "put"], [6, "lift"]]
    with open(tmp_path / "0.tar", "wb") as tar:
        tar.write(b"".join(member_bytes(f"a.{suffix}", data) for suffix, data in members.items()) + END)
    stream = ShardStream(tmp_path / "0.tar")
    main(Args(tmp_path, index=True))
    source = Shards(tmp_path)
    assert source.instructions(0, [6, 0, 3]) == ["lift", "", "put"]
    assert [e.instructions(range(7)) for e in stream.episodes(0)] == [tasks]
    assert instructions([source]) == instructions([stream]) == ["", "lift", "put"]
    for clips in (Clips(held, [0], (0.0, 0.1), 32), Clips(source, [0], (0.0, 0.1), 32, input_size=32, num_images=2)):
        assert [sample["task"] for sample in clips.__getitems__(range(6))] == tasks[:6]
    write_dataset(source, tmp_path / "lerobot", 32)
    assert LeRobotData(tmp_path / "lerobot").instructions(0, range(7)) == tasks


def test_unusable_changes_of_the_task_and_actions_that_are_not_finite_are_named(tmp_path):
    plain_tar(tmp_path / "0.tar", plain_sample("a", 3) | {"json": {"fps": 10, "task_changes": [[1, "x"]]}})
    with pytest.raises(ValueError, match=r"0.tar: a.json: expected task_changes \[\[0, TASK\]"):
        main(Args(tmp_path, index=True))
    numbers = np.array([[0.0, 1.0], [np.inf, 0.0], [0.0, 0.0]], dtype=np.float32)
    plain_tar(tmp_path / "0.tar", plain_sample("a", 3) | {"action.npy": numbers})
    with pytest.raises(ValueError, match=r"0.tar: a.action.npy: action of frame 1: expected finite .*\[inf, 0.0\]"):
        main(Args(tmp_path, index=True))


def test_an_episode_of_unevenly_spaced_frames_is_no_part_of_a_shard():
    held = InMemory(
        SimpleNamespace(uri="u", name="n", camera="", fingerprint="f", state_dim=0, action_dim=0, crop=False), [], []
    )
    held.uneven = {3: np.array([0.0, 0.1, 0.9])}
    with pytest.raises(ValueError, match="expected frames 0.1 s apart.* got frame 2 at 0.900 s"):
        record(held, 3, SimpleNamespace(fps=10.0), Args(Path("shards")))
