"""HDF5 files are written here as robomimic, LIBERO and ALOHA write them, and read beside h5py."""

import json
import logging
import pickle
import shutil

import h5py
import numpy as np
import pytest
import simplejpeg
import torch
import tyro
from toys import FLAGS, numbers, picture

import train_laq
from hlrp import shards
from hlrp.clips import Clips
from hlrp.contract import choose_demonstrations
from hlrp.data import Mixture, loader
from hlrp.hdf5_data import HDF5Data, instruction
from hlrp.sources import open_source

LENGTHS = {"demo_2": 9, "demo_10": 12, "demo_0": 30}  # as h5py lists them: 0, 10, 2
ENV_ARGS = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
CAMERA = "camera=agentview_rgb"
LIBERO = f"{CAMERA}&state=ee_states,gripper_states"


def write_robomimic(path, lengths=LENGTHS, problem=True, extra=()):
    """Demos of LIBERO's columns; frames show the number of the demo plus their own, the wrist's are inverted."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = ENV_ARGS
        if problem:
            data.attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        for name, length in lengths.items():
            first = int(name.split("_")[1]) * 10
            frames = np.stack([picture(first + i) for i in range(length)])
            demo = data.create_group(name)
            demo.attrs["num_samples"] = length
            demo["actions"] = rng.normal(size=(length, 7))
            demo["dones"], demo["states"] = np.zeros(length, dtype=np.uint8), rng.normal(size=(length, 40))
            for group in ("obs", "next_obs"):
                demo.create_dataset(f"{group}/agentview_rgb", data=frames, compression="gzip")
                demo[f"{group}/eye_in_hand_rgb"] = 255 - frames
            demo["obs/ee_states"], demo["obs/gripper_states"] = rng.normal(size=(length, 6)), np.arange(length) / 3
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
        for key, value in dict(extra).items():
            file[key] = value
    return path


def write_aloha(path, number=0, length=15, cameras=("cam_high", "cam_left_wrist"), sizes=(90, 40)):
    """One episode as ACT records it: JPEG of each frame, padded to the longest of all cameras."""
    rng = np.random.default_rng(number)
    jpegs = [
        [simplejpeg.encode_jpeg(picture(number * 20 + i), quality=quality) for i in range(length)]
        for _, quality in zip(cameras, sizes, strict=True)
    ]
    lengths = np.array([[len(jpeg) for jpeg in of_camera] for of_camera in jpegs])
    with h5py.File(path, "w") as file:
        file.attrs["sim"], file.attrs["compress"] = False, True
        for camera, of_camera in zip(cameras, jpegs, strict=True):
            rows = [np.frombuffer(jpeg.ljust(lengths.max(), b"\0"), dtype=np.uint8) for jpeg in of_camera]
            file[f"observations/images/{camera}"] = np.stack(rows)
        for name in ("qpos", "qvel", "effort"):
            file[f"observations/{name}"] = rng.normal(size=(length, 14))
        file["action"] = rng.normal(size=(length, 14))
        file["compress_len"] = lengths.astype(np.float32)  # cameras t
    return path


def test_demos_of_robomimic_have_the_frames_actions_states_and_text_that_h5py_reads(tmp_path):
    path = write_robomimic(tmp_path / "drawer_demo.hdf5")
    source = open_source(
        f"hdf5:{path}?camera=agentview_rgb,eye_in_hand_rgb&state=ee_states,gripper_states&action=actions"
    )
    assert source.lengths.tolist() == [30, 9, 12] and source.fps.tolist() == [20.0] * 3
    assert (source.state_dim, source.action_dim) == (7, 7) and source.name == "hdf5-drawer_demo-agentview_rgb"
    assert source.camera == "observation.images.agentview_rgb"
    (wrist,) = source.views.values()
    assert wrist.camera == "observation.images.eye_in_hand_rgb" == next(iter(source.views))
    with h5py.File(path) as file:
        for episode, name in enumerate(["demo_0", "demo_2", "demo_10"]):
            demo, length = file["data"][name], source.lengths[episode]
            order = np.random.default_rng(0).permutation(length)
            read = source.read(episode, [*order, order[0]])
            frames = torch.from_numpy(demo["obs/agentview_rgb"][()]).permute(0, 3, 1, 2)
            assert torch.equal(read["frames"], frames[[*order, order[0]]])
            assert torch.equal(wrist.read(episode, order)["frames"], 255 - frames[order])
            state = np.concatenate([demo["obs/ee_states"], demo["obs/gripper_states"][()][:, None]], axis=1)
            assert np.array_equal(read["state"], state[[*order, order[0]]].astype(np.float32))
            assert np.array_equal(source.actions(episode, order), demo["actions"][()][order].astype(np.float32))
            assert source.instructions(episode, [3]) == [read["task"]] == ["open the drawer"]
            assert source.place(episode) == f"{path}, data/{name}"


def test_episodes_of_aloha_have_the_frames_actions_and_states_that_h5py_reads(tmp_path):
    for number, length in enumerate([15, 20]):
        write_aloha(tmp_path / f"episode_{number}.hdf5", number, length)
    source = open_source(f"hdf5:{tmp_path}?fps=50&camera=cam_left_wrist,cam_high")
    assert source.lengths.tolist() == [15, 20] and source.fps.tolist() == [50, 50]
    for episode in range(2):
        with h5py.File(tmp_path / f"episode_{episode}.hdf5") as file:
            for view in (source, *source.views.values()):
                camera = view.camera.removeprefix("observation.images.")
                row = ["cam_high", "cam_left_wrist"].index(camera)
                sizes = file["compress_len"][row].astype(int)
                frames = view.read(episode, [14, 3, 3, 0])["frames"]
                for frame, i in zip(frames, [14, 3, 3, 0], strict=True):
                    jpeg = file[f"observations/images/{camera}"][i, : sizes[i]].tobytes()
                    assert np.array_equal(frame.permute(1, 2, 0), simplejpeg.decode_jpeg(jpeg))
                assert numbers(frames) == [episode * 20 + i for i in (14, 3, 3, 0)]
            assert np.array_equal(source.states(episode, [3, 1]), file["observations/qpos"][()][[3, 1]].astype("f4"))
            assert np.array_equal(source.actions(episode, [2, 9]), file["action"][()][[2, 9]].astype(np.float32))
    assert source.instructions(1, [0, 1]) == ["", ""]


def test_frames_of_own_lengths_and_png_are_read_too(tmp_path):
    jpegs = [simplejpeg.encode_jpeg(picture(i)) for i in range(5)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        kind = h5py.vlen_dtype(np.uint8)
        file.create_dataset("observations/ragged", 5, kind)[:] = [np.frombuffer(jpeg, dtype=np.uint8) for jpeg in jpegs]
        file["observations/texts"] = np.array(jpegs)  # fixed length, padded with zeros
        file["action"] = np.zeros((5, 2))
    for camera in ("ragged", "texts"):
        source = HDF5Data(tmp_path / "a.h5", camera, fps=10)
        assert numbers(source.read(0, [4, 0, 2])["frames"]) == [4, 0, 2] and source.state_dim == 0


def test_what_is_not_chosen_and_cannot_be_told_is_listed(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5")
    cases = {
        "": r"expected \?camera=KEY, .* has obs/agentview_rgb \[48, 64, 3\], obs/eye_in_hand_rgb \[48, 64, 3\]$",
        "camera=front": r"camera=front; expected one of obs/agentview_rgb .*, obs/eye_in_hand_rgb",
        CAMERA: r"expected \?state=KEY, .*or \?state= for none; .* obs/ee_states \[6\], obs/gripper_states \[\]",
        f"{CAMERA}&state=qpos": r"state=qpos; expected one of actions \[7\], dones \[\], obs/ee_states",
        f"{CAMERA}&state=ee_states[8:]": r"ee_states\[8:\]: expected one number or more, got none",
        f"{CAMERA}&state=ee_states[a:]": r"state=ee_states\[a:\]; expected a key, or a range",
        f"{LIBERO}&mask=test": "mask=test; its masks: train",
        f"{LIBERO}&task=speech": "task=speech; expected one of num_samples, env_args, problem_info",
        f"{LIBERO}&flip=left": "expected flip=vertical, horizontal or both, got left",
        f"{LIBERO}&fps=0": "expected fps above 0, got 0",
    }
    for options, message in cases.items():
        with pytest.raises(ValueError, match=message):
            open_source(f"hdf5:{path}?{options}")
    with pytest.raises(ValueError, match=r"episode_0.hdf5: expected control_freq in env_args, or \?fps=20"):
        HDF5Data(write_aloha(tmp_path / "episode_0.hdf5"), "cam_high")
    with pytest.raises(ValueError, match=r"expected a file or a folder of .hdf5 or .h5, got a no file"):
        HDF5Data(tmp_path / "nothing")


def test_columns_are_chosen_by_range_order_and_none(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5")
    source = open_source(f"hdf5:{path}?{CAMERA}&state=gripper_states,ee_states[-2:]&action=actions[:3]")
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        expected = [demo["obs/gripper_states"][4], *demo["obs/ee_states"][4, -2:]]
        np.testing.assert_allclose(source.states(0, [4])[0], expected, rtol=1e-6)
        np.testing.assert_allclose(source.actions(0, [4])[0], demo["actions"][4, :3], rtol=1e-6)
    source = open_source(f"hdf5:{path}?{CAMERA}&state=&action=")
    assert (source.state_dim, source.action_dim) == (0, 0) and "state" not in source.read(0, [0])


def test_frames_are_turned_and_channels_exchanged_only_where_asked_for(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(path, "r+") as file:
        file["data/demo_0/obs/agentview_rgb"][0] = np.random.default_rng(0).integers(256, size=(48, 64, 3))
        stored = torch.from_numpy(file["data/demo_0/obs/agentview_rgb"][0]).permute(2, 0, 1)
    fingerprints = set()
    for options, turned in {
        "": stored,
        "&flip=vertical": stored.flip(1),
        "&flip=horizontal": stored.flip(2),
        "&flip=both&bgr=true": stored.flip(0, 1, 2),
    }.items():
        source = open_source(f"hdf5:{path}?{LIBERO}{options}")
        assert torch.equal(source.read(0, [0])["frames"][0], turned)
        fingerprints.add(source.fingerprint)
    assert len(fingerprints) == 4


def test_a_mask_takes_its_demos(tmp_path):
    source = open_source(f"hdf5:{write_robomimic(tmp_path / 'a.hdf5')}?{LIBERO}&mask=train")
    assert [source.place(episode)[-6:] for episode in range(2)] == ["demo_0", "demo_2"] and len(source.lengths) == 2


@pytest.mark.parametrize(
    ("name", "attributes", "key", "expected"),
    [
        ("KITCHEN_SCENE10_close_the_drawer_demo", {}, None, "close the drawer"),
        ("pick_up_the_cup_demo", {}, None, "pick up the cup"),
        ("episode_3", {}, None, ""),
        ("a_demo", {"/": {"instruction": b"from bytes"}}, None, "from bytes"),
        ("a_demo", {"data/demo_0": {"ep_meta": json.dumps({"lang": "robocasa's"})}}, None, "robocasa's"),
        ("a_demo", {"data": {"problem_info": json.dumps({"language_instruction": "libero's"})}}, None, "libero's"),
        ("a_demo", {"data": {"speech": "said"}, "/": {"task": "written"}}, "speech", "said"),
        ("a_demo", {"data": {"task": "written"}}, "words", "a text of its own"),
    ],
)
def test_the_instruction_is_by_attributes_or_the_name_of_the_file(tmp_path, name, attributes, key, expected):
    path = write_robomimic(tmp_path / f"{name}.hdf5", {"demo_0": 2}, problem=False)
    with h5py.File(path, "r+") as file:
        for group, texts in attributes.items():
            file[group].attrs.update(texts)
        file["data/demo_0/words"] = "a text of its own"
        assert instruction(file, path, "data/demo_0", key) == expected
    path.with_suffix(".txt").write_text("by hand\n")
    with h5py.File(path) as file:
        assert instruction(file, path, "data/demo_0", None) == "by hand"


def test_files_of_a_folder_are_tasks_and_demonstrations_are_of_each(tmp_path):
    for task in ("open_it", "KITCHEN_SCENE3_turn_it"):
        write_robomimic(tmp_path / f"{task}_demo.hdf5", problem=False)
    source = open_source(f"hdf5:{tmp_path}?{LIBERO}")
    assert [source.instructions(e, [0])[0] for e in range(6)] == ["turn it"] * 3 + ["open it"] * 3
    chosen = choose_demonstrations(source, range(6), 1, seed=0)
    assert len(chosen) == 2 and chosen[0] < 3 <= chosen[1]


def test_workers_give_the_same_batches_even_where_their_parent_has_read(tmp_path):
    source = open_source(f"hdf5:{write_robomimic(tmp_path / 'a.hdf5')}?{LIBERO}")
    mixture = Mixture([Clips(source, range(3), (0.0, 0.2), image_size=64)])
    expected = [batch for batch, _ in zip(loader(mixture, batch_size=16), range(3), strict=False)]
    spawned = loader(pickle.loads(pickle.dumps(mixture)), batch_size=16)  # as a spawned worker gets it
    for batches in (loader(mixture, batch_size=16, num_workers=2), spawned):
        for batch, wanted in zip(batches, expected, strict=False):
            for key in ("frames", "state", "action", "action_is_pad"):
                assert torch.equal(batch[key], wanted[key])
            first = torch.tensor([0, 20, 100])[batch["episode"]] + batch["index"]
            assert numbers(batch["frames"][:, 0]) == first.tolist()
            assert numbers(batch["frames"][:, 1]) == (first + 4).tolist()


def test_the_same_file_elsewhere_is_the_same_data_and_an_edited_one_is_not(tmp_path):
    path = write_robomimic(tmp_path / "a_demo.hdf5")
    before = HDF5Data(path, "agentview_rgb", "ee_states").fingerprint
    (tmp_path / "there").mkdir()
    copied = shutil.copy(path, tmp_path / "there" / "b_demo.hdf5")
    assert HDF5Data(copied, "agentview_rgb", "ee_states").fingerprint == before
    others = {HDF5Data(copied, "eye_in_hand_rgb", "ee_states").fingerprint}
    others.add(HDF5Data(copied, "agentview_rgb", "gripper_states").fingerprint)
    for key in ("obs/eye_in_hand_rgb", "actions"):
        with h5py.File(copied, "r+") as file:
            file[f"data/demo_2/{key}"][3] += 1
        others.add(HDF5Data(copied, "agentview_rgb", "ee_states").fingerprint)
    assert len(others | {before}) == 5


def damage(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:3000])
        return
    if how == "text":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        return
    with h5py.File(path, "r+") as file:
        demo = file["data/demo_2"]
        if how == "nan":
            demo["actions"][4, 1] = np.nan
        elif how == "short":
            del demo["obs/ee_states"]
            demo["obs/ee_states"] = np.zeros((8, 6))
        elif how == "wide":
            del demo["actions"]
            demo["actions"] = np.zeros((9, 8))
        elif how == "empty":
            del file["data"]
        else:
            del demo["obs/agentview_rgb"]


@pytest.mark.parametrize(
    ("how", "message", "num_left"),
    [
        ("cut", "a.hdf5: not a readable HDF5 file", 3),
        ("text", "a.hdf5: not a HDF5 file, but the pointer of Git LFS", 3),
        ("empty", r"a.hdf5: expected data/demo_0/obs, .*, got mask", 3),
        ("nan", r"a.hdf5, data/demo_2: actions, row 4: expected finite numbers, got \[.*nan", 5),
        ("short", "a.hdf5, data/demo_2: expected one row or more, of each as many, got .*'obs/ee_states': 8", 5),
        ("wide", "a.hdf5, data/demo_2: expected 7 numbers of action as in .*demo_0, got 8", 5),
        ("lacks", "a.hdf5, data/demo_2: expected obs/agentview_rgb, got actions, dones, obs/ee_states", 5),
    ],
)
def test_a_broken_file_or_episode_is_named_or_left_out_and_counted(tmp_path, caplog, how, message, num_left):
    damage(write_robomimic(tmp_path / "a.hdf5"), how)
    write_robomimic(tmp_path / "b.hdf5")
    with pytest.raises(ValueError, match=message):
        open_source(f"hdf5:{tmp_path}?{LIBERO}")
    with caplog.at_level(logging.WARNING):
        source = open_source(f"hdf5:{tmp_path}?{LIBERO}", skip_broken=True)
    assert source.num_skipped == 1 and len(source.lengths) == num_left and "a.hdf5" in caplog.text


def test_a_frame_that_cannot_be_read_names_file_camera_and_frame(tmp_path):
    path = write_aloha(tmp_path / "a.hdf5")
    with h5py.File(path, "r+") as file:
        file["observations/images/cam_high"][3, 200:] = 0
        file["observations/images/cam_high"][4] = 7
    source = HDF5Data(path, "cam_high", fps=50)
    for frame in (3, 4):
        with pytest.raises(ValueError, match=f"a.hdf5: observations/images/cam_high, frame {frame}: not a readable"):
            source.read(0, [2, frame])
    with pytest.raises(ValueError, match="a.hdf5: expected frame numbers below 15, got 0 to 15"):
        source.read(0, [0, 15])


def test_shards_take_it(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5")
    args = shards.Args(tmp_path / "shards", data=(f"hdf5:{path}?{LIBERO}",), codec="png")
    assert shards.main(args) == 0
    source, written = open_source(args.data[0]), open_source(f"shards:{tmp_path / 'shards'}")
    for episode, length in enumerate(source.lengths):
        found, expected = (s.read(episode, range(length)) for s in (written, source))
        assert torch.equal(found["frames"], expected["frames"]) and torch.equal(found["state"], expected["state"])
        assert torch.equal(*(s.actions(episode, range(length)) for s in (written, source)))
        assert found["task"] == expected["task"] and written.fps[episode] == 20


@pytest.mark.usefixtures("fresh_process")
def test_stage_1_trains_on_both_layouts(tmp_path):
    robomimic = write_robomimic(tmp_path / "open_demo.hdf5")
    (tmp_path / "aloha").mkdir()
    for number in range(3):
        write_aloha(tmp_path / "aloha" / f"episode_{number}.hdf5", number, 25)
    data = [f"hdf5:{robomimic}?{LIBERO}", f"hdf5:{tmp_path / 'aloha'}?fps=50&camera=cam_high"]
    flags = [*FLAGS[2:], *"--steps 2 --optimizer adamw --output-dir".split(), str(tmp_path / "run")]
    train_laq.main(tyro.cli(train_laq.Args, args=["--data", *data, *flags]))
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["state"] == "done"
