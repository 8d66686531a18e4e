"""Encoded frames: JPEG, PNG, and raw YUV 4:2:0 as an NPY array, each known by its first bytes. No pickle is read."""

import io
from collections.abc import Callable, Sequence

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
    return decode_all([data], lambda _: name)[0]


def decode_all(frames: Sequence[bytes], name: Callable[[int], str]) -> Tensor:
    """Frames of one size as uint8 (t, c, h, w), which lie in memory as t h w c. Raises ValueError as `decode` does."""
    return decode_clips([frames], name)[0]


def decode_clips(clips: Sequence[Sequence[bytes]], name: Callable[[int], str]) -> list[Tensor]:
    """Each clip as `decode_all`; clips of one size that follow one another lie so in one memory.

    name: of a frame by its number among those of all clips. Raises ValueError as `decode` does.
    """
    decoded, number, num_frames = [], 0, sum(map(len, clips))
    size = None  # of the frames in memory
    for clip in clips:
        first = number
        for data in clip:
            try:
                pixels = None if data.startswith(JPEG) else decode_other(data)  # h w c
                own = simplejpeg.decode_jpeg_header(data)[:2] if pixels is None else pixels.shape[:2]
                if own != size:
                    if number > first:
                        raise ValueError("{1} x {0} pixels, {3} x {2} before".format(*own, *size))
                    size, memory, start = own, np.empty((num_frames - first, *own, 3), dtype=np.uint8), first
                    frames = torch.from_numpy(memory).permute(0, 3, 1, 2)
                if pixels is None:
                    simplejpeg.decode_jpeg(data, "RGB", buffer=memory[number - start])
                else:
                    memory[number - start] = pixels
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{name(number)}: not a readable image: {error}") from error
            number += 1
        decoded.append(frames[first - start : number - start])
    return decoded


def decode_other(data: bytes) -> np.ndarray:
    """What is no JPEG: uint8 (h, w, c)."""
    if data.startswith(PNG):
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        image = image.permute(1, 2, 0).numpy()
        return image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)  # of 16 bits the upper ones
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
