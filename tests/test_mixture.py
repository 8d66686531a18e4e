"""Sources of all formats in one run of train_laq.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_lerobot_data
import test_videos

import train_laq
from hlrp import shards
from hlrp.laq import LAQConfig
from hlrp.sources import parse_uri

RLDS = Path(__file__).parent / "data" / "rlds_fixture"
MODEL = {"image_size": 16, "patch_size": 8, "codebook_size": 8}
SETTINGS = {"val_samples": 8, "steps": 40, "batch_size": 8, "warmup_steps": 2, "num_workers": 2}
EVERY = {"log_freq": 40, "eval_freq": 40, "save_freq": 20}

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    shards.main(shards.Args(folder / "shards", ("world:clean?episodes=12",), frames_per_shard=100))
    test_lerobot_data.write(folder / "robot")
    (folder / "clips").mkdir()
    for i in range(2):
        test_videos.write(folder / "clips" / f"{i}.mp4")
    return (
        f"shards:{folder}/shards@2",
        f"rlds:{RLDS}?fps=10&camera=image&split=train,val@1",
        f"lerobot:{folder}/robot@1",
        f"videos:{folder}/clips@0.5",
    )


def train(output_dir, data, **settings):
    model = LAQConfig(**MODEL)
    train_laq.main(
        train_laq.Args(
            **SETTINGS | EVERY | {"data": data, "val_fraction": 0.3} | settings, model=model, output_dir=output_dir
        )
    )
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_shards_open_x_lerobot_and_videos_train_as_one_mixture(data, tmp_path, capfd):
    lines = train(tmp_path / "run", data)
    (logged,) = (line for line in lines if line["split"] == "train")
    shares = [value for name, value in logged.items() if name.startswith("share/")]
    weights = np.array([parse_uri(uri).weight for uri in data])
    assert np.abs(shares - weights / weights.sum()).max() < 0.02
    (found,) = (line for line in lines if line["split"] == "val")
    assert len({name.split("/")[0] for name in found if "true_over_copy" in name}) == 4
    out = capfd.readouterr()
    assert "clips and 1 stream(s) of 4 source(s)" in out.out + out.err

    step = json.loads((tmp_path / "run/checkpoints/000020/training_state/training_step.json").read_text())
    assert step["turns"]["rlds-tiny_robot-image"] > 0
    shutil.rmtree(tmp_path / "run/checkpoints/000040")
    train(tmp_path / "run", data)
    assert "is a stream: it goes on at the beginning of shard" in "".join(capfd.readouterr())
