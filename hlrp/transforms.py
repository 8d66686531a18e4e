"""What happens to frames between the decoder and the batch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def fit(frames: Tensor, image_size: int) -> Tensor:
    """Letterbox: the whole picture inside a square, aspect kept, antialiased, black around it.

    frames: uint8 (t, c, h, w) of any size; returns uint8 (t, c, image_size, image_size).
    """
    h, w = frames.shape[-2:]
    if h == w == image_size:
        return frames
    scale = image_size / max(h, w)
    new_h, new_w = max(round(h * scale), 1), max(round(w * scale), 1)
    if (new_h, new_w) != (h, w):
        frames = resize(frames, (new_h, new_w))
    if new_h == new_w:
        return frames

    top, left = (image_size - new_h) // 2, (image_size - new_w) // 2
    canvas = frames.new_zeros(*frames.shape[:2], image_size, image_size)
    canvas[..., top : top + new_h, left : left + new_w] = frames
    return canvas


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear and antialiased, uint8 to uint8; the kernel for integers is the CPU's alone."""
    if frames.device.type == "cpu":
        return F.interpolate(frames, size=size, mode="bilinear", antialias=True)
    return F.interpolate(frames.float(), size=size, mode="bilinear", antialias=True).round().to(torch.uint8)
