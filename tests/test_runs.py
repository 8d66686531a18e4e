import csv
import json

import pytest

from hlrp.runs import Args, main, read_run

SETTINGS = {"steps": 100, "batch_size": 4, "grad_accumulation": 2, "num_processes": 2, "lr": 0.001, "quantizer": "fsq"}


@pytest.fixture
def folder(tmp_path):
    """Three runs: one done, one that failed early, one under way whose log is being written."""

    def write(name, state, steps, figures, **settings):
        path = tmp_path / "sweep" / name
        path.mkdir(parents=True)
        record = {
            "command": ["train_laq.py"],
            "state": state,
            "device": "cuda",
            "settings": SETTINGS | {"output_dir": str(path)} | settings,
        }
        (path / "run.json").write_text(json.dumps(record))
        lines = [{"step": s, "split": "train", "loss": 1 / s, "samples_per_s": 16.0} for s in steps]
        lines += [{"step": steps[-1], "split": "val", "robot/action_r2": x, "robot/pairs": 9} for x in figures]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')

    write("a", "done", [50, 100], [0.2, 0.5], data=["world:clean", "videos:DIR|x"])
    write("b", "failed", [10], [], lr=0.1, data=["world:clean"])
    write("c", "running", [50], [0.7], data=["world:clean"], quantizer="vq")
    return tmp_path


def table(capsys, *folders, **args) -> list[list[str]]:
    main(Args(folders=folders, format="csv", **args))
    return list(csv.reader(capsys.readouterr().out.splitlines()))


def test_a_row_has_what_differs_what_was_measured_last_what_it_took_and_how_it_stands(folder, capsys):
    head, a, b, c = table(capsys, folder)
    assert head == "run lr quantizer data val/robot/action_r2 hours device step state".split()
    assert a[1:5] == ["0.001", "fsq", "world:clean videos:DIR|x", "0.5"]
    assert b[1] == "0.1" and b[4] == "-"
    assert c[-2:] == ["50/100", "running"]


def test_hours_are_of_all_processes_at_the_logged_speed(folder):
    row = read_run(folder / "sweep/a", ())
    assert row["hours"] == pytest.approx(100 * (4 * 2 * 2) / 16.0 * 2 / 3600)


def test_the_memory_of_runs_that_have_ended_is_their_devices_or_their_own(folder, capsys):
    for name, peaks in (("a", {"memory_gb": 3.0, "device_memory_gb": 40.0}), ("b", {"memory_gb": 2.0})):
        path = folder / "sweep" / name / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | peaks))
    head, *rows = table(capsys, folder)
    assert [row[head.index("memory_gb")] for row in rows] == ["40", "2", "-"]


def test_a_setting_of_the_name_of_a_column_does_not_hide_it(folder, capsys):
    for name, value in (("a", True), ("b", False)):
        path = folder / "sweep" / name / "run.json"
        record = json.loads(path.read_text())
        record["settings"] |= {"state": value, "device": "auto"}
        path.write_text(json.dumps(record))
    head, a, b, c = table(capsys, folder, settings=("settings.device",))
    assert [row[head.index("state")] for row in (a, b, c)] == ["done", "failed", "running"]
    assert [row[head.index("settings.state")] for row in (a, b, c)] == ["True", "False", "-"]
    assert [row[head.index("settings.device")] for row in (a, b, c)] == ["auto", "auto", "-"]
    assert [row[0][-1] for row in table(capsys, folder, where=("state=done",))[1:]] == ["a"]
    assert [row[0][-1] for row in table(capsys, folder, where=("settings.state=False",))[1:]] == ["b"]


def test_runs_are_sorted_with_those_that_lack_the_figure_last_and_filtered(folder, capsys):
    def names(**args):
        return [row[0][-1] for row in table(capsys, folder, **args)[1:]]

    assert names(sort="-val/robot/action_r2") == ["c", "a", "b"]
    assert names(sort="lr") == ["a", "c", "b"]
    assert names(where=("state=done",)) == ["a"]
    assert names(where=("lr<=1e-3", "quantizer!=vq")) == ["a"]
    assert names(where=("val/robot/action_r2>0.6",)) == ["c"]


def test_metrics_are_chosen_by_pattern_and_formats_hold_the_same(folder, capsys):
    head, *_ = table(capsys, folder, metrics=("train/loss", "val/*/pairs"), settings=("batch_size",))
    assert {"train/loss", "val/robot/pairs", "batch_size"} <= set(head)
    main(Args(folders=(folder,), format="markdown"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("| --- |") and "videos:DIR\\|x" in lines[2]
    main(Args(folders=(folder,)))
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"sort": "speed"}, "no run has 'speed'; they have .*quantizer"),
        ({"where": ("lr",)}, "'lr'; expected a comparison"),
        ({"where": ("lr=fast",)}, "lr is 0.001; expected a number"),
        ({"where": ("quantizer<vq",)}, "expected = or !="),
        ({"settings": ("speed",)}, "no run has 'speed'"),
    ],
)
def test_what_no_table_can_show_is_named(args, message, folder):
    with pytest.raises(ValueError, match=message):
        main(Args(folders=(folder,), **args))


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run.json in or below"):
        main(Args(folders=(tmp_path,)))
