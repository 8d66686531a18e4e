"""tests/data/rlds_fixture was written by TensorFlow Datasets, and expected.npz read back by it: see write_rlds.py."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from hlrp import rlds
from hlrp.images import decode
from hlrp.rlds import BUCKET, DATASETS, MIXTURES, RLDS, mixture
from hlrp.sources import instructions
from hlrp.tfrecord import Feature, masked_crc32c, parse_example, read_features, read_records, read_tensor, values_of

DATA = Path(__file__).parent / "data"
FIXTURE = DATA / "rlds_fixture"
FILE = "tiny_robot-train.tfrecord-00001-of-00002"  # three records
SETTINGS = {"camera": "image", "fps": 5}


def tiny_robot(folder=FIXTURE, **settings):
    return RLDS(folder, **SETTINGS | settings)


def episodes(source):
    return [episode for shard in range(source.num_shards) for episode in source.episodes(shard)]


def expected(path, split="train"):
    """The values of a feature, those of each episode apart, as TensorFlow decoded them."""
    with np.load(FIXTURE / "expected.npz") as data:
        values, lengths = data[f"{split}/{path}"], data[f"{split}/lengths"]
    return np.split(values, lengths.cumsum()[:-1]) if path.startswith("steps/") else list(values)


@pytest.fixture
def copy(tmp_path):
    """A copy of the fixture, to be damaged."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "tiny_robot"))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("camera", ["image", "wrist_image", "pixels"])  # JPEG, PNG, a tensor
def test_frames_equal_those_that_tensorflow_reads(split, camera):
    source = tiny_robot(split=split, camera=camera)
    wanted = expected(f"steps/observation/{camera}", split)
    for episode, frames in zip(episodes(source), wanted, strict=True):
        read = episode.read(range(len(episode.frames)))["frames"].permute(0, 2, 3, 1)
        assert torch.equal(read, torch.from_numpy(frames))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("world_vector", "action/world_vector"),
        ("rotation_delta", "action/rotation_delta"),  # float64
        ("terminate_episode", "action/terminate_episode"),  # int32, some negative
        ("open_gripper", "action/open_gripper"),  # bool
        ("joints", "observation/joints"),  # zlib
        ("present/counts", "observation/present/counts"),  # int64, a name with a slash
        ("reward", "reward"),
    ],
)
def test_numbers_equal_those_that_tensorflow_reads(split, key, path):
    source = tiny_robot(split=split, action=key)
    for episode, values in zip(episodes(source), expected(f"steps/{path}", split), strict=True):
        np.testing.assert_array_equal(episode.action, values.reshape(len(values), -1).astype(np.float32))
        assert episode.action.dtype == np.float32 and episode.action.shape[1] == source.action_dim


@pytest.mark.parametrize("key", ["language_instruction", "instruction"])  # text, and its bytes as int32
def test_text_and_facts_equal_those_that_tensorflow_reads(key):
    found = episodes(tiny_robot(instruction=key))
    assert [e.task for e in found] == [t[0].decode() for t in expected("steps/language_instruction")]
    assert "推开门" in {e.task for e in found}
    facts = {
        "episode_metadata/episode_id": expected("episode_metadata/episode_id"),
        "episode_metadata/file_path": [path.decode() for path in expected("episode_metadata/file_path")],
        "episode/success": expected("success"),
        "episode/robot": expected("robot"),
    }
    assert [e.facts for e in found] == [dict(zip(facts, row, strict=True)) for row in zip(*facts.values(), strict=True)]
    json.dumps([e.facts for e in found])


def test_an_action_of_parts_is_joined_in_the_order_of_the_keys_and_else_of_the_floats_names():
    world, turn = expected("steps/action/world_vector"), expected("steps/action/rotation_delta")
    for episode, *parts in zip(episodes(tiny_robot()), turn, world, strict=True):
        np.testing.assert_array_equal(episode.action, np.concatenate(parts, 1, dtype=np.float32, casting="unsafe"))

    source = tiny_robot(action="world_vector[:2],rotation_delta[-1:]", state="state[1:3]")
    assert (source.action_dim, source.state_dim) == (3, 2)
    state = expected("steps/observation/state")
    for episode, w, t, s in zip(episodes(source), world, turn, state, strict=True):
        parts = np.concatenate([w[:, :2], t[:, -1:]], 1).astype(np.float32)
        np.testing.assert_array_equal(episode.actions(range(len(parts))).numpy(), parts)
        np.testing.assert_array_equal(episode.read([0])["state"].numpy(), s[:1, 1:3].astype(np.float32))

    assert episodes(tiny_robot(action="", state=""))[0].action is None


def test_splits_are_joined_and_all_steps_are_there_in_their_order():
    source = tiny_robot(split="train,val", action="is_first,is_last")
    found = episodes(source)
    assert [len(e.frames) for e in found] == [*expected("lengths"), *expected("lengths", "val")]
    for episode in found:
        assert episode.action[:, 0].tolist() == [1] + [0] * (len(episode.frames) - 1)
        assert episode.action[:, 1].tolist() == [0] * (len(episode.frames) - 1) + [1]


@pytest.mark.parametrize("key", ["language_instruction", "instruction"])
def test_an_episode_without_steps_is_named_and_the_one_behind_it_follows(tmp_path, key):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    first, second = sorted(tmp_path.glob("tiny_robot-empty*"))
    joined = first.with_name("tiny_robot-empty.tfrecord-00000-of-00001")
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["splits"][-1]["shardLengths"] = ["2"]
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))

    reading = tiny_robot(tmp_path, split="empty", instruction=key).episodes(0)
    with pytest.raises(ValueError, match=f"{joined.name}, record 0: an episode without frames"):
        next(reading)
    assert [len(episode.frames) for episode in reading] == [1]


def test_exchanged_colours_are_put_in_order():
    plain, mended = (episodes(tiny_robot(camera="wrist_image", bgr=bgr))[0] for bgr in (None, True))
    indices = range(len(plain.frames))
    assert torch.equal(mended.read(indices)["frames"], plain.read(indices)["frames"].flip(1))


def test_the_version_below_a_folder_is_found_and_one_of_several_is_asked_for(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "0.1.0")
    assert tiny_robot(tmp_path).fingerprint == tiny_robot().fingerprint
    shutil.copytree(FIXTURE, tmp_path / "1.0.0")
    with pytest.raises(ValueError, match="or with a single version of it, got one with 0.1.0, 1.0.0"):
        tiny_robot(tmp_path)


def test_the_fingerprint_is_of_the_records(tmp_path):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    assert tiny_robot(tmp_path).fingerprint == tiny_robot().fingerprint
    file = min(tmp_path.glob("*-train.tfrecord-*"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert tiny_robot(tmp_path).fingerprint != tiny_robot().fingerprint


def test_of_several_versions_of_a_known_data_set_that_of_the_table_is_taken(tmp_path):
    for version in ("0.1.0", "1.0.0"):
        shutil.copytree(FIXTURE, tmp_path / "bc_z" / version)
    assert tiny_robot(tmp_path / "bc_z").files[0].startswith(f"{tmp_path}/bc_z/0.1.0/")


def test_a_url_reads_the_same():
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(FIXTURE), "/rlds/tiny_robot/0.1.0", recursive=True)
    local, remote = tiny_robot(), tiny_robot("memory://rlds/tiny_robot")
    assert remote.fingerprint == local.fingerprint
    for mine, other in zip(episodes(remote), episodes(local), strict=True):
        assert (list(mine.frames), mine.task, mine.facts) == (list(other.frames), other.task, other.facts)
        np.testing.assert_array_equal(mine.action, other.action)
    assert mine.name == f"memory://rlds/tiny_robot/0.1.0/{FILE}, record 2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"camera": None}, "several cameras; expected .*image, pixels, wrist_image"),
        ({"camera": "depth"}, "camera=depth has no RGB frames of 8 bits; these have: image, pixels, wrist_image"),
        ({"camera": "top"}, "camera=top is not in features.json; expected one of image, pixels, wrist_image"),
        (
            {"instruction": "goal"},
            "instruction=goal is not in features.json; expected one of .*steps/language_instruction",
        ),
        ({"action": "torque"}, "action=torque is not in features.json; expected one of .*steps/action/world_vector"),
        ({"action": "world_vector[3:]"}, r"action=world_vector\[3:\] of 3 numbers"),
        ({"action": "world_vector[x]"}, r"action=world_vector\[x\]; expected a key, or a range"),
        (
            {"state": "touches"},
            r"state=steps/observation/touches is a tensor of int64 \[\]; expected numbers of a constant shape",
        ),
        ({"state": "image"}, "state=steps/observation/image is a image of uint8"),
        ({"state": "success"}, "state=success is a tensor of bool"),
        ({"fps": None}, "fps=None, and that of tiny_robot is not known; expected .fps=10"),
        ({"fps": 0}, "fps=0"),
        ({"split": "test"}, "split=test; expected one of train, val, empty"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings, message):
    with pytest.raises(ValueError, match=f"rlds:.*{message}"):
        tiny_robot(**settings)


def test_missing_files_are_named_at_once(copy, tmp_path):
    (copy / FILE).unlink()
    with pytest.raises(ValueError, match=f"1 of 2 files are missing in .*{FILE}"):
        tiny_robot(copy)
    (copy / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="dataset_info.json cannot be read"):
        tiny_robot(copy)
    with pytest.raises(ValueError, match="nowhere cannot be listed"):
        tiny_robot(tmp_path / "nowhere")


def record_starts(data):
    starts = [0]
    while starts[-1] < len(data):
        starts.append(starts[-1] + 16 + struct.unpack_from("<Q", data, starts[-1])[0])
    return starts


@pytest.mark.parametrize(
    ("place", "message", "num_left"),
    [
        (0, "record 1: the checksum of its length is wrong", 0),  # the length
        (8, "record 1: the checksum of its length is wrong", 0),  # its checksum
        (12, "record 1: the checksum of its data is wrong", 1),  # the first byte of the data
        (-1, "record 1: the checksum of its data is wrong", 1),  # the checksum of the data
    ],
)
def test_a_flipped_bit_is_found_and_named_and_what_lies_behind_a_known_length_follows(copy, place, message, num_left):
    data = bytearray((copy / FILE).read_bytes())
    starts = record_starts(data)
    data[starts[1] + place if place >= 0 else starts[2] + place] ^= 4
    (copy / FILE).write_bytes(data)

    reading = tiny_robot(copy).episodes(1)
    next(reading)
    with pytest.raises(ValueError, match=f"{FILE}, {message}"):
        next(reading)
    assert len(list(reading)) == num_left


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda starts: starts[2] + 5, "record 2: truncated; the file ends within its header"),
        (lambda starts: starts[2] + 12, "record 2: truncated; expected .*, got 0"),
        (lambda starts: starts[3] - 2, "record 2: truncated"),
        (lambda starts: starts[2], ": expected 3 records, got 2"),
        (lambda starts: 0, ": expected 3 records, got 0"),
    ],
)
def test_a_truncated_file_is_named(copy, keep, message):
    data = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(data[: keep(record_starts(data))])
    with pytest.raises(ValueError, match=f"{FILE}.*{message}"):
        list(tiny_robot(copy).episodes(1))


def test_garbage_is_named(copy):
    (copy / FILE).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=f"{FILE}, record 0: .*or no TFRecord file"):
        list(tiny_robot(copy).episodes(1))
    data = b"\x0a\x05garbage"
    header, footer = struct.pack("<Q", len(data)), struct.pack("<I", masked_crc32c(data))
    (copy / FILE).write_bytes(header + struct.pack("<I", masked_crc32c(header)) + data + footer)
    with pytest.raises(ValueError, match=f"{FILE}, record 0: .*not a tf.train.Example"):
        list(tiny_robot(copy).episodes(1))


def test_every_flipped_byte_of_a_file_is_found(copy):
    """Checksums find all errors of 8 bits in a row (a burst no longer than the checksum)."""
    path, rng = copy / FILE, np.random.default_rng(0)
    data = path.read_bytes()
    for place in rng.integers(len(data), size=50):
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{FILE}, record"):
            [record.verified() for record in read_records(str(path))]


def varint(value):
    value, octets = value % 2**64, []
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*octets, value])


def field(number, value):
    """A field of a proto: an int as a varint, bytes length-delimited, a float in 4 bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def example_of(feature):
    """An Example with this feature at steps/x, among fields that are not known here."""
    entry = field(1, b"steps/x") + field(2, feature)
    return field(5, 3) + field(1, field(4, b"?") + field(1, entry))


NEGATIVE = [0, 1, -1, 127, 128, -(2**63), 2**63 - 1, 300, -40]


@pytest.mark.parametrize(
    ("feature", "kind", "values"),
    [
        (field(1, field(1, b"a") + field(1, b"") + field(1, b"\xff")), "bytes", [b"a", b"", b"\xff"]),
        (field(2, field(1, struct.pack("<3f", 1, -2, 0.5))), "float", [1, -2, 0.5]),
        (field(2, field(1, 1.0) + field(1, -2.0)), "float", [1, -2]),  # not packed
        (field(3, field(1, b"".join(map(varint, NEGATIVE)))), "int64", NEGATIVE),
        (field(3, b"".join(field(1, value) for value in NEGATIVE)), "int64", NEGATIVE),  # not packed
        (field(3, field(1, varint(7)) + field(1, -1) + field(1, varint(2) + varint(3))), "int64", [7, -1, 2, 3]),
        (field(3, field(9, b"unknown") + field(1, varint(5)) + field(8, 2.0) + field(7, 1)), "int64", [5]),
        (field(6, b"unknown") + field(3, field(1, varint(5))), "int64", [5]),
        (field(2, b""), "float", []),
        (b"", "int64", []),
    ],
)
def test_features_made_by_hand_are_read(feature, kind, values):
    assert list(values_of(parse_example(example_of(feature)), "steps/x", kind)) == values


@pytest.mark.parametrize(
    "feature",
    [
        field(3, field(1, b"\x80")),  # a varint that does not end
        field(3, field(1, b"\xff" * 10 + b"\x01")),  # of 11 bytes
        field(2, field(1, b"123")),  # no whole float
        b"\x1a\x05\x0a",  # ends early
        b"\x0b",  # a group
        b"\xff" * 11,
    ],
)
def test_features_that_are_none_are_refused(feature):
    with pytest.raises(ValueError, match="not a tf.train.Example"):
        parse_example(example_of(feature))


@pytest.mark.parametrize("feature", [field(3, field(1, 1.0)), field(1, field(1, 3)), field(2, field(1, 3))])
def test_a_value_of_another_kind_than_its_list_is_no_value(feature):
    """To protobuf it is a field of a later version, which a reader skips; its number of values then tells."""
    example = parse_example(example_of(feature))
    assert len(getattr(example["steps/x"], example["steps/x"].WhichOneof("kind")).value) == 0


def test_a_tensor_of_another_type_or_size_than_features_json_has_is_refused():
    example = parse_example(
        field(1, field(1, field(1, b"x") + field(2, field(2, field(1, struct.pack("<3f", 1, 2, 3))))))
    )
    assert read_tensor(example, "x", Feature("tensor", "float32", (3,), "none", 1)).shape == (1, 3)
    for dtype, shape, encoding in [("float32", (2,), "none"), ("int64", (3,), "none"), ("float32", (3,), "zlib")]:
        with pytest.raises(ValueError, match="^x has"):
            read_tensor(example, "x", Feature("tensor", dtype, shape, encoding, 1))
    with pytest.raises(ValueError, match="y is missing"):
        read_tensor(example, "y", Feature("tensor", "float32", (3,), "none", 1))


def test_features_of_unknown_kinds_are_listed_but_not_read():
    features = read_features("rlds:x", json.loads((FIXTURE / "features.json").read_text()))
    assert features["steps/observation/image"] == Feature("image", "uint8", (16, 24, 3), "none", 1)
    assert features["steps/observation/joints"] == Feature("tensor", "float32", (2, 3), "zlib", 1)
    assert features["steps/observation/touches"].depth == 2
    audio = {"pythonClassName": "x.Audio", "audio": {"shape": {"dimensions": ["-1"]}, "dtype": "int64"}}
    assert read_features("rlds:x", {"featuresDict": {"features": {"a": audio}}})["a"].kind == "audio"
    with pytest.raises(ValueError, match="rlds:x: expected features.json as .* got keys"):
        read_features("rlds:x", {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict"})


def test_the_mixture_of_octo_has_24_known_data_sets():
    assert len(MIXTURES["octo24"]) == 24
    sources = dict(mixture("octo24", "/data/open_x/"))
    assert len(sources) == 24 and sum(sources.values()) == pytest.approx(1)
    assert sources["rlds:/data/open_x/kuka"] == pytest.approx(0.17 / 0.996, abs=1e-3)
    assert sources["rlds:/data/open_x/bridge_dataset"] == sources["rlds:/data/open_x/kuka"]
    for name in MIXTURES["octo24"]:
        assert DATASETS[name].fps > 0 and DATASETS[name].camera and DATASETS[name].action
    assert f"rlds:{BUCKET}/bridge_data_v2" in dict(mixture("octo24", BUCKET))
    with pytest.raises(ValueError, match="rlds:octo25: .*expected .*octo24"):
        mixture("octo25", "/data")
    with pytest.raises(ValueError, match="rlds:octo24: .*root=DIR"):
        mixture("octo24", None)


# What the TFDS catalogue says of these data sets, or by their authors' scripts: shapes of images and numbers in a step
CATALOGUE = json.loads((DATA / "open_x_features.json").read_text())


@pytest.mark.parametrize("name", MIXTURES["octo24"])
def test_the_table_fits_the_published_features(name, tmp_path):
    def node(shape):
        dtype = {"image": "uint8", "string": "string", "bool": "bool"}.get(shape[0], shape[0])
        kind = "image" if shape[0] == "image" else "tensor"
        return {kind: {"shape": {"dimensions": [str(size) for size in shape[1:]]}, "dtype": dtype}}

    tree = {"featuresDict": {"features": {}}}
    for path, shape in CATALOGUE[name].items():
        tree["featuresDict"]["features"][path] = node(shape)
    steps = {"featuresDict": {"features": {"steps": {"sequence": {"feature": tree}}}}}
    info = {"name": name, "splits": [{"name": "train", "shardLengths": ["1"]}]}
    (tmp_path / "features.json").write_text(json.dumps(steps))
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / f"{name}-train.tfrecord-00000-of-00001").touch()

    source = RLDS(tmp_path)
    assert source.fps == DATASETS[name].fps and source.camera == DATASETS[name].camera
    assert source.instruction_path and 2 <= source.action_dim <= 8 and source.state_dim <= 15
    assert source.is_bgr == (name in MENDED_BY_SCRIPT)


MENDED_BY_SCRIPT = (
    "stanford_hydra_dataset_converted_externally_to_rlds",
    "utaustin_mutex",
    "berkeley_fanuc_manipulation",
)


@pytest.mark.slow
def test_a_data_set_that_tensorflow_datasets_writes_now_reads_the_same(tmp_path):
    """About a minute, most of it for the installation of TensorFlow."""
    python = tmp_path / "tfds" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tfds"], check=True)
    packages = ["tensorflow-cpu==2.21.0", "tensorflow-datasets==4.9.10"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    subprocess.run([python, DATA / "write_rlds.py", tmp_path / "tiny_robot"], check=True)
    written, kept = tiny_robot(tmp_path / "tiny_robot"), tiny_robot()
    assert written.fingerprint == kept.fingerprint
    for mine, other in zip(episodes(written), episodes(kept), strict=True):
        assert (mine.task, mine.facts) == (other.task, other.facts)
        np.testing.assert_array_equal(mine.action, other.action)
        for new, old in zip(mine.frames, other.frames, strict=True):
            assert torch.equal(decode(new, "new"), decode(old, "old"))
    with np.load(tmp_path / "tiny_robot" / "expected.npz") as new, np.load(FIXTURE / "expected.npz") as old:
        assert new.files == old.files
        for key in old.files:
            np.testing.assert_array_equal(new[key], old[key])


def test_the_instruction_is_that_of_each_step_and_an_empty_first_one_empties_no_other(monkeypatch):
    source = tiny_robot()
    read = rlds.read_strings

    def of_steps(example, path):
        texts = read(example, path)
        if path != source.instruction_path:
            return texts
        return [b"", *[b"push"] * (len(texts) - 2), b"let go"][: len(texts)]

    monkeypatch.setattr(rlds, "read_strings", of_steps)
    episode = max(episodes(source), key=lambda e: len(e.frames))
    length = len(episode.frames)
    assert length > 2 and episode.instructions([0, 1, length - 1]) == ["", "push", "let go"]
    assert episode.read([1, 0])["task"] == episode.instructions([1])[0]
    assert instructions([source]) == ["", "let go", "push"]


def test_actions_that_are_not_finite_name_episode_column_and_step(monkeypatch):
    source = tiny_robot(action="world_vector")
    read = rlds.read_tensor

    def with_nan(example, path, feature):
        values = np.array(read(example, path, feature))
        if path == "steps/action/world_vector":
            values[1, 0] = np.nan
        return values

    monkeypatch.setattr(rlds, "read_tensor", with_nan)
    with pytest.raises(
        ValueError, match="record 0: steps/action/world_vector, step 1: expected finite numbers, got .nan"
    ):
        next(source.episodes(0))
