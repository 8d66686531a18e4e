import os
import signal

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # each on a core of its own: threads that spin would slow the other one down
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1)


@pytest.fixture
def fresh_process(monkeypatch):
    """What accelerate and a run leave behind in a process."""
    from accelerate.state import AcceleratorState, GradientState

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
