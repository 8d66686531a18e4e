import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hlrp.images import decode, decode_all, fit, fit_all, point_in_middle, regrid


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_of_a_phone_is_decoded_as_a_viewer_shows_it(kind, orientation):
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 3)).repeat(16, axis=0).repeat(16, axis=1).astype(np.uint8)
    exif, file, plain = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(image).save(file, kind, exif=exif)
    Image.fromarray(image).save(plain, kind)
    turned = np.array(ImageOps.exif_transpose(Image.open(file)))
    np.testing.assert_array_equal(decode(file.getvalue(), "a").permute(1, 2, 0), turned)
    if orientation == 1:
        both = decode_all([file.getvalue(), plain.getvalue()], str)
        assert torch.equal(both[0], both[1])


def test_a_frame_of_the_right_size_is_left_alone():
    frames = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert fit(frames, 16) is frames


def test_a_portrait_frame_keeps_its_aspect_between_black_bars():
    frames = torch.full((2, 3, 64, 24), 200, dtype=torch.uint8)
    frames[..., :32, :] = 100
    small = fit(frames, 32)
    assert small.shape == (2, 3, 32, 32) and small.dtype == torch.uint8
    assert not small[..., :10].any() and not small[..., 22:].any()
    assert (small[..., :15, 10:22] == 100).all() and (small[..., 17:, 10:22] == 200).all()


@pytest.mark.parametrize("size", [(48, 65), (64, 48), (48, 48)])
def test_a_cropped_frame_is_its_middle_square_without_bars(size):
    h, w = size
    frames = torch.randint(1, 256, (2, 3, h, w), dtype=torch.uint8)
    top, left = (h - 48) // 2, (w - 48) // 2
    square = frames[..., top : top + 48, left : left + 48]
    assert torch.equal(fit(frames, 48, crop=True), square) and torch.equal(fit(frames, 24, crop=True), fit(square, 24))
    for found, clip in zip(fit_all([frames, frames.flip(0)], 24, crop=True), (square, square.flip(0)), strict=True):
        assert torch.equal(found, fit(clip, 24)) and found.min() > 0


def test_a_point_moves_with_the_crop_and_is_unknown_outside_of_it():
    points = torch.tensor([[0.5, 0.25], [-0.75, 0.0], [0.7500001, 0.0], [0.0, torch.nan]])  # in halves of 64 pixels
    expected = torch.tensor([[0.5 * 4 / 3, 0.25 * 4 / 3], [-1.0, 0.0], [torch.nan, torch.nan], [0.0, torch.nan]])
    found = point_in_middle(points, 48, 64)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert torch.equal(found[0], point_in_middle(points, 64, 48)[0])


def test_a_landscape_frame_grows_into_the_square():
    large = fit(torch.full((1, 3, 12, 16), 255, dtype=torch.uint8), 32)
    assert (large[..., 4:28, :] == 255).all() and large.sum() == 255 * 3 * 24 * 32


def test_shrinking_averages_and_does_not_alias():
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 200
    assert (fit(stripes, 16)[..., 2:-2].int() - 100).abs().max() <= 2


def test_features_go_to_the_token_that_covers_their_patch():
    features = torch.arange(64.0).view(1, 64, 1)  # of 8 x 8 patches, numbered row by row
    found = regrid(features, 16)
    assert found.shape == (1, 16, 4)
    assert found[0, 0].tolist() == [0, 1, 8, 9] and found[0, 7].tolist() == [22, 23, 30, 31]
    assert torch.equal(regrid(features, 64), features)
    assert regrid(features, 9).shape == (1, 9, 9)  # interpolated to 9 x 9
    with pytest.raises(ValueError, match="64 patches and 8 tokens; expected two square numbers"):
        regrid(features, 8)
