"""Datasets are written by LeRobot itself, and read beside it."""

import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hlrp import videos
from hlrp.clips import Clips
from hlrp.data import Mixture, loader
from hlrp.lerobot_data import LeRobotData, check_points, find_dataset
from hlrp.sources import open_source

LENGTHS, FPS, SIZE = (12, 30, 9), 10, 64
TOP, WRIST = "observation.images.top", "observation.images.wrist"


def write(folder, codec="h264", g=2, numbers=True, **settings):
    """Three episodes of two tasks; the frames count through as bar codes, inverted in the wrist view."""
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    image = {"dtype": "image" if codec is None else "video", "shape": (SIZE, SIZE, 3)}
    features = {key: image | {"names": ["height", "width", "channels"]} for key in (TOP, WRIST)}
    if numbers:
        features["observation.state"] = {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]}
        features["action"] = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
        features["annotation.point"] = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    if codec is not None:
        settings["rgb_encoder"] = RGBEncoderConfig(vcodec=codec, g=g, crf=20)
        settings |= {"streaming_encoding": True, "encoder_queue_maxsize": 100, "encoder_threads": 1}
    dataset = LeRobotDataset.create("toy/toy", FPS, features, root=folder, use_videos=codec is not None, **settings)
    total = 0
    for episode, length in enumerate(LENGTHS):
        for i in range(length):
            picture = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
            for bit in range(8):
                picture[:, 8 * bit : 8 * bit + 8] = 255 * (total >> bit & 1)
            frame = {TOP: picture, WRIST: 255 - picture, "task": f"task {episode % 2}"}
            if numbers:
                frame["observation.state"] = np.array([episode, i, total], dtype=np.float32)
                frame["action"] = np.array([total, -i], dtype=np.float32)
                frame["annotation.point"] = np.array([i / 40, -i / 40], dtype=np.float32)
            dataset.add_frame(frame)
            total += 1
        dataset.save_episode()
    dataset.finalize()
    return folder


def shown(frames):
    bars = frames[:, 0, SIZE // 2, 4::8] > 127
    return (bars.long() << torch.arange(8)).sum(1).tolist()


@pytest.fixture(scope="module")
def h264(tmp_path_factory):
    return write(tmp_path_factory.mktemp("lerobot") / "h264")


@pytest.fixture(scope="module")
def av1(tmp_path_factory):
    return write(tmp_path_factory.mktemp("lerobot") / "av1", "libsvtav1", g=30)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write(tmp_path_factory.mktemp("lerobot") / "images", codec=None)


@pytest.fixture
def copy(h264, tmp_path):
    return shutil.copytree(h264, tmp_path / "copy")


def change(path, **columns):
    """Replaces columns of a parquet file."""
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
@pytest.mark.parametrize("dataset", ["h264", "av1", "images"])
def test_frames_actions_states_and_tasks_are_those_that_lerobot_reads(dataset, decoder, request, monkeypatch):
    from lerobot.datasets import LeRobotDataset

    if decoder == "torchcodec" and videos.decoder() != "torchcodec":
        pytest.skip("FFmpeg is not installed")
    monkeypatch.setattr(videos, "decoder", lambda: decoder)
    videos._open.cache_clear()
    folder = request.getfixturevalue(dataset)
    expected = LeRobotDataset("toy/toy", root=folder, video_backend="pyav", return_uint8=True)
    source = open_source(f"lerobot:{folder}?camera=wrist")
    assert source.camera == WRIST and source.name == f"lerobot-{dataset}-wrist"
    assert source.lengths.tolist() == list(LENGTHS) and source.fps.tolist() == [FPS] * 3
    assert dataset == "images" or len(source.video_files) == 1  # all episodes in one mp4

    first = 0
    for episode, length in enumerate(LENGTHS):
        order = np.random.default_rng(0).permutation(length)
        read, actions = source.read(episode, order), source.actions(episode, order)
        assert shown(255 - read["frames"]) == (first + order).tolist()
        assert torch.equal(read["point"], torch.from_numpy(order / 40).float()[:, None] * torch.tensor([1.0, -1.0]))
        for i, frame, state, action in zip(order, read["frames"], read["state"], actions, strict=True):
            item = expected[first + int(i)]
            image = item[WRIST] if item[WRIST].dtype == torch.uint8 else (item[WRIST] * 255).round().byte()
            assert torch.equal(frame, image)
            assert torch.equal(state, item["observation.state"]) and torch.equal(action, item["action"])
            assert read["task"] == item["task"]
        first += length


def test_the_first_camera_is_the_default_and_an_unknown_one_lists_them(h264):
    source = LeRobotData(h264)
    assert source.camera == TOP and source.name == "lerobot-h264"
    assert LeRobotData(h264, camera=WRIST).camera == WRIST
    assert source.fingerprint == LeRobotData(h264).fingerprint != LeRobotData(h264, camera="wrist").fingerprint
    with pytest.raises(ValueError, match=f"camera=front; its cameras: {TOP}, {WRIST}"):
        LeRobotData(h264, camera="front")


def test_batches_hold_the_actions_between_their_frames(h264):
    mixture = Mixture([Clips(LeRobotData(h264), [1, 2], (0.0, 0.5), image_size=SIZE)])
    assert len(mixture.clips[0]) == 25 + 4
    batch = next(iter(loader(mixture, batch_size=29, num_workers=1)))
    first_row = torch.tensor([0, 12, 42])[batch["episode"]] + batch["index"]
    assert shown(batch["frames"][:, 0]) == first_row.tolist()
    assert shown(batch["frames"][:, 1]) == (first_row + 5).tolist()
    assert torch.equal(batch["action"][..., 0], (first_row[:, None] + torch.arange(5)).float())
    assert torch.equal(batch["state"][:, 2], first_row.float())
    assert len(set(first_row.tolist())) == 29


def test_episodes_spread_over_several_files_are_found(tmp_path):
    folder = write(tmp_path / "many", data_files_size_in_mb=0.001, video_files_size_in_mb=0.001)
    source = LeRobotData(folder)
    assert len(source.video_files) == 3 and len(source.data_files) > 1
    assert [shown(source.read(e, [0, 8])["frames"]) for e in range(3)] == [[0, 8], [12, 20], [42, 50]]
    assert [source.actions(e, [8])[0, 0].item() for e in range(3)] == [8, 20, 50]


def test_video_without_state_and_action_is_a_source_too(tmp_path):
    source = LeRobotData(write(tmp_path / "human", numbers=False))
    assert (source.state_dim, source.action_dim) == (0, 0)
    assert set(Clips(source, [1], (0.0, 0.5), SIZE)[3]) == {
        "frames", "task", "dataset", "source", "episode", "index", "fps"
    }  # fmt: skip


def test_an_older_version_names_lerobots_converter(copy):
    info = json.loads((copy / "meta/info.json").read_text())
    (copy / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    with pytest.raises(ValueError, match="version v2.1 .* lerobot.scripts.convert_dataset_v21_to_v30"):
        LeRobotData(copy)


@pytest.mark.parametrize("points", [[[1.5, 0.0]], [[0.0, 0.0, 0.0]]], ids=["pixels", "three"])
def test_points_outside_the_image_are_named(points):
    with pytest.raises(ValueError, match="lerobot:x: annotation.point has [23] numbers up to .*-1 to 1 or nan fit"):
        check_points(np.array(points), "lerobot:x")
    check_points(np.array([[np.nan, np.nan], [-1.0, 1.0]]), "lerobot:x")


def test_time_stamps_past_the_end_of_the_video_name_episode_and_file_or_are_skipped(copy, caplog):
    start = f"videos/{TOP}/from_timestamp"
    change(copy / "meta/episodes/chunk-000/file-000.parquet", **{start: [0.0, 1.2, 4.4]})  # the last is 4.2
    message = r"episode 2: its last frame is at 5.200 s, but .*top/chunk-000/file-000.mp4 ends .* at 5.000 s"
    with pytest.raises(ValueError, match=message):
        LeRobotData(copy)
    with caplog.at_level(logging.WARNING):
        source = LeRobotData(copy, skip_broken=True)
    assert "episode 2" in caplog.text and source.num_skipped == 1
    assert source.lengths.tolist() == [12, 30]
    assert shown(source.read(1, [0, 29])["frames"]) == [12, 41]
    assert LeRobotData(copy, camera="wrist").num_skipped == 0


def test_an_episode_that_one_camera_lacks_is_left_out_for_all(copy):
    starts = {f"videos/{TOP}/from_timestamp": [0.0, 9.0, 4.2], f"videos/{WRIST}/from_timestamp": [0.0, 1.2, 9.0]}
    change(copy / "meta/episodes/chunk-000/file-000.parquet", **starts)
    source = open_source(f"lerobot:{copy}?camera=top,wrist", skip_broken=True)
    assert source.lengths.tolist() == [12] and source.num_skipped == 2
    assert shown(255 - source.look(WRIST, 0, [5])) == shown(source.read(0, [5])["frames"]) == [5]
    starts |= {f"videos/{WRIST}/from_timestamp": [9.0, 1.2, 4.2], f"videos/{TOP}/from_timestamp": [0.0, 9.0, 9.0]}
    change(copy / "meta/episodes/chunk-000/file-000.parquet", **starts)
    with pytest.raises(ValueError, match="no episode of which all cameras can be read"):
        open_source(f"lerobot:{copy}?camera=top,wrist", skip_broken=True)


def test_edited_numbers_and_frames_of_equal_size_are_another_data_set_and_another_place_is_not(h264, images, tmp_path):
    for original, camera in ((h264, "top,wrist"), (images, "wrist")):
        folder = shutil.copytree(original, tmp_path / original.name)
        first = LeRobotData(original, camera).fingerprint
        assert LeRobotData(folder, camera).fingerprint == first
        (path,) = (folder / "data").rglob("*.parquet")
        for column in ("action", "observation.state"):
            table = pq.read_table(path)
            values = table[column].to_pylist()
            values[7][0] += 0.5
            change(path, **{column: values})
            assert LeRobotData(folder, camera).fingerprint != first
            pq.write_table(table, path)
    assert LeRobotData(folder, camera).fingerprint != LeRobotData(h264, "wrist").fingerprint
    for video in (tmp_path / h264.name / "videos").rglob("*.mp4"):  # the policy's second view among them
        data = bytearray(video.read_bytes())
        data[data.index(b"mdat") + 400] ^= 1
        video.write_bytes(data)
        assert LeRobotData(tmp_path / h264.name, "top,wrist").fingerprint != LeRobotData(h264, "top,wrist").fingerprint
        data[data.index(b"mdat") + 400] ^= 1
        video.write_bytes(data)


def test_the_fingerprint_is_of_the_instructions_too(copy):
    before = LeRobotData(copy).fingerprint
    change(copy / "meta/tasks.parquet", task_index=[1, 0])
    assert LeRobotData(copy).fingerprint != before


def test_missing_and_broken_files_are_named(copy):
    video = copy / "videos" / TOP / "chunk-000" / "file-000.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"episode 0: {video}"):
        LeRobotData(copy)
    video.unlink()
    with pytest.raises(ValueError, match=f"episode 0: {video}"):
        LeRobotData(copy, skip_broken=True)  # no episode is left
    data = copy / "data/chunk-000/file-000.parquet"
    change(copy / "meta/episodes/chunk-000/file-000.parquet", length=[12, 29, 10])
    with pytest.raises(ValueError, match=f"{data}: its rows are not those"):
        LeRobotData(copy, camera="wrist")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{data}: not a readable parquet file"):
        LeRobotData(copy, camera="wrist")


def test_a_name_is_looked_up_at_home_and_then_on_the_hub(h264, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    shutil.copytree(h264, tmp_path / "me" / "toy")
    assert LeRobotData("me/toy").name == "lerobot-toy"

    def offline(*args, **kwargs):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="lerobot:you/toy: no such folder, and the Hub .* offline mode"):
        LeRobotData("you/toy")
    with pytest.raises(ValueError, match="no meta/info.json there"):
        find_dataset(tmp_path)
