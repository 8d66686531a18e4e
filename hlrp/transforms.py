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
        frames = F.interpolate(frames, size=(new_h, new_w), mode="bilinear", antialias=True)
    if new_h == new_w:
        return frames

    top, left = (image_size - new_h) // 2, (image_size - new_w) // 2
    canvas = torch.zeros(*frames.shape[:2], image_size, image_size, dtype=torch.uint8)
    canvas[..., top : top + new_h, left : left + new_w] = frames
    return canvas
