import pytest
import torch
from torch import nn

from hlrp.training import (
    cosine_lr,
    last_checkpoint,
    load_optimizer,
    parameter_groups,
    save_optimizer,
    seed_step,
    set_lr,
)


def test_the_learning_rate_at_the_corners_of_the_schedule_is_the_one_that_was_set():
    lr = [cosine_lr(step, lr=1e-3, warmup_steps=10, steps=110) for step in range(111)]
    assert lr[0] == pytest.approx(1e-4) and lr[9] == lr[10] == pytest.approx(1e-3) == max(lr)
    assert lr[60] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5)) and lr[110] == pytest.approx(1e-4)
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=7.0)
    set_lr(optimizer, lr[60])
    assert optimizer.param_groups[0]["lr"] == lr[60]


def test_an_optimizer_continues_from_its_files_to_the_bit(tmp_path):
    def run(model, optimizer, steps):
        for step in steps:
            seed_step(0, step, rank=0)
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.1)

    (model, optimizer), (whole, whole_optimizer) = fresh(), fresh()
    run(whole, whole_optimizer, range(6))
    run(model, optimizer, range(3))
    save_optimizer(tmp_path, optimizer)
    resumed = nn.Linear(3, 2)
    resumed.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(resumed, 0.0), lr=9.0)
    load_optimizer(tmp_path, optimizer)
    run(resumed, optimizer, range(3, 6))
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    def draw(*key):
        seed_step(*key)
        return torch.rand(1).item()

    draws = [draw(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len(set(draws)) == 4 and draw(0, 0, 0) == draws[0]


def test_only_matrices_decay():
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), weight_decay=0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]


def test_the_last_checkpoint_is_the_highest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for name in ("000900", "001000", "001100.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "last").symlink_to("000900")  # killed between the folder and its link
    assert last_checkpoint(tmp_path).name == "001000"
