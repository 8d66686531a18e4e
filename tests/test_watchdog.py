import logging
import time

import pytest
import torch
from torch import nn

from hlrp.distributed import Stopwatch, Watchdog, stragglers


def test_a_process_that_gets_no_further_says_where_it_is(caplog):
    watchdog = Watchdog(rank=3, patience=0.1)
    watchdog.begins("waits for data of step 7")
    deadline = time.monotonic() + 5
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.01)
    watchdog.stopped.set()
    (record,) = caplog.records[:1]
    assert record.levelno == logging.WARNING and "waits for data of step 7 since" in record.message
    assert record.message.startswith("rank 3 on ") and "tests/test_watchdog.py" in record.message


def test_a_process_that_goes_on_says_nothing(caplog):
    watchdog = Watchdog(rank=0, patience=0.4)
    for step in range(20):
        watchdog.begins(f"computes step {step}")
        time.sleep(0.04)
    watchdog.stopped.set()
    assert not caplog.messages


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
