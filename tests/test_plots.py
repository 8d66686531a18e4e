from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from torch import nn

from hlrp import plots
from hlrp.plots import Row, save_grids, sheet


class MovingSquares(torch.utils.data.Dataset):
    """A square on grey that moves, except in every third pair."""

    def __init__(self, name: str, num_pairs: int = 40):
        self.name, self.num_pairs = name, num_pairs

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, i: int) -> dict:
        frames = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
        for t, start in enumerate((i % 20, i % 20 + (4 if i % 3 else 0))):
            frames[t, 0, 10:18, start : start + 8] = 250
        task = "a $long$ task " * 20 if i % 2 else ""
        return {"frames": frames, "task": task, "dataset": self.name, "episode": i // 4, "index": i % 4}


class Model(nn.Module):
    """Something with the methods of a LAQ that the grids call."""

    def __init__(self, target: str = "pixels", is_continuous: bool = False):
        super().__init__()
        self.target, self.is_continuous = target, is_continuous
        self.config = SimpleNamespace(delta=0.2, quantizer="fsq")
        self.quantizer = SimpleNamespace(codebook_size=20)
        self.unused = nn.Parameter(torch.zeros(()))
        self.decoded = []

    def encode(self, frames):
        indices = frames[:, 1, 0, 10, :20].int().argmax(dim=1, keepdim=True).repeat(1, 2)
        return indices[..., None].float(), None if self.is_continuous else indices

    def decode(self, first, codes, task, second):
        assert not self.training
        assert len(first) == len(codes) == len(task)
        self.decoded.append((first, codes))
        if self.target == "pixels":
            return {"pixels": first.float() / 255}
        return {self.target: codes.mean(dim=(1, 2))[:, None, None, None].expand(-1, 2, 32, 32)}


SETS = {"robot": MovingSquares("robot"), "kitchen": MovingSquares("kitchen")}


def draw(folder, model, sets=SETS) -> tuple[list[str], dict[str, list[Row]]]:
    """Names of the files, and the rows of each sheet of pictures."""
    rows = {}

    def recorded(path, title, sheet_rows, **options):
        rows[path.name] = sheet_rows
        return sheet(path, title, sheet_rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "sheet", recorded)
        paths = save_grids(model, sets, folder / "grids", step=70)
    assert all(matplotlib.image.imread(path).ndim == 3 for path in paths)
    assert sorted(paths) == sorted((folder / "grids").iterdir())
    return [path.name for path in paths], rows


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    model = Model().train()
    return model, *draw(tmp_path_factory.mktemp("drawn"), model)


def test_all_grids_are_written_with_their_panels(drawn):
    model, names, rows = drawn
    assert names == ["usage_000070.png", "pairs_000070.png", "transfer_000070.png", "codes_000070.png"]
    assert model.training

    pairs = rows["pairs_000070.png"]
    assert [len(row.pictures) for row in pairs] == [5] * 6
    assert pairs[0].labels == ["first frame", "0.2 s later", "decoded", "with another code", "|error| x 3"]
    assert all(f"{name}, episode" in pairs[i].caption for i, name in enumerate(["robot", "kitchen"] * 3))

    transfer = rows["transfer_000070.png"]
    assert [len(row.pictures) for row in transfer] == [8] * 7
    codes = rows["codes_000070.png"]
    assert [len(row.pictures) for row in codes] == [9] * 4
    assert len({label for row in codes[::2] for label in row.labels[1:]}) == 16  # all different


def test_pairs_show_motion_and_the_other_code_is_of_another_pair(drawn):
    model, _, rows = drawn
    for first, second, *_ in (row.pictures for row in rows["pairs_000070.png"]):
        assert (first != second).any()
    _, codes = model.decoded[0]
    true, other = codes.chunk(2)
    assert (true != other).any()


def test_transfer_applies_the_code_of_a_row_to_the_frame_of_a_column(drawn):
    model, _, rows = drawn
    anchors, *transferred = (row.pictures for row in rows["transfer_000070.png"])
    for row in transferred:  # this decoder returns the frame that it is given
        assert all(torch.allclose(x, anchor) for x, anchor in zip(row[2:], anchors[2:], strict=True))
    _, codes = model.decoded[1]
    assert (codes.reshape(6, 6, -1) == codes.reshape(6, 6, -1)[:, :1]).all()


def test_the_choice_is_the_same_at_every_step_and_leaves_the_random_state_alone(tmp_path):
    state = torch.get_rng_state()
    first, second = Model(), Model()
    for model, step in ((first, 0), (second, 9)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "sheet", lambda path, *args, **options: path)
            save_grids(model, SETS, tmp_path, step)
    for a, b in zip(first.decoded, second.decoded, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_laq_without_pixels_shows_flow_and_continuous_codes_have_no_usage_chart(tmp_path, caplog):
    names, rows = draw(tmp_path, Model("flow", is_continuous=True))
    assert names == ["pairs_000070.png", "transfer_000070.png", "codes_000070.png"]
    assert "decoded flow" in rows["pairs_000070.png"][0].labels
    assert "continuous" in caplog.text


def test_a_laq_of_features_alone_says_why_there_are_no_pictures(tmp_path, caplog):
    names, _ = draw(tmp_path, Model("features"))
    assert names == ["usage_000070.png"]
    assert "decodes features, neither pixels nor flow" in caplog.text


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_a_handful_of_pairs_is_enough(tmp_path, num_pairs):
    names, _ = draw(tmp_path, Model(), {"one": MovingSquares("one", num_pairs)})
    assert len(names) == 4


def test_a_sheet_places_each_picture_enlarged_by_whole_pixels(tmp_path):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    sheet(tmp_path / "sheet.png", "title", [Row([None, image])])
    page = torch.from_numpy(matplotlib.image.imread(tmp_path / "sheet.png"))[..., :3]
    left = plots.GAP + plots.CELL + plots.GAP
    top = plots.GAP + 2 * plots.LINE
    shown = page[top : top + 160, left : left + 160]
    expected = image.repeat_interleave(5, dim=1).repeat_interleave(5, dim=2).permute(1, 2, 0)
    torch.testing.assert_close(shown, expected, atol=1 / 255, rtol=0)
    assert (page[:, : left - 1][top:] == 1).all()
