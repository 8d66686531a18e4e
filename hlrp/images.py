"""Encoded frames, and frames on their way from the decoder to the batch.

An encoded frame is a JPEG, a PNG, a WebP, or raw YUV 4:2:0 as an NPY array; its first bytes tell which. JPEG and PNG
are turned as their EXIF orientation says, as a viewer shows them. No pickle is read.
"""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

JPEG, PNG, NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
EXIF = b"Exif\0\0"  # near the beginning of a JPEG that cameras and phones write


def decode(data: bytes, name: str) -> Tensor:
    """An encoded frame as uint8 (c, h, w), RGB.

    Raises ValueError that begins with `name`, the file and the member, where the data are of another kind or broken.
    """
    return decode_all([data], lambda _: name)[0]


def decode_all(frames: Sequence[bytes], name: Callable[[int], str]) -> Tensor:
    """Frames of one size as uint8 (t, c, h, w), which lie in memory as t h w c. Raises ValueError as `decode` does."""
    return decode_clips([frames], name)[0]


def decode_clips(clips: Sequence[Sequence[bytes]], name: Callable[[int], str]) -> list[Tensor]:
    """Decodes each clip as `decode_all` does; clips of one size that follow one another share one memory.

    name: gives the name of a frame by its number, counted over all clips. Raises ValueError as `decode` does.
    """
    decoded, number, num_frames = [], 0, sum(map(len, clips))
    size = None  # height and width of the frames in `memory`, which begins with frame number `start`
    for clip in clips:
        first = number
        for data in clip:
            try:
                is_plain_jpeg = data.startswith(JPEG) and EXIF not in data[:64]
                pixels = None if is_plain_jpeg else decode_other(data)  # h w c
                own = simplejpeg.decode_jpeg_header(data)[:2] if pixels is None else pixels.shape[:2]
                if own != size:
                    if size is not None and number > first:
                        raise ValueError("expected {3} x {2} pixels as before, got {1} x {0}".format(*own, *size))
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
    """Decodes PNG, WebP, NPY, and JPEG with EXIF, which simplejpeg would not turn. Returns uint8 (h, w, c)."""
    if data.startswith((PNG, JPEG)) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
        from torchvision.io import ImageReadMode, decode_image

        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
        image = image.permute(1, 2, 0).numpy()
        return image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)  # the upper 8 of 16 bits
    if data.startswith(NPY):
        return from_yuv420(load_array(data))
    raise ValueError(f"it begins with {data[:8]!r}; expected a JPEG, a PNG, a WebP or an NPY array of YUV 4:2:0")


def load_array(data: bytes) -> np.ndarray:
    """An NPY array. Raises ValueError where it holds Python objects."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def from_yuv420(planes: np.ndarray) -> np.ndarray:
    """Planes Y, U, V of limited range, as FFmpeg's yuv420p: uint8 (3/2 h, w) -> uint8 (h, w, c)."""
    import av

    return av.VideoFrame.from_ndarray(planes, "yuv420p").to_ndarray(format="rgb24")


def middle(frames: Tensor) -> Tensor:
    """The largest square in the middle of the picture."""
    h, w = frames.shape[-2:]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return frames[..., top : top + side, left : left + side]


def point_in_middle(point: Tensor, h: int, w: int) -> Tensor:
    """A point (..., 2) of `hlrp.contract` in the middle square of a picture of h x w pixels; nan outside of it."""
    point = point * (max(h, w) / min(h, w))
    return torch.where((point.abs() > 1).any(dim=-1, keepdim=True), math.nan, point)


def fit(frames: Tensor, image_size: int, crop: bool = False) -> Tensor:
    """Letterbox: the whole picture inside a square, aspect kept, antialiased, black around it. With `crop`, only the
    middle of the picture, which fills the square.

    frames: uint8 (t, c, h, w) of any size; returns uint8 (t, c, image_size, image_size).
    """
    frames = middle(frames) if crop else frames
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


def fit_all(clips: Sequence[Tensor], image_size: int, crop: bool = False) -> list[Tensor]:
    """Fits each clip as `fit` does; clips of one shape all at once, into one memory."""
    shapes = {clip.shape for clip in clips}
    if len(shapes) != 1 or shapes.pop()[-2:] == (image_size, image_size):
        return [fit(clip, image_size, crop) for clip in clips]
    frames = fit(stacked(clips).flatten(0, 1), image_size, crop)
    return list(frames.unflatten(0, (len(clips), -1)))


def stacked(clips: Sequence[Tensor]) -> Tensor:
    """Stacks as torch.stack does, but copies no clips (t, c, h, w) that already lie one behind the other in one memory.
    A copy keeps the order that decoders gave the memory, t h w c."""
    first = clips[0]
    if first.ndim != 4:
        return torch.stack([*clips])
    memory, start, size = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    if all(
        (clip.untyped_storage().data_ptr(), clip.storage_offset()) == (memory, start + i * size)
        and (clip.shape, clip.stride()) == (first.shape, first.stride())
        for i, clip in enumerate(clips)
    ):
        return first.as_strided((len(clips), *first.shape), (size, *first.stride()))
    if first.stride(1) == 1:
        return torch.stack([clip.permute(0, 2, 3, 1) for clip in clips]).permute(0, 1, 4, 2, 3)
    return torch.stack([*clips])


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear and antialiased, uint8 to uint8. Only the CPU has a kernel for integers."""
    if frames.device.type == "cpu":
        return F.interpolate(frames, size=size, mode="bilinear", antialias=True)
    return F.interpolate(frames.float(), size=size, mode="bilinear", antialias=True).round().to(torch.uint8)


def regrid(features: Tensor, num_tokens: int) -> Tensor:
    """Features (b, n, d) of the n patches of a square image -> (b, num_tokens, e): each token has the features of the
    patches that lie in it, one after another. Where the tokens do not divide the grid, it is interpolated first.

    Raises ValueError where n or num_tokens is not a square number.
    """
    side, merged = math.isqrt(features.shape[1]), math.isqrt(num_tokens)
    if side**2 != features.shape[1] or merged**2 != num_tokens:
        raise ValueError(f"{features.shape[1]} patches and {num_tokens} tokens; expected two square numbers")
    factor = max(1, round(side / merged))
    grid = rearrange(features, "b (h w) d -> b d h w", h=side)
    if side != merged * factor:
        grid = F.interpolate(grid, size=(merged * factor, merged * factor), mode="bilinear")
    return rearrange(grid, "b d (h p) (w q) -> b (h w) (p q d)", p=factor, q=factor)
