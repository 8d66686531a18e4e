"""The pack that measures a GPU, rehearsed on the CPU: the first hour on a GPU is not for typing errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks/gpu.py"


def rehearse(output_dir, *parts) -> list[dict]:
    chosen = ["--parts", *parts] if parts else []
    subprocess.run([sys.executable, SCRIPT, "--rehearse", "--output-dir", output_dir, *chosen], check=True)
    assert "| met |" in (output_dir / "gpu.md").read_text()
    return json.loads((output_dir / "gpu.json").read_text())


def test_checks_and_speeds_are_rows_of_one_table(tmp_path):
    rows = rehearse(tmp_path, "precision", "optimizers", "VLA 0.5B", "inference")
    assert {row["what"].partition(":")[0] for row in rows[1:]} == {"precision", "optimizers", "VLA 0.5B", "inference"}
    assert [row["passed"] for row in rows if row["wanted"]] == [True] * 4
    assert not any("failed" in row["figure"] for row in rows)


@pytest.mark.slow
def test_the_whole_pack_is_rehearsed(tmp_path):
    """Five minutes."""
    rows = rehearse(tmp_path)
    assert [row["what"] for row in rows if row["passed"] is False] == []
    assert any("bc_long, success" in row["what"] for row in rows)
