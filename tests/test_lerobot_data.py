"""Datasets are written by LeRobot itself, and read beside it."""

import json
import logging
import shutil
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import FPS, LENGTHS, TOP, WRIST, numbers, picture, rename, write_lerobot

from hlrp.clips import Clips
from hlrp.contract import choose_demonstrations
from hlrp.data import Mixture, loader
from hlrp.demonstrations import choose_parts
from hlrp.lerobot_data import LeRobotData, check_points, choose_camera, find_dataset, short_name
from hlrp.sources import instructions, num_views, open_source, open_sources


@pytest.fixture(scope="module")
def h264(tmp_path_factory):
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / "h264")


@pytest.fixture(scope="module")
def av1(tmp_path_factory):
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / "av1", "libsvtav1", g=30)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / "images", codec=None)


@pytest.fixture
def copy(h264, tmp_path):
    return shutil.copytree(h264, tmp_path / "copy")


def change(path, **columns):
    """Replaces columns of a parquet file."""
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)


@pytest.mark.parametrize("dataset", ["h264", "av1", "images"])
def test_frames_actions_states_and_tasks_are_those_that_lerobot_reads(dataset, request):
    from lerobot.datasets import LeRobotDataset

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
        assert numbers(255 - read["frames"]) == (first + order).tolist()
        assert torch.equal(read["point"], torch.from_numpy(order / 40).float()[:, None] * torch.tensor([1.0, -1.0]))
        for i, frame, state, action in zip(order, read["frames"], read["state"], actions, strict=True):
            item = expected[first + int(i)]
            image = item[WRIST] if item[WRIST].dtype == torch.uint8 else (item[WRIST] * 255).round().byte()
            assert torch.equal(frame, image)
            assert torch.equal(state, item["observation.state"]) and torch.equal(action, item["action"])
            assert source.instructions(episode, [i]) == [item["task"]]
        first += length


def test_clips_show_all_cameras_one_below_the_other_at_the_same_times(h264, av1):
    for folder in (h264, av1):
        source = open_source(f"lerobot:{folder}?camera=wrist,top")
        clips = Clips(source, range(3), (0.0, 0.3), 64, num_views=2)
        samples = clips.__getitems__([11, 3, 40])
        for sample in samples:
            assert sample["frames"].shape == (2, 3, 128, 64)
            top, wrist = sample["frames"].split(64, dim=-2)  # by name
            first = int(np.cumsum([0, *LENGTHS])[sample["episode"]]) + sample["index"]
            assert numbers(top) == numbers(255 - wrist) == [first, first + 3]
    assert clips.fingerprint != Clips(source, range(3), (0.0, 0.3), 64).fingerprint
    assert torch.equal(Clips(source, range(3), (0.0, 0.3), 64)[3]["frames"], samples[1]["frames"][..., 64:, :])
    with pytest.raises(ValueError, match=r"expected 2 cameras, as by \?camera=A,B, got observation.images.top$"):
        Clips(LeRobotData(h264), range(3), (0.0, 0.3), 64, num_views=2)
    with pytest.raises(ValueError, match=r"equally many cameras, .*wrist,top with 2, lerobot:.* with 1"):
        num_views([source, LeRobotData(h264)])


def test_images_may_lie_in_files_of_their_own_and_rows_without_one_are_named(images, tmp_path, caplog):
    """As `datasets` writes image columns that it does not embed."""
    folder = shutil.copytree(images, tmp_path / "linked")
    (path,) = (folder / "data").rglob("*.parquet")
    expected, whole = LeRobotData(images).read(1, range(30))["frames"], LeRobotData(images).fingerprint

    def change_cells(cells: dict):
        rows = pq.read_table(path)[TOP].to_pylist()
        change(path, **{TOP: [cells.get(i, row) for i, row in enumerate(rows)]})

    cells = pq.read_table(path)[TOP].to_pylist()
    (folder / "images").mkdir(exist_ok=True)
    for i in range(12, 42):  # the second episode
        (folder / f"images/{i}.png").write_bytes(cells[i]["bytes"])
    change_cells({i: {"bytes": None, "path": f"images/{i}.png"} for i in range(12, 42)})
    source = LeRobotData(folder)
    assert torch.equal(source.read(1, range(30))["frames"], expected) and source.fingerprint != whole
    before = source.fingerprint
    (folder / "images/20.png").write_bytes(cells[21]["bytes"])
    assert LeRobotData(folder).fingerprint != before

    (folder / "images/20.png").unlink()
    with pytest.raises(
        ValueError, match=r"episode 1: .*top, row 20: expected the image .*images/20.png, and it is not"
    ):
        LeRobotData(folder)
    change_cells({3: None})
    with pytest.raises(ValueError, match=r"episode 0: .*row 3: expected an image, got none; 2 episodes are broken"):
        LeRobotData(folder)
    kept = LeRobotData(folder, skip_broken=True)
    assert kept.lengths.tolist() == [9] and kept.num_skipped == 2 and "skipped" in caplog.text


def test_the_first_camera_is_the_default_and_an_unknown_one_lists_them(h264):
    source = LeRobotData(h264)
    assert source.camera == TOP and source.name == "lerobot-h264"
    assert LeRobotData(h264, camera=WRIST).camera == WRIST
    assert source.fingerprint == LeRobotData(h264).fingerprint != LeRobotData(h264, camera="wrist").fingerprint
    with pytest.raises(ValueError, match=f"camera=front; its cameras: {TOP}, {WRIST}"):
        LeRobotData(h264, camera="front")


def test_batches_hold_the_actions_between_their_frames(h264):
    mixture = Mixture([Clips(LeRobotData(h264), [1, 2], (0.0, 0.5), image_size=64)])
    assert len(mixture.clips[0]) == 25 + 4
    batch = next(iter(loader(mixture, batch_size=29, num_workers=1)))
    first_row = torch.tensor([0, 12, 42])[batch["episode"]] + batch["index"]
    assert numbers(batch["frames"][:, 0]) == first_row.tolist()
    assert numbers(batch["frames"][:, 1]) == (first_row + 5).tolist()
    assert torch.equal(batch["action"][..., 0], (first_row[:, None] + torch.arange(5)).float())
    assert torch.equal(batch["state"][:, 2], first_row.float())
    assert len(set(first_row.tolist())) == 29


def test_episodes_spread_over_several_files_are_found(tmp_path):
    folder = write_lerobot(tmp_path / "many", data_files_size_in_mb=0.001, video_files_size_in_mb=0.001)
    source = LeRobotData(folder)
    assert len(source.video_files) == 3 and len(source.data_files) > 1
    assert [numbers(source.read(e, [0, 8])["frames"]) for e in range(3)] == [[0, 8], [12, 20], [42, 50]]
    assert [source.actions(e, [8])[0, 0].item() for e in range(3)] == [8, 20, 50]


def test_video_without_state_and_action_is_a_source_too(tmp_path):
    source = LeRobotData(write_lerobot(tmp_path / "human", numbers=False))
    assert (source.state_dim, source.action_dim) == (0, 0)
    assert set(Clips(source, [1], (0.0, 0.5), 64)[3]) == {
        "frames", "task", "dataset", "source", "episode", "place", "index", "fps"
    }  # fmt: skip


def test_an_older_version_names_lerobots_converter(copy, tmp_path, monkeypatch):
    info = json.loads((copy / "meta/info.json").read_text())
    (copy / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    command = "python -m lerobot.scripts.convert_dataset_v21_to_v30"
    with pytest.raises(ValueError, match=f"version v2.1 .*: {command} --repo-id=local/copy --root={copy} --push"):
        LeRobotData(copy)
    snapshot = shutil.copytree(copy, tmp_path / "snapshots" / "0123")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: snapshot)
    with pytest.raises(ValueError, match=f"version v2.1 .*: {command} --repo-id=me/pick --push-to-hub=false"):
        LeRobotData("me/pick")


@pytest.mark.parametrize("points", [[[1.5, 0.0]], [[0.0, 0.0, 0.0]]], ids=["pixels", "three"])
def test_points_outside_the_image_are_named(points):
    with pytest.raises(ValueError, match="lerobot:x: annotation.point has [23] numbers up to .*-1 to 1 or nan"):
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
    assert numbers(source.read(1, [0, 29])["frames"]) == [12, 41]
    assert LeRobotData(copy, camera="wrist").num_skipped == 0


def test_an_episode_that_one_camera_lacks_is_left_out_for_all(copy):
    starts = {f"videos/{TOP}/from_timestamp": [0.0, 9.0, 4.2], f"videos/{WRIST}/from_timestamp": [0.0, 1.2, 9.0]}
    change(copy / "meta/episodes/chunk-000/file-000.parquet", **starts)
    source = open_source(f"lerobot:{copy}?camera=top,wrist", skip_broken=True)
    assert source.lengths.tolist() == [12] and source.num_skipped == 2
    assert numbers(255 - source.views[WRIST].read(0, [5])["frames"]) == numbers(source.read(0, [5])["frames"]) == [5]
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
    with pytest.raises(ValueError, match=f"{data}: expected the rows of the episodes that meta/episodes has"):
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


def encode(path, times):
    """An mp4 whose frame number k is shown at times[k] [ms]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10", "g": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, 64), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def edit_info(folder, **changes):
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FIRST_ROWS, NUMBER = np.array([0, 12, 42]), np.concatenate([np.arange(length) for length in LENGTHS])
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
MP4 = f"videos/{TOP}/chunk-000/file-000.mp4"


@pytest.mark.parametrize(
    ("seconds", "starts", "milliseconds", "fps", "factor"),
    [
        (0.11, FIRST_ROWS * 0.11, np.arange(51) * 110, 1 / 0.11, 1),
        (0.1, FIRST_ROWS * 0.1, np.rint(np.arange(153) * 1000 / 30).astype(int), 10, 3),
        (0.1, FIRST_ROWS * 0.1 + [0, 0.03, -0.03], np.arange(51) * 100, 10, 1),
        (0.1, [3.9, 0.9, 0.0], np.arange(51) * 100, 10, None),
    ],
    ids=["stamps .11 s apart at 10 fps", "30 fps mp4", "from_timestamp drifts less than half a frame", "other order"],
)
def test_frames_are_those_that_the_mp4_shows_at_the_time_stamps_of_the_rows(
    copy, seconds, starts, milliseconds, fps, factor
):
    encode(copy / MP4, milliseconds.tolist())
    change(copy / DATA, timestamp=(NUMBER * seconds).astype(np.float32))
    change(copy / EPISODES, **{f"videos/{TOP}/from_timestamp": list(starts)})
    source = LeRobotData(copy)
    np.testing.assert_allclose(source.fps, fps, rtol=1e-4)
    assert source.uneven == {}
    for episode, length in enumerate(LENGTHS):
        first = FIRST_ROWS[episode] if factor else (39, 9, 0)[episode]
        rows = first + np.arange(length)
        assert numbers(source.read(episode, range(length))["frames"]) == (rows * (factor or 1)).tolist()


def test_the_frame_rate_is_that_of_the_time_stamps_and_not_of_a_wrong_info_json(copy):
    edit_info(copy, fps=30)
    source = LeRobotData(copy)
    np.testing.assert_allclose(source.fps, 10, rtol=1e-5)
    assert numbers(Clips(source, [1], (0.0, 0.5), 64)[3]["frames"]) == [15, 20]


def test_a_frame_half_a_frame_off_its_row_names_episode_file_and_both_times(copy):
    change(copy / EPISODES, **{f"videos/{TOP}/from_timestamp": [0.0, 1.13, 4.2]})
    source = LeRobotData(copy)
    assert numbers(source.read(0, [3])["frames"]) == [3]
    with pytest.raises(ValueError, match=r"episode 1: its frame 4 is at 1.530 s .*top.*mp4 shows one at 1.600 s"):
        source.read(1, [4])
    change(copy / EPISODES, **{f"videos/{TOP}/from_timestamp": [0.0, 1.2, 4.2]})
    change(copy / DATA, timestamp=(NUMBER * 0.11).astype(np.float32))  # of frames that are .1 s apart
    source = LeRobotData(copy, skip_broken=True)
    with pytest.raises(ValueError, match=r"episode 0: its frame 6 is at 0.660 s .*mp4 shows one at 0.600 s"):
        source.read(0, [6])


@pytest.mark.parametrize("dataset", ["h264", "images"])
def test_rows_out_of_order_are_read_by_their_frame_index(dataset, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(dataset), tmp_path / "mixed")
    order = np.concatenate([12 - 1 - np.arange(12), 12 + np.random.default_rng(0).permutation(30), np.arange(42, 51)])
    pq.write_table(pq.read_table(folder / DATA).take(order), folder / DATA)
    mixed, plain = LeRobotData(folder), LeRobotData(request.getfixturevalue(dataset))
    for episode, length in enumerate(LENGTHS):
        read, expected = mixed.read(episode, range(length)), plain.read(episode, range(length))
        for key in ("frames", "state", "point"):
            assert torch.equal(read[key], expected[key]), key
        assert torch.equal(mixed.actions(episode, range(length)), plain.actions(episode, range(length)))
    change(folder / DATA, frame_index=[3] * 51)
    with pytest.raises(
        ValueError, match="episode 0: .*frame_index, row 1: expected more than the 3 of the frame before"
    ):
        LeRobotData(folder)


def test_clips_over_a_gap_in_time_are_left_out_and_counted(copy, caplog):
    stamps = NUMBER * 0.1 + np.where((np.arange(51) >= 22) & (np.arange(51) < 42), 0.7, 0)  # after 10 rows of episode 1
    milliseconds = np.arange(51) * 100 + np.where(np.arange(51) >= 22, 700, 0)
    encode(copy / MP4, milliseconds.tolist())
    change(copy / DATA, timestamp=stamps.astype(np.float32))
    change(copy / EPISODES, **{f"videos/{TOP}/from_timestamp": [0.0, 1.2, 4.9]})
    source = LeRobotData(copy)
    np.testing.assert_allclose(source.fps, 10, rtol=1e-4)
    clips = Clips(source, range(3), (0.0, 0.5), 64)
    assert len(clips) == 7 + 25 + 4 - 5 and "left out 5 of 36 clips" in caplog.text and "episode 1" in caplog.text
    samples = clips.__getitems__(range(len(clips)))
    assert [sample["index"] for sample in samples if sample["episode"] == 1] == [*range(5), *range(10, 25)]
    for sample in samples:
        first = int(FIRST_ROWS[sample["episode"]] + sample["index"])
        assert numbers(sample["frames"]) == [first, first + 5]
    with pytest.raises(ValueError, match="no clip is left without 3 of 3 clips.* episode 1"):
        Clips(source, [1], (0.0, 0.5), 64, frames={1: np.arange(6, 9)})


def test_the_instruction_is_that_of_the_row_and_an_empty_first_one_empties_no_other(copy, caplog):
    change(copy / "meta/tasks.parquet", **{"__index_level_0__" if has_index(copy) else "task": ["", "put it down"]})
    change(copy / DATA, task_index=[0] * 5 + [1] * 37 + [0] * 9)
    source = LeRobotData(copy)
    assert source.instructions(0, [4, 5, 7]) == ["", "put it down", "put it down"]
    assert instructions([source]) == ["", "put it down"]
    clips = Clips(source, [0], (0.0, 0.5), 64, input_size=64, num_images=3)
    assert [s["task"] for s in clips.__getitems__([6, 5, 4, 0])] == ["put it down"] * 2 + [""] * 2
    chosen = choose_demonstrations(source, range(3), 1, seed=0)
    assert len(chosen) == 2 and 2 in chosen  # episodes 0 and 1 are of one task


def has_index(folder):
    return "__index_level_0__" in pq.read_schema(folder / "meta/tasks.parquet").names


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("action", None, "expected numbers, got null"),
        ("action", [1.0], "expected 2 numbers, got 1"),
        ("action", [1.0, 2.0, 3.0, 4.0], "expected 2 numbers, got 4"),
        ("action", [1.0, None], r"expected finite numbers, got \[1.0, nan\]"),
        ("observation.state", [1.0, float("nan"), 0.0], r"expected finite numbers, got \[1.0, nan, 0.0\]"),
        ("observation.state", [1.0, float("inf"), 0.0], r"expected finite numbers, got \[1.0, inf, 0.0\]"),
        ("task_index", 7, "expected one of meta/tasks, got 7"),
        ("timestamp", None, "expected numbers, got null"),
    ],
)
def test_a_row_that_cannot_be_used_names_file_column_row_and_episode_or_is_skipped(copy, column, value, fault):
    values = pq.read_table(copy / DATA)[column].to_pylist()
    values[20] = value
    change(copy / DATA, **{column: values})
    with pytest.raises(ValueError, match=rf"episode 1: {copy / DATA}: {column}, row 20: {fault}"):
        LeRobotData(copy)
    source = LeRobotData(copy, skip_broken=True)
    assert source.lengths.tolist() == [12, 9] and source.num_skipped == 1
    assert numbers(source.read(1, [0])["frames"]) == [42] and source.actions(1, [8]).tolist() == [[50, -8]]


def test_columns_that_are_not_needed_may_be_null_and_are_named_once(copy, caplog):
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    edit_info(copy, features=features | {"next.reward": {"dtype": "float32", "shape": [1], "names": None}})
    for path, name in ((DATA, "next.reward"), (EPISODES, "videos/other/from_timestamp"), (EPISODES, "meta/note")):
        table = pq.read_table(copy / path)
        pq.write_table(table.append_column(name, pa.nulls(len(table))), copy / path)
    sources = [open_source(f"lerobot:{copy}?camera=top,wrist") for _ in range(2)]
    assert sources[0].lengths.tolist() == list(LENGTHS)
    lines = [record.getMessage() for record in caplog.records if "columns not read" in record.getMessage()]
    (line,) = lines
    assert line.startswith(f"lerobot:{copy}?camera=top,wrist: columns not read: next.reward [1]; ?action=KEY&state=KEY")


def test_columns_of_other_names_are_chosen_and_else_listed(h264, copy, caplog):
    rename(copy, {"action": "actions", "observation.state": "state"})
    unread = LeRobotData(copy)
    assert (unread.state_dim, unread.action_dim) == (0, 0) and unread.unread == "state [3], actions [2]"
    assert "columns not read: state [3], actions [2]; ?action=KEY&state=KEY,KEY[:7]" in caplog.text
    args = SimpleNamespace(val_fraction=0.4, seed=0, demonstrations=None, episodes=None, pseudo_actions=None)
    with pytest.raises(ValueError, match=r"no source has actions .*/copy has state \[3\], actions \[2\], which are"):
        choose_parts(args, [unread], [1.0])
    chosen, usual = open_source(f"lerobot:{copy}?action=actions&state=state"), LeRobotData(h264)
    assert (chosen.state_dim, chosen.action_dim, chosen.unread) == (3, 2, "")
    for episode, length in enumerate(LENGTHS):
        assert torch.equal(*(s.actions(episode, range(length)) for s in (chosen, usual)))
        assert torch.equal(*(s.states(episode, range(length)) for s in (chosen, usual)))
    assert chosen.fingerprint == usual.fingerprint != unread.fingerprint

    several = open_source(f"lerobot:{copy}?camera=top,wrist&action=actions[:1]&state=state[-2:],actions,state[:1]")
    expected = torch.cat([usual.states(1, [4, 2])[:, 1:], usual.actions(1, [4, 2]), usual.states(1, [4, 2])[:, :1]], 1)
    assert torch.equal(several.states(1, [4, 2]), expected) and torch.equal(several.read(1, [4, 2])["state"], expected)
    assert torch.equal(several.actions(1, [4, 2]), usual.actions(1, [4, 2])[:, :1])
    assert (open_source(f"lerobot:{copy}?state=&action=actions").state_dim) == 0
    for options, message in {
        "action=act": r"action=act; expected one of state \[3\], actions \[2\], annotation.point \[2\], timestamp",
        "state=state[5:]": r"state\[5:\] of 3 numbers; expected a key, or a range",
        "task=speech": r"task=speech; expected a column of texts or task numbers: frame_index \[1\], ",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(f"lerobot:{copy}?{options}")


def test_the_instruction_may_be_a_column_of_texts_or_of_numbers_of_tasks(copy):
    before = LeRobotData(copy).fingerprint
    info = json.loads((copy / "meta/info.json").read_text())
    new = {"said": {"dtype": "string", "shape": [1]}, "annotation.task": {"dtype": "int64", "shape": [1]}}
    edit_info(copy, features=info["features"] | new)
    (path,) = (copy / "data").rglob("*.parquet")
    table = pq.read_table(path)
    rows = zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), strict=True)
    texts = [f"{episode} {frame // 5}" for episode, frame in rows]
    table = table.append_column("said", pa.array(texts)).append_column("annotation.task", pa.array([1] * len(table)))
    pq.write_table(table.take(np.arange(len(table)).reshape(-1, 3)[:, ::-1].ravel()), path)  # rows of any order
    source = open_source(f"lerobot:{copy}?task=said")
    assert source.instructions(1, [4, 5, 29]) == ["1 0", "1 1", "1 5"] and source.fingerprint != before
    assert instructions([source]) == sorted(set(texts))
    assert open_source(f"lerobot:{copy}?task=annotation.task").instructions(0, [3, 11]) == ["task 1"] * 2
    change(path, **{"annotation.task": [1] * 7 + [9] * (len(table) - 7)})
    with pytest.raises(ValueError, match="annotation.task, row 7: expected a text or a number of meta/tasks, got 9"):
        open_source(f"lerobot:{copy}?task=annotation.task")


def test_a_revision_is_asked_of_the_hub_and_a_weight_stays_one(h264, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    shutil.copytree(h264, tmp_path / "me" / "toy")
    asked = []
    download = lambda name, revision, **options: asked.append((name, revision)) or h264  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (source,), weights = open_sources(["lerobot:me/toy?camera=top,wrist&revision=v1.0@0.5"], False, 0)
    assert set(asked) == {("me/toy", "v1.0")} and weights == [0.5] and source.lengths.tolist() == list(LENGTHS)
    with pytest.raises(ValueError, match="revision=v1.0; expected a dataset on the Hub, got a folder"):
        open_source(f"lerobot:{copy}?revision=v1.0")


@pytest.mark.parametrize(
    "flag",
    [
        {"info": {"is_depth_map": True}},
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": True}},
        {"video_info": {"is_depth_map": True}, "info": None},
    ],
)
def test_a_depth_camera_is_never_picked(copy, flag):
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    edit_info(copy, features=features | {TOP: {k: features[TOP][k] for k in ("dtype", "shape")} | flag})
    assert LeRobotData(copy).camera == WRIST
    with pytest.raises(ValueError, match=rf"camera=top; its cameras: {WRIST} \(and of depth, .*: {TOP}\)"):
        LeRobotData(copy, camera="top")


def test_an_ambiguous_camera_lists_those_that_it_may_be():
    left, right, top = ({f"observation.images.{name}": {"dtype": "video"}} for name in ("left.top", "right.top", "top"))
    with pytest.raises(
        ValueError, match="camera=top .*one of observation.images.left.top, observation.images.right.top"
    ):
        choose_camera("lerobot:x", left | right, "top")
    assert choose_camera("lerobot:x", left | right, "right.top") == "observation.images.right.top"
    assert choose_camera("lerobot:x", left | right | top, "observation.images.top") == "observation.images.top"
    assert short_name("observation.images.right.top", left | right) == "right.top"


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)


@pytest.mark.parametrize("file", ["meta/info.json", "meta/tasks.parquet", EPISODES, DATA, MP4])
@pytest.mark.parametrize(("content", "reason"), [(POINTER, "pointer of Git LFS"), ("", "empty"), (None, "")])
def test_a_file_that_is_missing_empty_or_a_pointer_of_git_lfs_is_named(copy, file, content, reason):
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    place = copy if content is None and file in ("meta/info.json", EPISODES) else copy / file
    with pytest.raises(ValueError, match=f"{place}.*{reason}"):
        LeRobotData(copy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "expected a JSON object, got a list"),
        ({"fps": None}, "expected fps, a number above 0, got None"),
        ({"features": None}, "expected features"),
        ({"features": {TOP: {"shape": [1]}}}, "expected features, an object with the dtype of each"),
        ({"data_path": None}, "expected data_path, a template"),
        ({"video_path": None}, "expected video_path, a template"),
        ({"data_path": "data/{episode_chunk}/{episode_index}.parquet"}, "expected a path of chunk_index"),
    ],
)
def test_an_unusable_info_json_is_named_with_the_reason(copy, content, reason):
    if isinstance(content, str):
        (copy / "meta/info.json").write_text(content)
    else:
        edit_info(copy, **content)
    with pytest.raises(ValueError, match=f"{copy / 'meta/info.json'}: {reason}"):
        LeRobotData(copy)


@pytest.mark.parametrize(
    "names", [("task_index", "task"), ("task_index", "__index_level_0__"), ("words", "task_index")]
)
def test_tasks_are_read_whatever_their_column_is_called(copy, names):
    columns = {name: [1, 0] if name == "task_index" else ["b", "a"] for name in names}
    categories = {"category": ["x", "y"]} if "words" not in names else {}
    pq.write_table(pa.table(categories | columns), copy / "meta/tasks.parquet")
    assert LeRobotData(copy).tasks == {0: "a", 1: "b"}
    frame = pd.DataFrame({"task_index": [0, 1], "category": ["x", "y"]}, index=pd.Index(["a", "b"], name=names[0]))
    frame.rename_axis(index={"task_index": "instruction"}).to_parquet(copy / "meta/tasks.parquet")
    assert LeRobotData(copy).tasks == {0: "a", 1: "b"}
    pq.write_table(pa.table({"x": ["a", "b"], "y": ["a", "b"], "task_index": [0, 1]}), copy / "meta/tasks.parquet")
    with pytest.raises(ValueError, match=r"tasks.parquet: expected columns task_index and task, got x, y, task_index"):
        LeRobotData(copy)
    (copy / "meta/tasks.parquet").unlink()
    lines = '{"task_index": 0, "task": "a"}\n{"task_index": 1, "task": "b"}\n'
    (copy / "meta/tasks.jsonl").write_text(lines)
    assert LeRobotData(copy).tasks == {0: "a", 1: "b"}


def test_an_episode_without_frames_is_named_or_skipped(copy):
    table = pq.read_table(copy / EPISODES)
    changes = {"episode_index": [0, 1, 2, 3], "length": [12, 30, 9, 0]}
    table = table.take([0, 1, 2, 2])
    for name, values in changes.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, copy / EPISODES)
    with pytest.raises(ValueError, match="episode 3: .*meta/episodes has it without frames"):
        LeRobotData(copy)
    source = LeRobotData(copy, skip_broken=True)
    assert source.lengths.tolist() == list(LENGTHS) and source.num_skipped == 1
