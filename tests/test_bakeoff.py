import json

import pytest
from benchmarks import bakeoff
from benchmarks.bakeoff import LABELS_ONLY, Args, Cell, cells_of, main

SETTINGS = {"quantizers": ("fsq", "none"), "seeds": (0,), "steps": 2, "batch_size": 4, "num_processes": 1}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"NUM_EPISODES": 24, "NUM_VAL": 8, "NUM_PAIRS": 60, "NUM_DECODED": 16}.items():
        monkeypatch.setattr(bakeoff, name, value)


def test_every_cell_of_the_grid_has_a_row_and_what_is_done_is_not_run_again(tmp_path, monkeypatch, capsys):
    args = Args(**SETTINGS, label_fractions=(0.5,), variants=("distractors",), output_dir=tmp_path)
    main(args)
    results = json.loads((tmp_path / "bakeoff.json").read_text())
    assert [*results] == [f"{q}_labels0.5_distractors_seed0" for q in ("labels-only_n0", "fsq_n4", "none_n4")]
    assert all(result["interval"][0] <= result["r2"] <= result["interval"][1] for result in results.values())
    assert results["fsq_n4_labels0.5_distractors_seed0"]["health"]["possible_sequences"] == 120
    rows = (tmp_path / "bakeoff.md").read_text().splitlines()[4:]
    assert [row.split(" | ")[3] for row in rows] == ["labels only", "fsq", "none"]
    assert "R2 of motion of distractor" in capsys.readouterr().out

    monkeypatch.setattr(bakeoff, "run_cell", lambda *args: pytest.fail("a finished cell was run again"))
    main(args)
    with pytest.raises(ValueError, match="is of .*give another --output-dir"):
        main(Args(**SETTINGS | {"steps": 3}, label_fractions=(0.5,), variants=("distractors",), output_dir=tmp_path))


def test_a_row_is_the_mean_over_seeds_and_its_interval_covers_those_of_all():
    args = Args(quantizers=("fsq",), seeds=(0, 1))
    first = {"r2": 0.5, "interval": [0.4, 0.55], "leakage": {}, "ridge": {"r2": 0.5}, "health": {"usage": 1.0}}
    second = first | {"r2": 0.7, "interval": [0.6, 0.8]}
    row = bakeoff.table(args, dict(zip(cells_of(args), (first, second), strict=True))).splitlines()[-1]
    assert "| fsq | 0.60 (0.40 to 0.80) | 0.50 | - |" in row


def test_actions_of_episodes_that_are_not_labelled_are_not_seen():
    train, _ = bakeoff.read("clean", 0.2)
    cached = bakeoff.Cached(train.clips, {0}, train.samples)
    assert ["action" in cached[i] for i in (0, len(cached) - 1)] == [True, False]
    assert "action" in train[len(train) - 1]  # though it was read through the other first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, r"seeds=\(\)"),
        ({"num_tokens": (4, 4)}, "num_tokens="),
        ({"label_fractions": (2.0,)}, "expected shares from 0 to 1"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_settings_that_make_no_table_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(Args(**SETTINGS | settings, output_dir=tmp_path))


def test_a_model_of_the_labels_stands_beside_those_that_use_them():
    cells = cells_of(Args(quantizers=("fsq",), seeds=(0,), label_fractions=(0.0, 0.1)))
    assert cells == [
        Cell("fsq", 4, 0.0, "hand", 0),
        Cell(LABELS_ONLY, 0, 0.1, "hand", 0),
        Cell("fsq", 4, 0.1, "hand", 0),
    ]
