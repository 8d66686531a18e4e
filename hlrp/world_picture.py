"""How the built-in world looks: float32 strokes, blocks and a floor of two tones, all lengths in pixels.

A stroke is (start, end, radius, rgb) with round ends (t, 2), a disc where these coincide.
"""

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 64
BLOCK_HALF_SIZE = 4.5
LINK = 42.0  # length of each link of the arm
PIXELS = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5  # their centres


def picture(scene, i: int, embodiment: str, tip, blocks, balls=None, shift=None) -> Tensor:
    """Frames of episode i of a `hlrp.world.Scene`: uint8 (t, c, h, w).

    tip, shift (t, 2), blocks (t, 3, 2), balls (t, 2, 2).
    """
    strokes = arm_strokes(tip, scene.base[i]) if embodiment == "arm" else hand_strokes(tip, scene.skin[i])
    if balls is not None:
        strokes += ball_strokes(balls)
    shift = np.zeros_like(tip) if shift is None else shift
    return draw(strokes, blocks, scene.colours[i], scene.floor[i], shift)


def arm_strokes(tip: np.ndarray, base: np.ndarray) -> list[tuple]:
    reach = tip - base
    distance = np.linalg.norm(reach, axis=-1, keepdims=True)
    across = reach[:, ::-1] * np.float32([-1, 1]) / distance
    elbow = base + reach / 2 + across * np.sqrt(LINK**2 - (distance / 2) ** 2)
    return [
        (tip, tip, 3.5, (35, 35, 45)),
        (elbow, elbow, 3.4, (240, 120, 20)),
        (elbow, tip, 2.3, (205, 205, 215)),
        (base, elbow, 3.2, (150, 150, 165)),
    ]


def hand_strokes(tip: np.ndarray, skin: np.ndarray) -> list[tuple]:
    palm = tip + np.float32([2, 9])
    fingers = [((-2.5, -2), (-3, 0.5)), ((0, -3), (0.5, -0.5)), ((2.5, -2), (4, 1)), ((3, 0), (9, 3))]
    return [
        *((palm + np.float32(root), tip + np.float32(end), 1.7, skin) for root, end in fingers),
        (palm, palm + np.float32([1, 2]), 4.6, skin),
        (palm + np.float32([4, 9]), palm + np.float32([22, 60]), 4.8, (60, 75, 120)),
    ]


def ball_strokes(position: np.ndarray) -> list[tuple]:
    """position: float32 (t, balls, 2)."""
    first, second = position[:, 0], position[:, 1]
    return [(first, first, 4.5, (250, 130, 200)), (second, second, 5.5, (60, 210, 210))]


def draw(strokes: list[tuple], blocks, block_colours, floor, shift) -> Tensor:
    """Strokes, the first in front, blocks (t, 3, 2) and floor, shifted by (t, 2): uint8 (t, c, h, w)."""
    t = len(blocks)
    ends = np.empty((2, len(strokes), t, 2), dtype=np.float32)
    for i, (start, end, _, _) in enumerate(strokes):
        ends[0, i], ends[1, i] = start + shift, end + shift
    radius = np.float32([radius for _, _, radius, _ in strokes])
    shapes = [*covered_by_strokes(*ends, radius), *covered_by_squares(blocks.swapaxes(0, 1) + shift)]

    weights = np.empty((t, len(shapes) + 2, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)  # of each colour
    free = np.ones((t, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)  # not covered yet
    for i, covered in enumerate(shapes):
        np.multiply(covered, free, out=weights[:, i])
        free -= weights[:, i]
    wave = np.sin((PIXELS - shift[..., None]) * np.float32(2 * np.pi / 16))  # t xy pixels
    np.multiply(free, 0.5 + 0.5 * wave[:, 1, :, None] * wave[:, 0, None, :], out=weights[:, -2])
    np.subtract(free, weights[:, -2], out=weights[:, -1])

    colours = np.concatenate([np.float32([colour for *_, colour in strokes]), block_colours, floor])
    image = colours.T @ weights.reshape(t, len(colours), -1)  # t c (h w)
    return torch.from_numpy((image + 0.5).astype(np.uint8)).view(t, 3, IMAGE_SIZE, IMAGE_SIZE)


def covered_by_strokes(start: np.ndarray, end: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Share of each pixel inside; start, end: float32 (n, t, 2); radius: float32 (n,) -> (n, t, h, w)."""
    along = end - start
    length2 = np.maximum((along**2).sum(-1), 1e-3)[..., None, None]
    offset = PIXELS - start[..., None]  # n t xy pixels
    projected = offset * along[..., None]
    projected = projected[..., 1, :, None] + projected[..., 0, None, :]  # n t h w
    position = np.clip(projected / length2, 0, 1)  # on the stroke, 0 at its start
    offset **= 2
    distance2 = offset[..., 1, :, None] + offset[..., 0, None, :]
    projected *= 2
    projected -= position * length2
    projected *= position
    distance2 -= projected
    diameter = 2 * radius[:, None, None, None]
    distance2 /= -diameter
    distance2 += diameter / 4 + 0.5
    return np.clip(distance2, 0, 1, out=distance2)  # slope 1 at the border: one pixel wide


def covered_by_squares(centre: np.ndarray) -> np.ndarray:
    """Share of each pixel inside a block; centre: float32 (n, t, 2) -> (n, t, h, w)."""
    covered = np.clip(BLOCK_HALF_SIZE + 0.5 - np.abs(PIXELS - centre[..., None]), 0, 1)  # n t xy pixels
    return covered[..., 1, :, None] * covered[..., 0, None, :]
