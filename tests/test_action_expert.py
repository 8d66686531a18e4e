import pytest
import torch

from hlrp.action_expert import LAST_TIME, ActionExpert


def expert(**settings) -> ActionExpert:
    torch.manual_seed(0)
    return ActionExpert({"latent": 3, "action": 2}, context_dim=8, **{"dim": 32, "depth": 2} | settings)


def nudged(model: ActionExpert) -> ActionExpert:
    """As after a few steps of training: nothing is zero."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def seen(batch_size=4, length=5):
    return torch.randn(batch_size, length, 8), torch.ones(batch_size, length, dtype=torch.bool)


def test_sampling_turns_noise_into_the_actions_that_the_context_calls_for():
    model = expert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    hidden = torch.randn(2, 1, 8)
    wanted = torch.tensor([[1.0, -0.5], [-1.0, 0.5]])
    for _ in range(200):
        which = torch.randint(2, (64,))
        actions = wanted[which][:, None] + 0.1 * torch.randn(64, 3, 2)
        context = model.read(hidden[which], torch.ones(64, 1, dtype=torch.bool))
        loss = model.errors("action", actions, context).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    which = torch.arange(2).repeat_interleave(64)
    context = model.read(hidden[which], torch.ones(128, 1, dtype=torch.bool))
    samples = model.sample("action", torch.randn(128, 3, 2), context)
    for i in range(2):
        torch.testing.assert_close(samples[which == i].mean((0, 1)), wanted[i], atol=0.15, rtol=0)
        mean = model.mean("action", (128, 3, 2), context)[which == i]
        torch.testing.assert_close(mean.mean((0, 1)), wanted[i], atol=0.15, rtol=0)
        assert mean.std(0).max() < 1e-5  # no noise in it
    assert 0.05 < samples[which == 0].std(0).mean() < 0.3


def test_several_draws_have_the_same_mean_and_less_noise():
    torch.manual_seed(0)
    model, (hidden, mask) = nudged(expert()), seen()
    actions, context = torch.randn(4, 3, 2), model.read(hidden, mask)
    is_pad = torch.zeros(4, 3, dtype=torch.bool)
    is_pad[1, 2] = True
    one, eight = (
        torch.stack([model.errors("action", actions, context, is_pad, n) for _ in range(800 // n)]) for n in (1, 8)
    )
    torch.testing.assert_close(eight.mean(0), one.mean(0), rtol=0.1, atol=0)
    assert (eight.std(0) < 0.6 * one.std(0)).all()


def test_padding_of_the_context_changes_nothing():
    model, (hidden, mask) = nudged(expert()), seen()
    x, time = torch.randn(4, 3, 2), torch.rand(4)
    alone = model.velocity("action", x, time, model.read(hidden, mask))
    padded = torch.cat([torch.full((4, 2, 8), 1e3), hidden], dim=1), torch.nn.functional.pad(mask, (2, 0))
    torch.testing.assert_close(model.velocity("action", x, time, model.read(*padded)), alone)


def test_padded_steps_do_not_count_and_do_not_spread():
    model = nudged(expert())
    context = model.read(*seen())
    actions, is_pad = torch.randn(4, 3, 2), torch.tensor([[False, True, True]] * 4)

    def errors(actions):
        torch.manual_seed(1)
        return model.errors("action", actions, context, is_pad)

    other = actions.clone()
    other[:, 1:] = 1e3
    torch.testing.assert_close(errors(other), errors(actions))


def test_steps_of_a_chunk_are_told_apart_and_spaces_share_the_trunk():
    model = nudged(expert())
    context = model.read(*seen())
    x = torch.zeros(4, 6, 3)
    velocity = model.velocity("latent", x, torch.rand(4), context)
    assert velocity.shape == x.shape
    assert (velocity[:, 1:] - velocity[:, :-1]).abs().amax(-1).min() > 1e-4
    model.errors("latent", torch.randn(4, 6, 3), context).mean().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"from_space", "to_time", "blocks", "to_space"}
    assert model.from_space["action"].weight.grad is None


def test_times_prefer_noise_as_pi0s_do(monkeypatch):
    model, times = expert(), []

    def velocity(space, x, time, context):
        times.append(time)
        return torch.zeros_like(x)

    monkeypatch.setattr(model, "velocity", velocity)
    torch.manual_seed(0)
    model.errors("action", torch.randn(20000, 1, 2), context=None)
    assert times[0].min() >= 0 and times[0].max() <= LAST_TIME
    assert times[0].mean() == pytest.approx(LAST_TIME * 0.4, abs=0.01)  # 1 - the mean of Beta(1.5, 1)


def test_integration_of_a_straight_path_is_exact(monkeypatch):
    model, noise, actions = expert(), torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    monkeypatch.setattr(model, "velocity", lambda space, x, time, context: actions - noise)
    for num_steps in (1, 7):
        torch.testing.assert_close(model.sample("action", noise, None, num_steps), actions)


def test_a_width_that_no_head_fits_is_an_error():
    with pytest.raises(ValueError, match="dim=30; expected an even number that is a multiple of num_heads=4"):
        expert(dim=30)
