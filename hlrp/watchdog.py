"""What a run of many processes tells of those that hold it up."""

import logging
import socket
import sys
import threading
import time
import traceback

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Watchdog:
    """Logs a line once this process has done the same thing for `patience` [s]: what, since when, where in the code.

    Again after twice the time, and so on. It ends nothing: that is for the timeout of a collective (`hlrp.launch`).
    """

    def __init__(self, rank: int, patience: float = 300.0):
        self.name = f"rank {rank} on {socket.gethostname()}"
        self.patience, self.main = patience, threading.get_ident()
        self.stopped = threading.Event()
        self.begins("starts")
        threading.Thread(target=self.watch, daemon=True).start()

    def begins(self, what: str) -> None:
        self.what, self.since, self.next_report = what, time.monotonic(), self.patience

    def watch(self) -> None:
        while not self.stopped.wait(self.patience / 10):
            if (seconds := time.monotonic() - self.since) >= self.next_report:
                self.next_report *= 2
                logger.warning("%s %s since %.0f s: %s", self.name, self.what, seconds, self.where())

    def where(self) -> str:
        """The innermost calls of the thread that trains."""
        calls = traceback.extract_stack(sys._current_frames()[self.main])[-6:]
        return " > ".join(f"{'/'.join(c.filename.split('/')[-2:])}:{c.lineno} {c.name}" for c in calls)


class Stopwatch:
    """Time that this rank needs for the forward passes of a model: under DDP they wait for no other rank."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.is_gpu, self.spans = device.type == "cuda", []
        model.register_forward_pre_hook(lambda *_: self.spans.append([self.now()]))
        model.register_forward_hook(lambda *_: self.spans[-1].append(self.now()))

    def now(self):
        if not self.is_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """[s] since the last call; the device has finished what it was given before."""
        spans, self.spans = self.spans, []
        if self.is_gpu:
            return sum(start.elapsed_time(end) for start, end in spans) / 1000
        return sum(end - start for start, end in spans)


def stragglers(times: Tensor, tolerance: float = 1.5) -> str | None:
    """A line that names the ranks which hold up the others; times: of each rank, for data and for computing [s]."""
    totals = times.sum(dim=1)
    median = totals.median()
    slow = [rank for rank in totals.argsort(descending=True).tolist() if totals[rank] > tolerance * median]
    if not slow:
        return None
    named = ", ".join(f"rank {r} {totals[r]:.2f} s ({times[r, 0]:.2f} waiting for data)" for r in slow[:4])
    more = f" and {len(slow) - 4} more" if len(slow) > 4 else ""
    return f"STRAGGLERS, time of a step before ranks meet, median {median:.2f} s: {named}{more}"
