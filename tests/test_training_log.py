import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hlrp.laq_validation import findings
from hlrp.training_log import Log, Stopwatch, findings_table, stragglers


def test_a_stopwatch_adds_up_forward_passes(monkeypatch):
    clock = [7.0]
    model = nn.Identity()
    watch = Stopwatch(model, torch.device("cpu"))
    monkeypatch.setattr(watch, "now", lambda: clock[0])
    model.register_forward_pre_hook(lambda *_: clock.append(clock.pop() + 0.02))
    for _ in range(3):
        model(torch.zeros(1))
        clock[0] += 0.1  # between the passes
    assert watch.read() == pytest.approx(0.06) and watch.read() == 0


def test_ranks_that_hold_up_the_others_are_named():
    times = torch.tensor([[0.0, 0.3], [0.1, 0.2], [0.9, 0.3], [0.0, 0.31]])
    assert "median 0.30 s: rank 2 1.20 s (0.90 waiting for data)" in stragglers(times)
    assert stragglers(times[[0, 1, 3]]) is None


def test_pictures_and_videos_of_a_run_reach_wandb_under_names_that_stay_the_same(tmp_path):
    import wandb
    from PIL import Image

    files = [tmp_path / "grids" / "left" / "usage_000007.png", tmp_path / "videos" / "step_000007" / "task" / "0.mp4"]
    for file in files:
        file.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(files[0])
    files[1].write_bytes(b"a video")
    logged = []
    tracker = SimpleNamespace(name="wandb", tracker=SimpleNamespace(log=lambda *a, **o: logged.append((*a, o))))
    others = SimpleNamespace(name="tensorboard", tracker=None)
    log = SimpleNamespace(folder=tmp_path, accelerator=SimpleNamespace(trackers=[others, tracker]))
    Log.show(log, files, step=7)
    ((media, options),) = logged
    assert options == {"step": 7} and list(media) == ["grids/left/usage", "videos/task/0"]
    assert isinstance(media["grids/left/usage"], wandb.Image) and isinstance(media["videos/task/0"], wandb.Video)


def test_a_validation_is_a_table_with_controls_and_verdicts_in_words():
    codes, actions = (
        ["error of pixels with another pair's code / with its own"],
        ["R2 of the true actions from the codes"],
    )
    report = {
        "a": {"true_over_copy": {"pixels": 0.1634}, "shuffled_over_true": {"pixels": 6.2}, "action_r2": 0.65}
        | {"action_r2_random": -0.01},
        "b": {"true_over_copy": {"pixels": 0.998}, "shuffled_over_true": {"pixels": 1.1}},
    }
    rows = findings(report)
    assert [row[0] for row in rows] == ["a", "a", "a", "b", "b"]
    assert rows[0][1:] == ("error of pixels / error of the first frame", "0.16", "1", "predicted")
    assert rows[1][1:] == (*codes, "6.20", "1", "the codes are used")
    assert rows[2][1:] == (*actions, "0.65", "random codes -0.01", "the codes tell the actions")
    assert [row[4] for row in rows[3:]] == ["no better than the first frame shown again", "the codes are hardly used"]
    lines = findings_table("validation after step 3", rows).splitlines()
    assert lines[:2] == ["validation after step 3", "  a"] and lines[5] == "  b" and len(lines) == 8
    assert len({line.index("(") for line in lines if "(" in line}) == 1


def test_an_eta_above_a_day_counts_the_days_and_much_waiting_for_data_is_told_once(tmp_path, capfd):
    logged = []
    accelerator = SimpleNamespace(is_main_process=True, init_trackers=lambda *args, **settings: None)
    accelerator.log = lambda values, step: logged.append((values, step))
    log = Log(accelerator, tmp_path, 0, 9, {}, "run", "hlrp")
    values = {"loss": 1.0, "samples_per_s": 1.0, "data_wait": 0.0, "lr": 0.1, "eta_s": 2 * 86400 + 3700.4}
    log.write("train", values, 1)
    assert "step 1/9  loss 1.0000  1 samples/s  data 0%  lr 1.0e-01  eta 2 days, 1:01:40" in capfd.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "split": "train", **values}
    assert logged == [({f"train/{name}": value for name, value in values.items()}, 1)]
    for step, waited in enumerate((0.9, 0.2, 0.4, 0.8), 2):
        log.write("train", values | {"data_wait": waited}, step)
    told = [line for line in capfd.readouterr().err.splitlines() if "waits for data" in line]
    assert len(told) == 1 and told[0].startswith("training waits for data 40% of its time: more --num-workers")
