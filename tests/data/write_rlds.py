"""Writes tests/data/rlds_fixture, an RLDS dataset by TensorFlow Datasets itself, and what that reads back from it.

    python3.12 -m venv /tmp/tfds && /tmp/tfds/bin/pip install tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10
    /tmp/tfds/bin/python tests/data/write_rlds.py tests/data/rlds_fixture

It needs nothing of hlrp. expected.npz has SPLIT/lengths, the steps of each episode, and for each feature SPLIT/PATH,
its values in all steps of all episodes, one after another, as TensorFlow decodes them; JPEG by the accurate inverse
transform, since that which it would take, the fast one, is up to 16 levels off.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

LENGTHS = {"train": [3, 5, 1, 4, 2], "val": [2, 3], "empty": [0, 1]}  # steps of the episodes
TASKS = ["pick up the red block", "öffne die Schublade", "推开门", "", "pick up the red block"]


def picture(size, number):
    """A smooth ramp, and a bright square that moves: what JPEG keeps well and PNG packs well."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    image = np.stack([200 * x / width, 200 * y / height, np.full(size, 8 * number)], -1).astype(np.uint8)
    image[2:8, 2 + number % 8 : 6 + number % 8] = (250, 220, 30)
    return image


class TinyRobot(tfds.core.GeneratorBasedBuilder):
    """Every type of value that Open X-Embodiment has, of few and small steps."""

    VERSION = tfds.core.Version("0.1.0")
    pkg_dir_path = Path(tempfile.gettempdir())

    def _info(self):
        features = tfds.features
        step = {
            "observation": {
                "image": features.Image(shape=(16, 24, 3), encoding_format="jpeg"),
                "wrist_image": features.Image(shape=(16, 16, 3), encoding_format="png"),
                "depth": features.Image(shape=(3, 4, 1), dtype=np.float32, encoding_format="png"),
                "pixels": features.Tensor(shape=(4, 6, 3), dtype=np.uint8),
                "state": features.Tensor(shape=(5,), dtype=np.float64),
                "joints": features.Tensor(shape=(2, 3), dtype=np.float32, encoding="zlib"),
                "gripper": np.bool_,
                "present/counts": features.Tensor(shape=(2,), dtype=np.int64),
                "touches": features.Sequence(np.int64),
                "instruction": features.Tensor(shape=(64,), dtype=np.int32),
            },
            "action": {
                "world_vector": features.Tensor(shape=(3,), dtype=np.float32),
                "rotation_delta": features.Tensor(shape=(3,), dtype=np.float64),
                "open_gripper": np.bool_,
                "terminate_episode": features.Tensor(shape=(3,), dtype=np.int32),
            },
            "reward": features.Scalar(dtype=np.float32),
            "is_first": np.bool_,
            "is_last": np.bool_,
            "language_instruction": features.Text(),
        }
        return self.dataset_info_from_configs(
            features=features.FeaturesDict(
                {
                    "steps": features.Dataset(step),
                    "episode_metadata": {"file_path": features.Text(), "episode_id": np.int32},
                    "success": np.bool_,
                    "robot": features.ClassLabel(names=["arm", "hand"]),
                }
            )
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in LENGTHS}

    def _generate_examples(self, split):
        for episode, length in enumerate(LENGTHS[split]):
            rng = np.random.default_rng(episode)
            yield (
                episode,
                {
                    "steps": [self.step(rng, episode, t, length) for t in range(length)],
                    "episode_metadata": {"file_path": f"/raw/{split}/{episode}.npz", "episode_id": -episode - 1},
                    "success": episode % 2 == 0,
                    "robot": ["arm", "hand"][episode % 2],
                },
            )

    def step(self, rng, episode, t, length):
        text = TASKS[episode].encode()
        return {
            "observation": {
                "image": picture((16, 24), t + episode),
                "wrist_image": picture((16, 16), t + 2 * episode),
                "depth": rng.random((3, 4, 1), np.float32),
                "pixels": picture((4, 6), 2 * t + episode),
                "state": rng.normal(size=5),
                "joints": rng.normal(size=(2, 3)).astype(np.float32),
                "gripper": bool(t % 2),
                "present/counts": np.array([-t - 1, t * 10**12], np.int64),
                "touches": np.arange(t, dtype=np.int64),
                "instruction": np.frombuffer(text.ljust(64, b"\0"), np.uint8).astype(np.int32),
            },
            "action": {
                "world_vector": rng.normal(size=3).astype(np.float32),
                "rotation_delta": rng.normal(size=3),
                "open_gripper": bool(rng.integers(2)),
                "terminate_episode": np.array([t == length - 1, -1, 300], np.int32),
            },
            "reward": np.float32(t == length - 1),
            "is_first": t == 0,
            "is_last": t == length - 1,
            "language_instruction": TASKS[episode],
        }


def paths(tree, prefix=""):
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        yield from paths(value, path) if isinstance(value, dict) else [(path, value)]


def read_back(builder):
    expected = {}
    settings = {
        "read_config": tfds.ReadConfig(interleave_cycle_length=1),  # file after file
        "decoders": {"steps": {"observation": {"image": tfds.decode.SkipDecoding()}}},
    }
    for split in ("train", "val"):
        columns = {"lengths": []}
        for episode in builder.as_dataset(split=split, **settings):
            steps = list(tfds.as_numpy(episode.pop("steps")))
            columns["lengths"].append(len(steps))
            for step in steps:
                jpeg = step["observation"]["image"]
                step["observation"]["image"] = tf.image.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE").numpy()
            for tree in [tfds.as_numpy(episode), *({"steps": step} for step in steps)]:
                for path, value in paths(tree):
                    columns.setdefault(path, []).append(value)
        del columns["steps/observation/touches"]  # of several lengths
        for path, values in columns.items():
            values = np.asarray(values)
            expected[f"{split}/{path}"] = values.astype("S") if values.dtype == object else values
    return expected


def main(folder):
    with tempfile.TemporaryDirectory() as data_dir:
        builder = TinyRobot(data_dir=data_dir)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2, try_download_gcs=False))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(builder.data_path, folder)
    np.savez_compressed(Path(folder) / "expected.npz", **read_back(tfds.builder_from_directory(folder)))


if __name__ == "__main__":
    main(sys.argv[1])
