import signal

import pytest
import torch


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
