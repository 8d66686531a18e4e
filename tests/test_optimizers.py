import pytest
import torch
from torch import nn

from hlrp.optimizers import (
    Muon,
    cosine_lr,
    load_optimizer,
    make_optimizer,
    orthogonal,
    parameter_groups,
    save_optimizer,
    set_lr,
)
from hlrp.training import seed_step
from hlrp.transformer import FeedForward


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = FeedForward(16)
        self.layer.words = nn.Embedding(5, 16)

    def forward(self, x):
        return self.layer(x + self.layer.words.weight)


def optimizer_of(model, name, lr=0.01, weight_decay=0.1):
    return make_optimizer(name, model, {FeedForward}, lr, weight_decay)


def test_the_learning_rate_at_the_corners_of_the_schedule_is_the_one_that_was_set():
    lr = [cosine_lr(step, lr=1e-3, warmup_steps=10, steps=110) for step in range(111)]
    assert lr[0] == pytest.approx(1e-4) and lr[9] == lr[10] == pytest.approx(1e-3) == max(lr)
    assert lr[60] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5)) and lr[110] == pytest.approx(1e-4)
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=7.0)
    set_lr(optimizer, lr[60])
    assert optimizer.param_groups[0]["lr"] == lr[60]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_optimizer_continues_from_its_files_to_the_bit(name, tmp_path):
    def run(model, optimizer, steps):
        for step in steps:
            seed_step(0, step, rank=0)
            set_lr(optimizer, 0.01 / (step + 1))
            model(torch.randn(3, 5, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, whole, resumed = Model(), Model(), Model()
    optimizer, whole_optimizer = optimizer_of(model, name), optimizer_of(whole, name)
    run(whole, whole_optimizer, range(6))
    run(model, optimizer, range(3))
    save_optimizer(tmp_path, optimizer)
    resumed.load_state_dict(model.state_dict())
    optimizer = optimizer_of(resumed, name, lr=9.0, weight_decay=0.0)
    load_optimizer(tmp_path, optimizer)
    run(resumed, optimizer, range(3, 6))
    for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_muon_turns_the_matrices_of_the_layers_and_adamw_steps_the_rest():
    model, other = Model(), Model()
    for each, name in ((model, "muon"), (other, "adamw")):
        optimizer = optimizer_of(each, name, lr=0.1, weight_decay=0.0)
        each(torch.linspace(-1, 1, 800).sin().view(10, 5, 16) + torch.eye(16)[:10, None]).square().mean().backward()
        optimizer.step()
    for name, found in model.named_parameters():
        same = torch.equal(found, dict(other.named_parameters())[name])
        assert same == (name not in ("layer.to_hidden.weight", "layer.to_out.weight"))
    step = (model.layer.to_hidden.weight - Model().layer.to_hidden.weight).detach()
    size = step.square().mean().sqrt()
    assert size == pytest.approx(0.2 * 0.1, rel=0.3)  # of AdamW's steps (Liu et al., Eq. 4)


def test_muon_steps_as_torchs_does_matrix_by_matrix():
    """torch's rounds to bfloat16 on the way."""
    torch.manual_seed(0)
    shapes = [(16, 48), (16, 48), (48, 16), (20, 20)]
    found = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [nn.Parameter(p.detach().clone()) for p in found]
    optimizers = [
        Muon([{"params": found}], lr=0.1, weight_decay=0.3),
        torch.optim.Muon(expected, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    ]
    starts = [p.detach().clone() for p in found]
    for _ in range(3):
        gradients = [torch.randn(shape) for shape in shapes]
        for params, optimizer in zip((found, expected), optimizers, strict=True):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for start, p, other in zip(starts, found, expected, strict=True):
        assert (p - other).norm() < 0.02 * (p - start).norm()


def test_a_step_makes_matrices_orthogonal():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 12, 40)))
    assert values.min() > 0.6 and values.max() < 1.3  # the iteration does not converge to 1, by design


def test_an_optimizer_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="optimizer='sgd'; expected one of muon, adamw"):
        optimizer_of(Model(), "sgd")
    with pytest.raises(ValueError, match="no matrix of the hidden layers trains; expected optimizer='adamw'"):
        optimizer_of(Model().requires_grad_(False), "muon")


def test_only_matrices_decay():
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), weight_decay=0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]
