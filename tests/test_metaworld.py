"""Needs OpenGL (libegl1, libgl1-mesa-dri): without it these tests fail with the line that installs it."""

import multiprocessing
import time

import numpy as np
import pytest
import torch

from hlrp import metaworld
from hlrp.metaworld import MT10, Setting, cached, parse_tasks, render, render_episode

SETTING = Setting(cameras=("corner2",), image_size=64, action_repeat=4, noise=0.2, seed=0)
TASK = "door-open-v3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two episodes of two tasks, rendered over what a killed run left behind."""
    folder = tmp_path_factory.mktemp("metaworld") / "two_tasks"
    left_over = folder.with_name("two_tasks.partial")
    left_over.mkdir()
    (left_over / "half_a_video.mp4").touch()
    return render(folder, "reach-v3,door-open-v3", episodes=2, image_size=64)


def test_lerobot_reads_the_frames_actions_and_tasks_that_were_rendered(folder):
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("hlrp/two_tasks", root=folder)
    rows = [dataset[i] for i in range(len(dataset))]
    assert dataset.fps == 20 and dataset.num_episodes == 4
    assert rows[0]["task"] == "Reach a goal position"
    assert rows[-1]["task"] == "Open a door with a revolving joint"

    alone = render_episode(SETTING, "door-open-v3", 1)  # in the dataset it came after other episodes
    rows = rows[-len(alone.action) :]
    assert {int(row["episode_index"]) for row in rows} == {3}
    torch.testing.assert_close(torch.stack([row["action"] for row in rows]), torch.from_numpy(alone.action))
    torch.testing.assert_close(torch.stack([row["observation.state"] for row in rows]), torch.from_numpy(alone.state))

    decoded = torch.stack([row["observation.images.corner2"] for row in rows]).permute(0, 2, 3, 1)  # t h w c
    frames = torch.from_numpy(alone.frames["corner2"]) / 255
    assert (decoded - frames).abs().mean() < 0.03  # of compression
    assert torch.equal(torch.cdist(decoded.flatten(1), frames.flatten(1)).argmin(1), torch.arange(len(rows)))


def test_the_same_settings_give_the_same_episode_and_another_number_another_one():
    first, again, other = (render_episode(SETTING, "reach-v3", number) for number in (0, 0, 1))
    np.testing.assert_array_equal(first.frames["corner2"], again.frames["corner2"])
    np.testing.assert_array_equal(first.action, again.action)
    assert not np.array_equal(first.action[:5], other.action[:5])


def test_the_hand_moves_where_the_action_says():
    episode = render_episode(SETTING, "door-open-v3", 0)
    assert np.abs(episode.action).max() <= 1
    moved = np.diff(episode.state[:, :3], axis=0)
    for axis in range(3):  # the hand follows its set point with a lag
        action = np.convolve(episode.action[:, axis], [0.5, 0.5])[1:-1]
        assert np.corrcoef(action, moved[:, axis])[0, 1] > 0.5


def test_distractors_change_the_picture_alone():
    setting = SETTING._replace(distractors=True)
    plain, first, again, other = (
        render_episode(*job) for job in [(SETTING, TASK, 0), (setting, TASK, 0), (setting, TASK, 0), (setting, TASK, 1)]
    )
    np.testing.assert_array_equal(first.action, plain.action)
    np.testing.assert_array_equal(first.state, plain.state)
    np.testing.assert_array_equal(first.frames["corner2"], again.frames["corner2"])
    added, another = (e.frames["corner2"][:2].astype(int) - plain.frames["corner2"][:2] for e in (first, other))
    assert (np.abs(added[0]) > 8).any(-1).mean() > 0.02  # balls and light
    assert np.abs(added[1] - added[0]).mean() > 0.5  # they move
    assert np.abs(added[0] - another[0]).mean() > 2  # in each episode otherwise


def test_what_a_killed_run_left_behind_is_done_anew(folder):
    assert not folder.with_name("two_tasks.partial").exists()
    assert not (folder / "half_a_video.mp4").exists()


def test_processes_that_ask_for_the_same_video_render_it_once(tmp_path, monkeypatch):
    calls = tmp_path / "calls"

    def slow_render(output_dir, *args, **kwargs):
        with calls.open("a") as file:
            file.write(f"{args}\n")
        time.sleep(0.2)
        output_dir.mkdir()

    monkeypatch.setenv("HLRP_CACHE", str(tmp_path))
    monkeypatch.setattr(metaworld, "render", slow_render)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=cached, args=("reach-v3", 1)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert calls.read_text().splitlines() == ["('reach-v3', 1, ('corner2',), 128)"]
    assert cached("reach-v3", 1).parent == tmp_path / "metaworld"
    assert cached("reach-v3", 2) != cached("reach-v3", 1)


def test_task_groups_and_names_mix_without_repeats():
    assert parse_tasks("mt10") == list(MT10)
    assert parse_tasks("door-close-v3,mt10,reach-v3") == ["door-close-v3", *MT10]
    assert len(parse_tasks("mt50")) == 50 and len(parse_tasks("easy")) == 28


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": "open-door"}, "door-open-v3"),
        ({"cameras": ("corner5",)}, "corner5.*corner2"),
        ({"image_size": 63}, "image_size=63"),
        ({"action_repeat": 3}, "action_repeat=3"),
        ({"episodes": 0}, "episodes=0"),
    ],
)
def test_wrong_settings_are_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        render(tmp_path / "never", **wrong)


def test_a_folder_that_exists_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        render(tmp_path)


def test_an_expert_that_never_succeeds_is_named(monkeypatch):
    monkeypatch.setattr(metaworld, "MAX_ATTEMPTS", 1)
    with pytest.raises(RuntimeError, match="pick-place-v3 failed 1 times.*noise=100"):
        render_episode(SETTING._replace(noise=100.0), "pick-place-v3", 0)


def test_without_opengl_the_error_says_what_to_install(tmp_path, monkeypatch):
    install = "sudo apt-get install -y libegl1 libgl1-mesa-dri"
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", str(tmp_path))  # libEGL finds no driver
    with pytest.raises(RuntimeError, match=install):
        render(tmp_path / "never", "reach-v3", episodes=1, num_workers=1)

    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(metaworld.ctypes, "CDLL", no_library)
    with pytest.raises(RuntimeError, match=install):
        render(tmp_path / "never", "reach-v3")


def test_without_the_simulator_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(metaworld.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[sim\]"):
        render(tmp_path / "never", "reach-v3")
