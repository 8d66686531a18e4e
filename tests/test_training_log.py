import time

import pytest
import torch
from torch import nn

from hlrp.training_log import Stopwatch, stragglers


def test_a_stopwatch_adds_up_forward_passes():
    model = nn.Identity()
    watch = Stopwatch(model, torch.device("cpu"))
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    for _ in range(3):
        model(torch.zeros(1))
    time.sleep(0.1)
    assert watch.read() == pytest.approx(0.06, abs=0.03) and watch.read() == 0


def test_ranks_that_hold_up_the_others_are_named():
    times = torch.tensor([[0.0, 0.3], [0.1, 0.2], [0.9, 0.3], [0.0, 0.31]])
    assert "median 0.30 s: rank 2 1.20 s (0.90 waiting for data)" in stragglers(times)
    assert stragglers(times[[0, 1, 3]]) is None
