"""Encoded frames: JPEG, PNG, and raw YUV 4:2:0 as an NPY array, each known by its first bytes. No pickle is read."""

import io

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, decode_jpeg

JPEG, PNG, NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"


def decode(data: bytes, name: str) -> Tensor:
    """The frame as uint8 (c, h, w), RGB.

    Raises ValueError that begins with `name`, the file and the member, where data are none of these, or broken.
    """
    try:
        if data.startswith(JPEG):
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        if data.startswith(PNG):
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        if data.startswith(NPY):
            return from_yuv420(load_array(data))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: not a readable image: {error}") from error
    raise ValueError(f"{name}: begins with {data[:8]!r}; a JPEG, a PNG or an NPY array of YUV 4:2:0 fits")


def load_array(data: bytes) -> np.ndarray:
    """An NPY array. Raises ValueError where it holds Python objects."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def from_yuv420(planes: np.ndarray) -> Tensor:
    """Planes Y, U, V of limited range, as FFmpeg's yuv420p: uint8 (3/2 h, w) -> uint8 (c, h, w)."""
    import av

    return torch.from_numpy(av.VideoFrame.from_ndarray(planes, "yuv420p").to_ndarray(format="rgb24")).permute(
        2, 0, 1
    )
