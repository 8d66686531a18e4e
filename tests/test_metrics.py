import math

import pytest
import torch

from hlrp import metrics as probes
from hlrp.metrics import (
    NUM_FOLDS,
    PROBES,
    code_counts,
    code_features,
    code_health,
    episode_split,
    is_constant,
    k_means,
    mean_one_hot_features,
    mutual_information,
    one_hot_features,
    probe_features,
    probe_r2,
    psnr,
    r2_per_dim,
    resampled_r2,
    ridge_predictions,
    wilson,
)
from hlrp.quantizers import FSQ


def test_usage_equals_bincount_however_often_a_batch_uses_a_code():
    indices = torch.tensor([[0, 3], [0, 3], [0, 1], [2, 3]])
    assert code_counts(indices, 5).tolist() == [[3, 0, 1, 0, 0], [0, 1, 0, 3, 0]]

    indices = torch.randint(0, 50, (300, 4), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([column.bincount(minlength=64) for column in indices.T])
    assert torch.equal(code_counts(indices, 64), expected)


def test_an_index_outside_the_codebook_is_an_error():
    with pytest.raises(ValueError, match="indices from 0 to 4; expected 0 to codebook_size - 1 = 3"):
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


def labelled(num_episodes: int = 40, length: int = 25) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Actions (b, 2), the episode of each, and the generator that drew them."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(num_episodes * length, 2, generator=generator)
    return actions, torch.arange(num_episodes).repeat_interleave(length), generator


def test_the_true_action_as_latent_scores_above_99_percent():
    actions, episodes, _ = labelled()
    assert probe_r2(100 * actions + 7, actions, episodes)["r2"] > 0.99


def test_random_latents_score_within_5_percent_of_0():
    actions, episodes, generator = labelled()
    for dim in (4, 64, 1500):
        probe = probe_r2(torch.randn(len(actions), dim, generator=generator), actions, episodes)
        assert abs(probe["r2"]) < 0.05
        assert abs(probe["r2_random"]) < 0.05


def test_nothing_is_predicted_in_an_episode_that_was_fitted_on(monkeypatch):
    """Neither in the score nor in the folds that choose the penalty."""
    fits = []

    def mean_prediction(x_train, y_train, x_test, alphas):
        fits.append((set(x_train[:, 0].tolist()), set(x_test[:, 0].tolist())))
        return [y_train.double().mean(dim=0).expand(len(x_test), -1)] * len(alphas)

    monkeypatch.setattr(probes, "ridge_predictions", mean_prediction)
    actions, episodes, _ = labelled()
    probe_r2(episodes[:, None].float(), actions, episodes)
    fitted, scored = fits[NUM_FOLDS]
    assert len(fitted) == len(scored) == 20
    assert all(not fit & out for fit, out in fits)
    assert all(not fit & scored and not out & scored for fit, out in fits[:NUM_FOLDS])


def test_a_latent_that_only_tells_episodes_apart_scores_nothing():
    """Actions that differ between episodes: a split by frame would score near 1."""
    _, episodes, generator = labelled()
    actions = torch.randn(40, 2, generator=generator)[episodes]
    episode_code = torch.randn(40, 64, generator=generator)[episodes]
    assert probe_r2(episode_code, actions, episodes)["r2"] < 0.1
    by_frame = torch.arange(len(episodes))  # every frame its own episode
    assert probe_r2(episode_code, actions, by_frame)["r2"] > 0.9


def test_an_episode_on_both_sides_is_an_error_that_names_it():
    actions, episodes, _ = labelled(num_episodes=4)
    is_fit = torch.arange(len(episodes)) < 60  # ends within episode 2
    with pytest.raises(ValueError, match=r"\[2\]"):
        probe_r2(actions, actions, episodes, is_fit)


def test_episode_split_is_seeded_and_leaves_episodes_on_both_sides():
    episodes = torch.arange(10).repeat_interleave(3)
    split = episode_split(episodes, share=0.3, seed=1)
    assert torch.equal(split, episode_split(episodes, share=0.3, seed=1))
    assert len(episodes[split].unique()) == 3
    assert not set(episodes[split].tolist()) & set(episodes[~split].tolist())
    assert episode_split(torch.tensor([4, 9]), share=1.0, seed=0).sum() == 1
    with pytest.raises(ValueError, match="expected 2 or more episodes to split, got 1"):
        episode_split(torch.zeros(5), share=0.5, seed=0)


def test_constant_action_dimensions_are_counted_and_left_out():
    actions, episodes, _ = labelled()
    padded = torch.cat([actions[:, :1], torch.full((len(actions), 1), 0.1), actions[:, 1:]], dim=1)
    probe = probe_r2(actions, padded, episodes)
    assert probe["constant_dims"] == 1
    assert probe["r2_per_dim"][1] is None
    assert probe["r2"] > 0.99
    assert probe_r2(actions, torch.zeros_like(actions), episodes)["r2"] is None


def test_ridge_solves_its_equation_with_fewer_and_with_more_features_than_samples():
    generator = torch.Generator().manual_seed(0)
    for num_features in (5, 50):
        x = torch.randn(20, num_features, generator=generator, dtype=torch.float64)
        y = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        standard = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
        gram = standard.T @ standard / 20 + 0.1 * torch.eye(num_features)
        weight = torch.linalg.solve(gram, standard.T @ (y - y.mean(dim=0)) / 20)
        torch.testing.assert_close(ridge_predictions(x, y, x, [0.1])[0], y.mean(dim=0) + standard @ weight)


def test_one_hot_features_read_what_the_order_of_the_codes_hides():
    """Actions are a random function of the index: no line through them fits, an indicator each does."""
    _, episodes, generator = labelled()
    indices = torch.randint(0, 16, (len(episodes), 2), generator=generator)
    table = torch.randn(16, 2, generator=generator)
    actions = table[indices[:, 0]]
    assert one_hot_features(indices, [16]).shape == (len(episodes), 32)
    assert probe_r2(one_hot_features(indices, [16]), actions, episodes)["r2"] > 0.99
    assert probe_r2(code_features(indices[..., None]), actions, episodes)["r2"] < 0.5


def test_the_levels_of_a_code_are_those_of_its_dimensions():
    """FSQ's own decoder says which level an index has in each dimension, and a certain code is its indicators."""
    quantizer = FSQ([5, 3, 4])
    every = torch.arange(60)[:, None]
    indicators = one_hot_features(every, quantizer.levels)
    assert indicators.shape == (60, 12) and (indicators.sum(dim=1) == 3).all()
    for levels, values in zip(indicators.split([5, 3, 4], dim=1), quantizer.decode(every)[:, 0].T, strict=True):
        assert torch.equal(levels.argmax(dim=1), values.unique(return_inverse=True)[1])
    certain = torch.eye(60)[every]
    assert torch.equal(mean_one_hot_features(certain, quantizer.levels), indicators)
    even = mean_one_hot_features(certain.mean(dim=0, keepdim=True), quantizer.levels)
    torch.testing.assert_close(even, indicators.mean(dim=0, keepdim=True))


def test_the_network_reads_what_no_line_fits_and_nothing_where_there_is_nothing():
    actions, episodes, generator = labelled()
    is_fit = episode_split(episodes, share=0.5, seed=0)
    state = torch.get_rng_state()

    def r2(latents, probe):
        pred = PROBES[probe](latents[is_fit], actions[is_fit], latents[~is_fit], episodes[is_fit])
        return float(r2_per_dim(pred, actions[~is_fit]).mean())

    angle = torch.atan2(*actions.T)
    turned = torch.stack([(3 * angle).sin(), (3 * angle).cos(), actions.norm(dim=1), angle], dim=1)
    assert r2(turned, "mlp") > 0.95 > r2(turned, "ridge") + 0.1
    assert r2(100 * actions + 7, "mlp") > 0.99
    assert abs(r2(torch.randn(len(actions), 64, generator=generator), "mlp")) < 0.05
    assert torch.equal(torch.get_rng_state(), state)


def test_intervals_are_over_episodes_and_cover_the_figure():
    actions, episodes, generator = labelled()
    noise = torch.randn(40, 2, generator=generator)[episodes]  # the same in all of an episode
    pred = actions + 0.5 * noise
    found = r2_per_dim(pred, actions).mean()
    draws = resampled_r2(pred, actions, episodes, num_draws=500, seed=0).mean(dim=1)
    low, high = draws.quantile(torch.tensor([0.025, 0.975]).double())
    assert low < found < high
    alone = resampled_r2(pred, actions, torch.arange(len(episodes)), 500, seed=0).mean(dim=1)
    assert draws.std() > 2 * alone.std()  # pairs of one episode are no independent witnesses
    assert torch.equal(draws, resampled_r2(pred, actions, episodes, 500, seed=0).mean(dim=1))


def test_an_interval_is_finite_where_a_dimension_is_constant_in_most_episodes():
    generator = torch.Generator().manual_seed(0)
    episodes = torch.arange(10).repeat_interleave(20)
    target = torch.where(episodes[:, None] < 8, -1.0, torch.randn(200, 1, generator=generator))
    pred = target + 0.1 * torch.randn(200, 1, generator=generator)
    draws = resampled_r2(pred, target, episodes, 500, seed=0).flatten()
    whole = 1 - (pred - target).square().sum() / (target - target.mean()).square().sum()
    assert 0 < draws.quantile(0.025) < whole < draws.quantile(0.975) < 1


def test_many_codes_are_read_by_their_vectors_and_few_by_which_they_are():
    codes, indices = torch.randn(10, 4, 3), torch.randint(0, 8, (10, 4))
    assert torch.equal(probe_features(codes, indices, [8]), one_hot_features(indices, [8]))
    assert torch.equal(probe_features(codes, indices, [513]), code_features(codes))
    assert torch.equal(probe_features(codes, None, ()), code_features(codes))
