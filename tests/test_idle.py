import numpy as np
import pytest
import torch

from hlrp.clips import Clips
from hlrp.contract import Source
from hlrp.idle import IdleConfig, activity, busy_frames, save_picture, scores


class Waiting(Source):
    """Twenty frames at 10 fps: nothing moves from 5 to 12, and from 8 on the robot acts without effect."""

    uri, name, fingerprint, camera = "test:waiting", "waiting", "waiting", ""
    lengths, fps, action_dim, state_dim = np.array([20, 20]), np.array([10.0, 10.0]), 2, 0

    def __init__(self):
        self.reads = 0

    def read(self, episode, indices):
        self.reads += 1
        place = np.clip(np.arange(20), 0, 5) + np.clip(np.arange(20) - 12, 0, None)
        frames = torch.zeros(len(indices), 3, 64, 64, dtype=torch.uint8)
        for frame, i in zip(frames, np.asarray(indices), strict=True):
            frame[:, :, 4 * place[i] : 4 * place[i] + 4] = 255
        return {"frames": frames}

    def actions(self, episode, indices):
        indices = np.asarray(indices)
        acts = (indices < 5) | (indices >= 8)
        return torch.from_numpy(np.stack([acts, 100 * acts], axis=1)).float()


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("HLRP_CACHE", str(tmp_path))
    return Waiting()


def test_frames_after_which_nothing_happens_are_left_out(source):
    by_motion = busy_frames(source, IdleConfig(motion=1.0))
    assert len(by_motion) == 2 and by_motion[0].tolist() == [0, 1, 2, 3, 4, *range(11, 20)]
    assert busy_frames(source, IdleConfig(action=0.1))[1].tolist() == [0, 1, 2, 3, 4, *range(7, 20)]
    both = busy_frames(source, IdleConfig(motion=1.0, action=0.1))  # left out where both say so
    assert both[0].tolist() == [0, 1, 2, 3, 4, *range(7, 20)]


def test_a_gripper_that_is_held_by_a_constant_is_no_action():
    squares = np.array([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [4.0, 1.0, 1.0], [4.0, 1.0, 1.0]])
    assert activity(squares).tolist() == pytest.approx([0, 0, 2**0.5, 2**0.5])
    assert not activity(np.ones((3, 2))).any()


def test_other_thresholds_need_no_frame_again(source):
    busy_frames(source, IdleConfig(motion=1.0))
    reads = source.reads
    busy_frames(source, IdleConfig(motion=5.0))
    assert source.reads == reads > 0
    assert scores(source, 0.4)["motion"].shape == (40,) and source.reads > reads  # another span does


def test_clips_start_at_the_frames_that_are_left_and_see_the_others(source):
    busy = busy_frames(source, IdleConfig(motion=1.0))
    clips = Clips(source, [1], (0.0, 0.2), image_size=64, frames=busy)
    starts = [clips[i]["index"] for i in range(len(clips))]
    assert starts == [i for i in busy[1].tolist() if i < 18]
    assert clips[4]["frames"].shape == (2, 3, 64, 64)


def test_a_picture_shows_what_is_left_out(source, tmp_path):
    save_picture(tmp_path / "idle.png", source, IdleConfig(motion=1.0), [0, 1])
    assert (tmp_path / "idle.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IdleConfig(motion=1000.0), "all frames are idle at {'motion': 1000.0}; the highest: motion"),
        (IdleConfig(motion=-1.0), "idle.motion=-1.0"),
        (IdleConfig(motion=1.0, span=0.0), "idle.span=0.0"),
    ],
)
def test_thresholds_that_leave_nothing_are_named(config, message, source):
    with pytest.raises(ValueError, match=message):
        busy_frames(source, config)


def test_a_threshold_on_actions_needs_some(source):
    source.action_dim = 0
    with pytest.raises(ValueError, match="has no actions; set --idle.motion instead"):
        busy_frames(source, IdleConfig(action=0.1))
