import pytest
import torch

from hlrp.transformer import Attention, Transformer, attend, patchify, rotary_2d, rotate, unpatchify


def test_unpatchify_inverts_patchify_in_raster_order():
    images = torch.randn(2, 3, 12, 8)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    torch.testing.assert_close(unpatchify(patches, 4, (3, 2)), images)
    torch.testing.assert_close(patches[0, 1], images[0, :, :4, 4:].permute(1, 2, 0).flatten())


def test_attention_depends_on_displacement_along_both_axes_and_on_nothing_else_of_the_position():
    angles = rotary_2d((4, 5), 16)
    q, k = torch.randn(2, 16)

    def score(row, column, other_row, other_column):
        at = [angles[r * 5 + c][None] for r, c in ((row, column), (other_row, other_column))]
        return rotate(q[None], at[0]) @ rotate(k[None], at[1]).T

    torch.testing.assert_close(score(0, 0, 1, 2), score(2, 1, 3, 3))
    assert not torch.allclose(score(0, 0, 1, 2), score(0, 0, 2, 1))
    assert not torch.allclose(score(0, 0, 1, 2), score(1, 0, 0, 2))


def test_attention_equals_its_definition():
    torch.manual_seed(0)
    attention = Attention(16, num_heads=2)
    x, angles = torch.randn(3, 5, 16), torch.randn(5, 4)
    q, k, v = attention.to_qkv(x).reshape(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (t / t.square().mean(-1, keepdim=True).add(torch.finfo().eps).sqrt() for t in (q, k))
    weights = (rotate(q, angles) @ rotate(k, angles).transpose(-1, -2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(attention(x, angles), attention.to_out((weights @ v).transpose(1, 2).reshape(3, 5, 16)))


@pytest.mark.parametrize("num_tokens", [64, 400])
def test_both_ways_to_attend_are_one_function(num_tokens):
    q, k, v = torch.randn(3, 2, 4, num_tokens, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_a_patch_influences_all_others_but_no_other_sample():
    torch.manual_seed(0)
    transformer = Transformer(32, depth=1, num_heads=2, grid=(3, 3))
    x = torch.randn(2, 9, 32)
    changed = x.clone()
    changed[0, 4] += 1
    moved = (transformer(changed) - transformer(x)).abs().amax(-1)
    assert (moved[0] > 0).all() and (moved[1] == 0).all()


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="dim=30; expected a multiple of num_heads=4"):
        Attention(30, num_heads=4)
    with pytest.raises(ValueError, match="head_dim=6"):
        rotary_2d((2, 2), 6)


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_the_plain_products_take_a_mask_and_a_scale_as_the_fused_kernel_does(kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    mask = {"bool": torch.rand(2, 1, 7, 7) > 0.3, "float": torch.randn(2, 1, 7, 7)}.get(kind)
    if kind == "bool":
        mask[..., 0] = True
    settings = {"is_causal": kind == "causal", "scale": 0.2}
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **settings)
    torch.testing.assert_close(attend(q, k, v, mask, **settings), expected)
