"""What the batches of a run were made of."""

import logging

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


class Intake:
    """What this rank has taken in: how far its streams are read, what was left out, and the episodes of the last steps.

    num_workers: of the loader. max_broken: clips and parts of streams that may be left out.
    """

    def __init__(self, num_workers: int, max_broken: int):
        self.num_readers, self.max_broken = max(1, num_workers), max_broken
        self.turns: dict[str, int] = {}  # where streams begin, see hlrp.streams
        self.reached: dict[str, dict[int, int]] = {}  # and where each reader is
        self.num_broken = 0  # since the start
        self.seen: dict[int, list[str]] = {}  # step -> the episodes in it, until it is known to be sound

    def take(self, batch: dict, step: int) -> None:
        """Takes out of a batch what the loader says of it. Raises ValueError where too much was left out."""
        for name, reader, turn in batch.pop("turns", ()):
            self.reached.setdefault(name, {})[reader] = turn
        for message in batch.pop("skipped", ()):
            self.num_broken += 1
            logger.warning("skipped %s", message)
            if self.num_broken > self.max_broken:
                raise ValueError(
                    f"max_broken={self.max_broken}, but more cannot be read, at last {message}; "
                    "mend the data, or allow more"
                )
        places = zip(batch["dataset"], batch["place"], strict=True)
        self.seen.setdefault(step, []).extend(f"{name} {place}" for name, place in places)

    def next_turns(self, device: torch.device) -> dict[str, int]:
        """For each stream, the earliest shard that a reader on any rank has not used up."""
        names = sorted(self.reached)
        turns = [
            min(self.reached[name].values()) if len(self.reached[name]) == self.num_readers else self.turns.get(name, 0)
            for name in names
        ]
        if names and dist.is_initialized():
            lowest = torch.tensor(turns, device=device)
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
            turns = lowest.tolist()
        return dict(zip(names, turns, strict=True))
