"""docs/tour.ipynb: it runs whole, and what is committed shows what it says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"


def assert_shows_what_it_says(notebook) -> None:
    """Each code cell has ended well, after the one above it; the figures are above their controls."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert None not in counts and counts == sorted(set(counts))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6

    text = "".join(output.get("text", "") for output in outputs)
    (r2,) = re.findall(r"R2 of the motion: (\S+) from the codes, (\S+) from random numbers", text)
    assert float(r2[0]) > 0.5 > abs(float(r2[1]))
    assert re.search(r"^(success|no success) after \d+ steps$", text, re.MULTILINE)


def test_the_committed_tour_is_small_and_has_its_pictures_and_figures():
    assert TOUR.stat().st_size < 1_000_000
    assert_shows_what_it_says(nbformat.read(TOUR, as_version=4))


@pytest.mark.slow
def test_the_tour_runs_whole_from_the_folder_docs_and_writes_to_a_temporary_folder_alone(tmp_path, monkeypatch):
    """Five minutes on two cores."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {*ROOT.iterdir(), *TOUR.parent.iterdir()}
    notebook = nbformat.read(TOUR, as_version=4)
    resources = {"metadata": {"path": str(TOUR.parent)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    assert_shows_what_it_says(notebook)
    assert {*ROOT.iterdir(), *TOUR.parent.iterdir()} == before
    assert [*tmp_path.glob("*/policy/checkpoints/last/pretrained_model/config.json")]
