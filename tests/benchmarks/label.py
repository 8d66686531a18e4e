"""Time to label an episode, by a LAQ of size "base", beside encoding each of its pairs from scratch.

    python tests/benchmarks/label.py                       # one thread: about three minutes

per pair   `laq.encode(pairs)` in float32: both frames of every pair are encoded, so most frames twice
hlrp       `hlrp.label.label_episode` under bf16 autocast, as `python -m hlrp.label --mixed-precision bf16` has it:
           each frame encoded once

Both read the same frames from memory and handle as many at a time. They are timed in one run, in turns, in CPU time
(`time.process_time`). First, in float32, both must give the same codes. The exit status is 1 where the pairs take
less than --min-ratio times as long as hlrp.

What makes the ratio. Work: a pair costs two passes through the encoder's 8 blocks and one through the change's 8, a
frame that is encoded once half of the former, so 24.5 : 16.5, in blocks over 64 patches. And precision: bf16 is worth
2x to 6x, by the CPU; "hlrp float32" is the first alone.
"""

import argparse
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

from hlrp.distributed import keep_freed_memory
from hlrp.label import label_episode
from hlrp.laq import LAQ, LAQConfig


def per_pair(laq: LAQ, frames: torch.Tensor, offset: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and indices of the pairs of frames `offset` apart."""
    pairs = torch.stack([frames[:-offset], frames[offset:]], dim=1)  # b 2 c h w
    codes, indices = zip(*(laq.encode(part) for part in pairs.split(batch_size // 2)), strict=True)
    return torch.cat(codes), torch.cat(indices)


def once(laq: LAQ, frames: torch.Tensor, offset: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = SimpleNamespace(lengths=np.array([len(frames)]), read=lambda _, indices: {"frames": frames[indices]})
    vectors, indices = zip(*label_episode(laq, source, 0, offset, batch_size), strict=True)
    return laq.expand(torch.cat(vectors)), torch.cat(indices)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num-frames", type=int, default=36, help="of the episode")
    parser.add_argument("--offset", type=int, default=4, help="between the frames of a pair")
    parser.add_argument("--batch-size", type=int, default=16, help="frames at a time")
    parser.add_argument("--repeats", type=int, default=3, help="timed episodes of each side, after one untimed")
    parser.add_argument("--min-ratio", type=float, default=2.5, help="least per pair / hlrp, time of an episode")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    laq = LAQ(LAQConfig(size="base", num_tokens=4, codebook_size=8)).requires_grad_(False)
    size = laq.config.image_size
    frames = torch.randint(256, (args.num_frames, 3, size, size), dtype=torch.uint8)
    laq.label(frames[None, :16])  # in training mode: its norm follows, and codes vary
    laq.eval()
    settings = (frames, args.offset, args.batch_size)
    found, expected = once(laq, *settings), per_pair(laq, *settings)
    assert torch.equal(found[1], expected[1]) and len(found[1].unique(dim=0)) > 1
    torch.testing.assert_close(found[0], expected[0])
    print(f"float32: the same codes, {len(found[1].unique(dim=0))} different ones of {len(found[1])} pairs")

    sides = {"per pair float32": (per_pair, False), "hlrp float32": (once, False), "hlrp bf16": (once, True)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):
        for name, (function, bf16) in sides.items():
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                function(laq, *settings)
            if repeat:  # the first makes kernels
                times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    slowest = medians["per pair float32"]
    for name, values in times.items():
        each = f"{1000 * medians[name] / args.num_frames:.0f} CPU-ms a frame"
        spread = f"{min(values):.2f}..{max(values):.2f} CPU-s an episode"
        print(f"{name:18}{each:>22}{spread:>32}{slowest / medians[name]:>8.2f}x")
    ratio = slowest / medians["hlrp bf16"]
    print(f"{ratio:.2f} times as fast as pair by pair; {args.min_ratio:g} are asked for")
    return 0 if ratio >= args.min_ratio else 1


if __name__ == "__main__":
    sys.exit(main())
