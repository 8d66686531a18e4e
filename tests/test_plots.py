import matplotlib.image
import torch

from hlrp import plots
from hlrp.plots import Row, sheet


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
