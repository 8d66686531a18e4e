"""Encoded frames: JPEG, PNG, and raw YUV 4:2:0 as an NPY array, each known by its first bytes. No pickle is read."""

import io
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

JPEG, PNG, NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"


def decode(data: bytes, name: str) -> Tensor:
    """The frame as uint8 (c, h, w), RGB.

    Raises ValueError that begins with `name`, the file and the member, where data are none of these, or broken.
    """
    return decode_all([data], [name])[0]


def decode_all(frames: Sequence[bytes], names: Sequence[str]) -> Tensor:
    """Frames of one size as uint8 (t, c, h, w), which lie in memory as t h w c; errors as those of `decode`."""
    out = None
    for i, (data, name) in enumerate(zip(frames, names, strict=True)):
        try:
            shape = simplejpeg.decode_jpeg_header(data)[:2] if data.startswith(JPEG) else None
            pixels = None if shape else decode_other(data)  # h w c
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: not a readable image: {error}") from error
        shape = shape or pixels.shape[:2]
        if out is None:
            out = np.empty((len(frames), *shape, 3), dtype=np.uint8)
        if shape != out.shape[1:3]:
            raise ValueError(
                f"{name}: of {shape[1]} x {shape[0]} pixels, others of {out.shape[2]} x {out.shape[1]}"
            )
        if pixels is None:
            try:
                simplejpeg.decode_jpeg(data, "RGB", buffer=out[i])
            except ValueError as error:
                raise ValueError(f"{name}: not a readable image: {error}") from error
        else:
            out[i] = pixels
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def decode_other(data: bytes) -> np.ndarray:
    """What is no JPEG: uint8 (h, w, c)."""
    if data.startswith(PNG):
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return image.permute(1, 2, 0).numpy()
    if data.startswith(NPY):
        return from_yuv420(load_array(data))
    raise ValueError(f"it begins with {data[:8]!r}; a JPEG, a PNG or an NPY array of YUV 4:2:0 fits")


def load_array(data: bytes) -> np.ndarray:
    """An NPY array. Raises ValueError where it holds Python objects."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def from_yuv420(planes: np.ndarray) -> np.ndarray:
    """Planes Y, U, V of limited range, as FFmpeg's yuv420p: uint8 (3/2 h, w) -> uint8 (h, w, c)."""
    import av

    return av.VideoFrame.from_ndarray(planes, "yuv420p").to_ndarray(format="rgb24")
