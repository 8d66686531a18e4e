import math

import pytest
import torch

from hlrp.metrics import code_counts, code_health, is_constant, k_means, mutual_information, psnr, r2_per_dim, wilson


def test_d1_usage_equals_bincount_however_often_a_batch_uses_a_code():
    indices = torch.tensor([[0, 3], [0, 3], [0, 1], [2, 3]])
    assert code_counts(indices, 5).tolist() == [[3, 0, 1, 0, 0], [0, 1, 0, 3, 0]]

    indices = torch.randint(0, 50, (300, 4), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([column.bincount(minlength=64) for column in indices.T])
    assert torch.equal(code_counts(indices, 64), expected)


def test_an_index_outside_the_codebook_is_an_error():
    with pytest.raises(ValueError, match="codebook_size=4"):
        code_counts(torch.tensor([[0, 4]]), 4)


def test_code_health_of_known_indices():
    health = code_health(torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1]]), codebook_size=4)
    assert health["usage"] == 0.5
    assert health["unique_sequences"] == 2
    assert health["perplexity"] == pytest.approx(math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)))
    assert health["entropy"] == pytest.approx([math.log(2), 0.0])


def test_evenly_used_codes_have_the_perplexity_of_the_codebook():
    health = code_health(torch.arange(16)[:, None], codebook_size=16)
    assert health["usage"] == 1
    assert health["perplexity"] == pytest.approx(16)


def test_r2_is_one_for_the_target_zero_for_its_mean_and_defined_for_constants():
    target = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    assert r2_per_dim(target, target).tolist() == [1, 1]
    assert r2_per_dim(target.mean(dim=0).expand(100, 2), target).tolist() == pytest.approx([0, 0], abs=1e-6)

    constant = torch.full((100, 1), 0.1)
    assert r2_per_dim(constant, constant).tolist() == [1]
    assert r2_per_dim(constant + 1, constant).tolist() == [0]


def test_the_interval_of_a_success_rate_is_the_one_that_wilson_gives():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 50) == pytest.approx((0, 0.0713), abs=1e-4)


def test_a_column_is_constant_by_rounding_not_by_scale():
    small = 1e-7 * torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    rounded = torch.full((100, 1), 0.1) + 1e-8 * small
    assert is_constant(torch.cat([small, rounded, torch.zeros(100, 1)], dim=1)).tolist() == [False, True, True]


def test_psnr_of_a_known_error():
    target = torch.full((2, 3, 4, 4), 0.5)
    pred = target + torch.tensor([0.1, 0.0])[:, None, None, None]
    assert psnr(pred, target).tolist() == pytest.approx([20, 100], abs=1e-3)


def test_mutual_information_is_entropy_for_equal_labels_and_0_for_independent_ones():
    a = torch.arange(4).repeat(25)
    mi, nmi = mutual_information(a, 3 - a)
    assert mi == pytest.approx(math.log(4)) and nmi == pytest.approx(1)
    assert mutual_information(a, torch.arange(100) // 4 % 5) == pytest.approx((0, 0), abs=1e-9)


def test_k_means_finds_bins_that_lie_apart():
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(0)) + 50 * (torch.arange(90) % 3)[:, None]
    bins = k_means(x, 3, seed=1)
    assert [len(bins[k::3].unique()) for k in range(3)] == [1, 1, 1] and len(bins.unique()) == 3
