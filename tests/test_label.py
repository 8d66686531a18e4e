"""The latent actions that hlrp.label writes are those that stage 2 would compute."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from toys import LENGTHS, TOP, write_lerobot

from hlrp import label as module
from hlrp.clips import Clips
from hlrp.data import collate
from hlrp.label import Args, cached_space, latent_space, main
from hlrp.laq import LAQ, LAQConfig
from hlrp.lerobot_data import LeRobotData
from hlrp.sources import open_source
from hlrp.vla import LatentSpace
from hlrp.vla_validation import label

FIXTURE = Path(__file__).parent / "data/rlds_fixture"
CONFIG = LAQConfig(delta=0.3, image_size=32, patch_size=8, codebook_size=64, num_tokens=4)  # 3 frames at 10 fps


def save_laq(folder, **settings) -> LAQ:
    """An untrained LAQ whose codes vary, since its norm has seen some frames."""
    torch.manual_seed(0)
    laq = LAQ(replace(CONFIG, **settings))
    for _ in range(20):
        laq.label(torch.randint(256, (4, 2, 3, 32, 32), dtype=torch.uint8))
    folder.mkdir()
    laq.save_pretrained(folder, report=None)
    return LAQ.from_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("label")


@pytest.fixture(scope="module")
def laq(base):
    return save_laq(base / "laq")


@pytest.fixture(scope="module")
def old(base):
    return write_lerobot(base / "old")


@pytest.fixture(scope="module")
def new(base, laq, old):
    """The wrist view of `old`, labelled; batches end within episodes."""
    data = f"lerobot:{old}?camera=wrist"
    main(Args(data, base / "new", base / "laq", batch_size=4))
    return base / "new"


@pytest.fixture(scope="module")
def world(base, laq):
    main(Args("world:default?episodes=2", base / "world", base / "laq"))
    return base / "world"


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def batches(uri, laq, times=(0.0, 0.3), **settings):
    """The clips of a source as one batch, with the labels that it has, and with those computed from its frames."""
    source = open_source(uri)
    episodes = range(len(source.lengths))
    settings |= {"input_size": 32}
    online = Clips(source, episodes, times, laq.config.image_size, **settings)
    online = collate(online.__getitems__(range(len(online))))
    online |= label(laq, online["frames"])
    cached = Clips(source, episodes, times, laq.config.image_size, latent_space=asdict(latent_space(laq)), **settings)
    return collate(cached.__getitems__(range(len(cached)))), online


def assert_equal(cached, online):
    assert cached.keys() == online.keys() - {"features"}  # which are computed along the way in any case
    assert torch.equal(cached.pop("frames"), online.pop("frames")[:, :1])  # nothing later was read
    for key, value in cached.items():
        assert torch.equal(value, online[key]) if torch.is_tensor(value) else value == online[key], key


@pytest.mark.parametrize("times", [(0.0, 0.3), (0.0, 0.3, 0.6)])
def test_a_batch_of_cached_labels_is_the_batch_of_online_labels_to_the_bit(new, laq, times):
    cached, online = batches(f"lerobot:{new}?camera=wrist", laq, times)
    assert cached["latent_indices"].unique(dim=0).shape[0] > 10
    assert cached["latent_vectors"].shape == (sum(LENGTHS) - 9 * (len(times) - 1), len(times) - 1, 8)
    assert_equal(cached, online)


def test_a_cached_latent_action_that_is_not_finite_is_named(new, laq):
    source = LeRobotData(new, camera="wrist")
    clips = Clips(source, range(3), (0.0, 0.3), 32, latent_space=asdict(latent_space(laq)))
    clips[4]
    source.latent_actions["latent_vectors"][source.episodes["first_row"][0] + 4] = np.nan
    with pytest.raises(ValueError, match=r"episode 0: cached latent action of frame 4: expected finite numbers"):
        clips[4]


def test_the_world_is_labelled_as_its_written_frames_are(world, laq):
    assert_equal(*batches(f"lerobot:{world}", laq))
    written, drawn = LeRobotData(world), open_source("world:default?episodes=2")
    assert written.lengths.tolist() == drawn.lengths.tolist()
    for episode, length in enumerate(written.lengths):
        there, here = (source.read(episode, range(length)) for source in (written, drawn))
        assert written.instructions(episode, range(length)) == drawn.instructions(episode, range(length))
        assert torch.equal(there["state"], here["state"])
        assert torch.equal(there["point"], here["point"])
        assert (there["frames"].float() - here["frames"]).abs().mean() < 6
        actions = (source.actions(episode, range(length)) for source in (written, drawn))
        assert torch.equal(*actions)


def test_lerobot_reads_the_columns_and_the_ends_of_episodes_have_none(new, laq):
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("hlrp/new", root=new, video_backend="pyav")
    source = LeRobotData(new, camera="wrist")
    first = 0
    for episode, length in enumerate(LENGTHS):
        labels = source.labels(episode, range(length))
        for i in range(length):
            item = dataset.hf_dataset[first + i]
            torch.testing.assert_close(
                item["latent_action"], labels["latent_vectors"][i], rtol=0, atol=0, equal_nan=True
            )
            assert torch.equal(item["latent_action_indices"], labels["latent_indices"][i])
        is_end = torch.arange(length) >= length - 3
        assert torch.equal(labels["latent_vectors"].isnan().all(1), is_end)
        assert torch.equal((labels["latent_indices"] == -1).any(1), is_end)
        first += length
    assert dataset[0][TOP].shape == (3, 64, 64)


def test_another_model_learns_latent_actions_from_the_columns_their_statistics_and_the_manifest(new, old, laq):
    from lerobot.datasets import LeRobotDataset

    times = [0.0, 0.1, 0.2]
    dataset = LeRobotDataset("hlrp/new", root=new, video_backend="pyav", delta_timestamps={"latent_action": times})
    item, source = dataset[2], LeRobotData(new, camera="wrist")
    assert torch.equal(item["latent_action"], source.labels(0, [2, 3, 4])["latent_vectors"])
    assert not item["latent_action_is_pad"].any()
    vectors = np.stack(dataset.hf_dataset["latent_action"])
    vectors = vectors[~np.isnan(vectors).any(1)]
    assert len(vectors) == sum(length - 3 for length in LENGTHS)
    stats = dataset.meta.stats["latent_action"]
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(stats[name], getattr(vectors, name)(0), rtol=1e-4, atol=1e-6)
    others = json.loads((old / "meta/stats.json").read_text())
    assert {name: json.loads((new / "meta/stats.json").read_text())[name] for name in others} == others
    facts = json.loads((new / "meta/latent_actions.json").read_text())
    assert facts["fingerprint"] == laq.fingerprint and facts["vector_dim"] == vectors.shape[1]


def test_the_old_dataset_is_left_as_it_is_and_all_of_it_is_in_the_new_one(base, laq, old):
    before = hashes(old)
    main(Args(f"lerobot:{old}", base / "again", base / "laq"))
    after = hashes(base / "again")
    assert hashes(old) == before
    assert {path for path in before if after.get(path) != before[path] and path.suffix == ".mp4"} == set()
    assert before.keys() <= after.keys()
    facts = json.loads((base / "again/meta/latent_actions.json").read_text())
    assert facts["camera"] == TOP and facts["source"] == f"lerobot:{old}"
    assert facts["fingerprint"] == laq.fingerprint and facts["delta"] == 0.3 and facts["vector_dim"] == 8


def test_labels_of_another_laq_delta_or_camera_are_refused(new, laq):
    source, space = LeRobotData(new, camera="wrist"), asdict(latent_space(laq))

    def clips(source=source, times=(0.0, 0.3), **changes):
        Clips(source, range(3), times, 32, latent_space=space | changes)

    with pytest.raises(ValueError, match=f"of fingerprint='other', got fingerprint='{laq.fingerprint}'"):
        clips(fingerprint="other")
    with pytest.raises(ValueError, match="of delta=0.5, got delta=0.3"):
        clips(delta=0.5)
    with pytest.raises(ValueError, match="of camera='.*top', got camera='observation.images.wrist'"):
        clips(LeRobotData(new, camera="top"))
    with pytest.raises(ValueError, match="of crop=True, got crop=False"):
        clips(open_source(f"lerobot:{new}?camera=wrist&crop=center"))
    with pytest.raises(ValueError, match=r"between \[0.0, 0.5\] s, the cached ones .* 0.3 s for delta=0.3"):
        clips(times=(0.0, 0.5))
    with pytest.raises(ValueError, match="world:clean.* has no cached latent actions"):
        clips(open_source("world:clean?episodes=3"))


def test_images_in_several_files_get_codes_of_one_token_too(base, tmp_path):
    laq = save_laq(tmp_path / "laq", num_tokens=1)
    write_lerobot(tmp_path / "old", codec=None, data_files_size_in_mb=0.001)
    main(Args(f"lerobot:{tmp_path / 'old'}", tmp_path / "new", tmp_path / "laq"))
    assert len(LeRobotData(tmp_path / "new").data_files) > 1
    assert_equal(*batches(f"lerobot:{tmp_path / 'new'}", laq))
    shutil.copy(tmp_path / "old/data/chunk-000/file-000.parquet", tmp_path / "old/data/chunk-000/file-009.parquet")
    with pytest.raises(ValueError, match="file-009.parquet belongs to no episode"):
        main(Args(f"lerobot:{tmp_path / 'old'}", tmp_path / "stray", tmp_path / "laq"))


def test_a_continuous_laq_has_no_indices(base, old):
    laq = save_laq(base / "gaussian", quantizer="gaussian")
    main(Args(f"lerobot:{old}", base / "continuous", base / "gaussian"))
    source = LeRobotData(base / "continuous")
    assert source.labels(0, [0, 1]).keys() == {"latent_vectors"}
    assert_equal(*batches(f"lerobot:{base / 'continuous'}", laq))


def write_video(path, size=(32, 48), fps=10, num_frames=100):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(num_frames):
            picture = np.full((*size, 3), 2 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def test_no_frame_of_a_folder_of_videos_is_lost(base, laq, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUEUE_SIZE", 2)  # LeRobot drops frames where its queue is full
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mp4", num_frames=20)
    (tmp_path / "b.txt").write_text("wave")
    main(Args(f"videos:{tmp_path}", tmp_path / "new", base / "laq"))
    source = LeRobotData(tmp_path / "new")
    assert source.lengths.tolist() == [100, 20] and (source.state_dim, source.action_dim) == (0, 0)
    frames = source.read(0, range(100))["frames"]
    assert frames.shape[1:] == (3, 32, 48)
    assert (frames.float().mean((1, 2, 3)) - 2 * torch.arange(100)).abs().max() < 4
    assert [source.instructions(i, [0])[0] for i in (0, 1)] == ["", "wave"]
    assert_equal(*batches(f"lerobot:{tmp_path / 'new'}", laq))


def test_videos_of_different_size_or_rate_are_named(base, laq, tmp_path):
    write_video(tmp_path / "a.mp4", num_frames=10)
    write_video(tmp_path / "b.mp4", size=(48, 32), num_frames=10)
    args = Args(f"videos:{tmp_path}", tmp_path / "new", base / "laq")
    with pytest.raises(ValueError, match=r"a.mp4 has frames of 48 x 32 .*b.mp4 of 32 x 48; --image-size"):
        main(args)
    main(replace(args, output_dir=tmp_path / "square", image_size=64))
    assert LeRobotData(tmp_path / "square").read(1, [0])["frames"].shape == (1, 3, 64, 64)
    cropped = f"videos:{tmp_path}?crop=center"
    main(replace(args, data=cropped, output_dir=tmp_path / "cut", image_size=32))
    cut = LeRobotData(tmp_path / "cut")
    assert not cut.crop and cut.latent_space["crop"] is False and cut.latent_space["source"] == cropped
    found, expected = cut.read(0, [4])["frames"], open_source(f"videos:{tmp_path}").read(0, [4])["frames"][..., 8:40]
    assert (found.int() - expected.int()).abs().float().mean() < 10
    write_video(tmp_path / "b.mp4", fps=20, num_frames=20)
    with pytest.raises(ValueError, match="a.mp4: 10, .*b.mp4: 20"):
        main(args)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_labelled_is_named_before_anything_is_written(base, new, laq, old, tmp_path):
    args = Args(f"lerobot:{old}", tmp_path / "out", base / "laq")
    save_laq(base / "slow", delta=9.0)
    refusals = [
        (replace(args, output_dir=new), "exists already"),
        (replace(args, data=f"lerobot:{new}"), f"has latent actions already; .* lerobot:{old}"),
        (replace(args, laq=tmp_path), "holds no config.json"),
        (replace(args, image_size=64), "image_size=64, but lerobot:"),
        (replace(args, batch_size=0), "batch_size=0"),
        (replace(args, data="world:nowhere"), "unknown variant"),
        (
            replace(args, data=f"rlds:{FIXTURE}?fps=5&camera=image"),
            "is a stream; make a source with python -m hlrp.shards --data 'rlds:",
        ),
        (replace(args, data="world:clean?episodes=2", laq=base / "slow"), "delta=9 s|clips last 9 s"),
    ]
    for refused, message in refusals:
        with pytest.raises(ValueError, match=message):
            main(refused)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_folder_and_the_next_one_does_it_anew(base, laq, tmp_path):
    script = """
import os, signal, sys
from hlrp import label
add_columns = label.add_columns
def killed(*args):
    add_columns(*args)
    os.kill(os.getpid(), signal.SIGKILL)
label.add_columns = killed
label.main(label.Args("world:clean?episodes=1", label.Path(sys.argv[1]), label.Path(sys.argv[2])))
"""
    command = [sys.executable, "-c", script, tmp_path / "new", base / "laq"]
    assert subprocess.run(command, env=os.environ).returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists() and list(tmp_path.iterdir())
    main(Args("world:clean?episodes=1", tmp_path / "new", base / "laq"))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert LeRobotData(tmp_path / "new").latent_space["source"] == "world:clean?episodes=1&seed=0"


@pytest.mark.usefixtures("fresh_process")
def test_stage_2_learns_the_same_from_cached_labels(base, world, laq, tmp_path, monkeypatch):
    import train_vla
    from hlrp.vla import VLA

    plain = shutil.copytree(world, tmp_path / "world")
    (plain / "meta/latent_actions.json").unlink()
    forward, seen = VLA.forward, []
    monkeypatch.setattr(VLA, "forward", lambda vla, batch: seen.append(batch) or forward(vla, batch))
    settings = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "num_workers": 0, "val_samples": 8}
    for folder, name in ((world, "cached"), (plain, "online")):
        data = (f"lerobot:{folder}",)
        train_vla.main(train_vla.Args(laq=base / "laq", data=data, output_dir=tmp_path / name, **settings))
    assert len(seen) == 4
    for cached, online in zip(seen[:2], seen[2:], strict=True):
        assert "frames" not in cached
        assert {"latent_indices", "latent_vectors", "images"} <= cached.keys() == online.keys()
        assert all(torch.equal(cached[key], online[key]) for key in cached if torch.is_tensor(cached[key]))


def test_one_source_without_cached_labels_is_named_beside_those_that_have_some():
    space = LatentSpace(0.2, 2, 5, 6, image_size=32, fingerprint="")
    having, lacking = (
        SimpleNamespace(uri="lerobot:a", latent_space={}),
        SimpleNamespace(uri="videos:b", latent_space=None),
    )
    having.latent_space["delta"] = 0.2
    assert cached_space([having], space) == (asdict(space), "latent actions are read from the data")
    assert cached_space([lacking], space) == (None, "latent actions are computed along the way")
    cached, told = cached_space([having, lacking], space)
    assert cached is None and "also where lerobot:a has them, since videos:b has none" in told


def test_help_is_light():
    heavy = ("lerobot", "transformers", "wandb", "matplotlib", "mujoco", "accelerate", "peft")
    script = f"""
import runpy, sys
sys.argv = ["label", "--help"]
try:
    runpy.run_module("hlrp.label", run_name="__main__")
finally:
    print("imported", [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "imported []" in process.stderr and "--laq" in process.stdout
