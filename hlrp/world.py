"""The built-in synthetic world, drawn with numpy as it is read: video whose actions and causes are all known.

An agent, a two-link arm or a hand, moves to an edge, touches a coloured block or pushes it, as the task text says.
The action is the velocity of its tip, whichever it is. What no action causes can be added: balls that roll by, a
camera that shakes.
The source is `world:VARIANT?episodes=N&seed=S&kinds=touch,edge`; see `VARIANTS` and `KINDS`.

How the built-in world looks: float32 strokes, blocks and a floor of two tones, all lengths in pixels.

A stroke is (start, end, radius, rgb) with round ends (t, 2), a disc where these coincide.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hlrp.contract import Indices, Source

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


def floats(values) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def arm_strokes(tip: np.ndarray, base: np.ndarray) -> list[tuple]:
    reach = tip - base
    distance = np.linalg.norm(reach, axis=-1, keepdims=True)
    across = reach[:, ::-1] * floats([-1, 1]) / distance
    elbow = base + reach / 2 + across * np.sqrt(LINK**2 - (distance / 2) ** 2)
    return [
        (tip, tip, 3.5, (35, 35, 45)),
        (elbow, elbow, 3.4, (240, 120, 20)),
        (elbow, tip, 2.3, (205, 205, 215)),
        (base, elbow, 3.2, (150, 150, 165)),
    ]


def hand_strokes(tip: np.ndarray, skin: np.ndarray) -> list[tuple]:
    palm = tip + floats([2, 9])
    fingers = [((-2.5, -2), (-3, 0.5)), ((0, -3), (0.5, -0.5)), ((2.5, -2), (4, 1)), ((3, 0), (9, 3))]
    return [
        *((palm + floats(root), tip + floats(end), 1.7, skin) for root, end in fingers),
        (palm, palm + floats([1, 2]), 4.6, skin),
        (palm + floats([4, 9]), palm + floats([22, 60]), 4.8, (60, 75, 120)),
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
    radius = floats([radius for _, _, radius, _ in strokes])
    shapes = [*covered_by_strokes(ends[0], ends[1], radius), *covered_by_squares(blocks.swapaxes(0, 1) + shift)]

    weights = np.empty((t, len(shapes) + 2, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)  # of each colour
    free = np.ones((t, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)  # not covered yet
    for i, covered in enumerate(shapes):
        np.multiply(covered, free, out=weights[:, i])
        free -= weights[:, i]
    wave = np.sin((PIXELS - shift[..., None]) * np.float32(2 * np.pi / 16))  # t xy pixels
    np.multiply(free, 0.5 + 0.5 * wave[:, 1, :, None] * wave[:, 0, None, :], out=weights[:, -2])
    np.subtract(free, weights[:, -2], out=weights[:, -1])

    colours = np.concatenate([floats([colour for *_, colour in strokes]), block_colours, floor])
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


FPS = 10
MIN_LENGTH, MAX_LENGTH = 12, 48  # frames of an episode
AFTERWARDS = 4  # frames of an episode after its task is done
GROUP_SIZE = 128  # episodes simulated together

# lengths are in pixels
MAX_SPEED = 40.0  # of the tip along each axis, an action of 1 [pixel/s]
TIP_BORDER, BLOCK_BORDER = 4.0, 6.0  # least distance of the tip, and of a block's centre, from the edge of the scene
CONTACT = 8.0  # distance of tip and block centre at which the tip pushes

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (36, 92, 220),
    "yellow": (245, 200, 30),
    "purple": (140, 60, 190),
    "white": (240, 240, 240),
}
EDGES = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "top": (0.0, -1.0), "bottom": (0.0, 1.0)}
KINDS = ("move", "move", "touch", "touch", "edge", "block")  # of task; to push a block takes twice as long
EMBODIMENTS = ("arm", "hand")


class Variant(NamedTuple):
    embodiments: tuple[str, ...] = EMBODIMENTS
    has_distractors: bool = False
    has_shake: bool = False
    has_actions: bool = True  # and state


VARIANTS = {
    "default": Variant(has_distractors=True, has_shake=True),
    "clean": Variant(),
    "distractors": Variant(has_distractors=True),
    "shake": Variant(has_shake=True),
    "arm": Variant(embodiments=("arm",)),
    "hand": Variant(embodiments=("hand",)),
    "human": Variant(embodiments=("hand",), has_actions=False),
}


class World(Source):
    """A source (see `hlrp.contract`) that tells the truth about everything that moves in its frames.

    action: velocity of the tip (x to the right, y down) between a frame and the next; 1 is `MAX_SPEED`.
    state: position of the tip, -1 to 1 across the frame.
    The same seed gives the same blocks, tasks and actions in every variant. read() also gives, if the variant has it:

        point           the place of the block or the edge that the task names first, as in `hlrp.contract`
        embodiment      int, a number of `EMBODIMENTS`
        distractor      float32 (t, 4), the positions of the two balls, -1 to 1 across the frame
        camera_shift    float32 (t, 2), how far everything in the frame is displaced [pixel]
    """

    def __init__(self, variant: str = "default", episodes: int = 3000, seed: int = 0, kinds: str | None = None):
        """kinds: kinds of tasks, separated by commas, equally frequent (default: `KINDS`, which has two twice)."""
        if variant not in VARIANTS:
            raise ValueError(f"world:{variant}: unknown variant; expected one of {', '.join(VARIANTS)}")
        if episodes < 1 or seed < 0:
            raise ValueError(f"world:{variant}: episodes={episodes}, seed={seed}; expected at least 1 and 0")
        self.kinds = KINDS if kinds is None else tuple(kinds.split(","))
        if unknown := set(self.kinds) - set(KINDS):
            known = ", ".join(dict.fromkeys(KINDS))
            raise ValueError(
                f"world:{variant}: kinds={kinds!r}: {unknown.pop()!r} is unknown; expected some of {known}"
            )
        self.variant, self.seed = VARIANTS[variant], seed
        self.uri = f"world:{variant}?episodes={episodes}&seed={seed}"
        if kinds is not None:
            self.uri += f"&kinds={kinds}"
        self.name = f"world-{variant}"
        groups = range(-(-episodes // GROUP_SIZE))
        self.lengths = np.concatenate([self._simulate(group).length for group in groups])[:episodes]
        self.fps = np.full(episodes, float(FPS))
        self.action_dim = self.state_dim = 2 if self.variant.has_actions else 0
        self.fingerprint = hashlib.sha256(self.uri.encode()).hexdigest()[:16]

    def read(self, episode: int, indices: Indices) -> dict:
        indices, group, i = self._locate(episode, indices)
        scene = self._simulate(group)
        embodiments = self.variant.embodiments
        embodiment = embodiments[int(scene.embodiment[i] * len(embodiments))]

        tip = scene.tip[i, indices]
        sample = {"task": scene.task[i], "embodiment": EMBODIMENTS.index(embodiment)}
        if self.variant.has_actions:
            sample["state"] = normalised(tip)
        shift = np.zeros_like(tip)
        if self.variant.has_shake:
            shift = _camera_shift(self.seed, group)[i, indices]
            sample["camera_shift"] = torch.from_numpy(shift)
        named = scene.blocks[i, indices, 0]
        if scene.kind[i] == "move":
            named = _place(scene.edge[i])[None].astype(np.float32)
        sample["point"] = normalised(named + shift)

        balls = None
        if self.variant.has_distractors:
            balls = _distractors(self.seed, group)[i, indices]  # t balls xy
            sample["distractor"] = normalised(balls).flatten(1)
        sample["frames"] = picture(scene, i, embodiment, tip, scene.blocks[i, indices], balls, shift)
        return sample

    def instructions(self, episode: int, indices: Indices) -> list[str]:
        indices, group, i = self._locate(episode, indices)
        return [self._simulate(group).task[i]] * len(indices)

    def actions(self, episode: int, indices: Indices) -> Tensor:
        """float32 (t, 2): the actions taken at these frames."""
        indices, group, i = self._locate(episode, indices)
        return torch.from_numpy(self._simulate(group).action[i, indices])

    def states(self, episode: int, indices: Indices) -> Tensor:
        """float32 (t, 2): the states at these frames."""
        indices, group, i = self._locate(episode, indices)
        return normalised(self._simulate(group).tip[i, indices])

    def _simulate(self, group: int) -> "Scene":
        return simulate(self.seed, group, self.kinds)

    def _locate(self, episode: int, indices: Indices) -> tuple[np.ndarray, int, int]:
        """Checked indices, the group of episodes that is simulated together, and the place in it."""
        if not 0 <= episode < len(self.lengths):
            raise ValueError(f"{self.uri}: episode {episode}, but there are {len(self.lengths)}")
        indices = np.asarray(indices, dtype=np.int64)
        length = self.lengths[episode]
        if ((indices < 0) | (indices >= length)).any():
            raise ValueError(f"{self.uri}: frames {indices} of episode {episode}, which has {length}")
        return indices, *divmod(episode, GROUP_SIZE)


def open_world(variant: str, uri: str, skip_broken: bool, **options) -> World:
    """The world of a URI. It has no files that could be broken, and states its own URI, with the defaults."""
    return World(variant, **options)


def normalised(position: np.ndarray) -> Tensor:
    return torch.from_numpy(position * (2 / IMAGE_SIZE) - 1)


# Simulation: the b episodes of a group at once, t frames, lengths in pixels, x to the right and y down


class Scene(NamedTuple):
    task: list[str]  # b
    kind: np.ndarray  # str (b,), one of `KINDS`
    edge: np.ndarray  # float (b, 2): direction of the edge that the task may name
    length: np.ndarray  # int64 (b,): frames until some time after the task is done
    embodiment: np.ndarray  # float (b,) in [0, 1): chooses an embodiment of the variant
    tip: np.ndarray  # float32 (b, t, 2)
    action: np.ndarray  # float32 (b, t, 2)
    blocks: np.ndarray  # float32 (b, t, 3, 2): the first is the one to touch or to push
    colours: np.ndarray  # float32 (b, 3, 3): rgb of the blocks
    floor: np.ndarray  # float32 (b, 2, 3): rgb of its two tones
    base: np.ndarray  # float32 (b, 2): where the arm is mounted
    skin: np.ndarray  # float32 (b, 3): rgb of the hand


def _generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A stream of random numbers of its own for each purpose."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8])])


@lru_cache(maxsize=512)
def simulate(seed: int, group: int, kinds: tuple[str, ...] = KINDS) -> Scene:
    rng, b = _generator(seed, "scene", group), GROUP_SIZE
    cells = np.array([(22.0, 22.0), (42.0, 22.0), (22.0, 42.0), (42.0, 42.0)])
    blocks = cells[_choose(rng, 4)] + rng.uniform(-5, 5, (b, 3, 2))
    names = np.array(list(COLOURS))[_choose(rng, len(COLOURS))]
    edges = rng.choice(list(EDGES), b)
    kind = rng.choice(kinds, b)
    tip = rng.uniform(8, IMAGE_SIZE - 8, (b, 2))
    speed = rng.uniform(24, 34, (b, 1))  # [pixel/s]
    wander = 5 * _smooth_noise(rng, (b, MAX_LENGTH, 2), 0.3)  # [pixel/s]

    edge = np.array([EDGES[name] for name in edges])
    done = np.zeros(b, dtype=bool)
    tips, actions, block_positions, is_done = [], [], [], []
    for t in range(MAX_LENGTH):
        blocks = pushed(tip, blocks)
        tips.append(tip)
        block_positions.append(blocks)

        is_done.append(done)
        velocity, done = _expert(tip, blocks, edge, kind, speed, done)
        step = (velocity + wander[:, t]).clip(-MAX_SPEED, MAX_SPEED) / FPS
        next_tip = moved(tip, step)
        actions.append((next_tip - tip) * (FPS / MAX_SPEED))
        tip = next_tip

    texts = {
        "move": [f"move to the {edges[i]} edge" for i in range(b)],
        "touch": [f"touch the {names[i, 0]} block" for i in range(b)],
        "edge": [f"push the {names[i, 0]} block to the {edges[i]} edge" for i in range(b)],
        "block": [f"push the {names[i, 0]} block to the {names[i, 1]} block" for i in range(b)],
    }
    num_busy = (~np.stack(is_done)).sum(axis=0)
    return Scene(
        task=[texts[kind[i]][i] for i in range(b)],
        kind=kind,
        edge=edge,
        length=(num_busy + AFTERWARDS).clip(MIN_LENGTH, MAX_LENGTH),
        embodiment=rng.random(b),
        tip=np.stack(tips, axis=1).astype(np.float32),
        action=np.stack(actions, axis=1).astype(np.float32),
        blocks=np.stack(block_positions, axis=1).astype(np.float32),
        colours=np.array([[COLOURS[name] for name in row] for row in names], dtype=np.float32),
        floor=_floor(rng),
        base=np.stack([rng.uniform(20, 44, b), np.full(b, 72.0)], axis=-1).astype(np.float32),
        skin=(rng.uniform(0.55, 1.0, (b, 1)) * np.array([245, 196, 160])).astype(np.float32),
    )


def _expert(tip, blocks, edge, kind, speed, done):
    """Moves to the edge, or to the first block, and stays there; or goes behind the first block, pushes it to the edge
    or to the second one, and backs off.

    Returns the velocity [pixel/s] (b, 2) and whether the task is done, now or before.
    """
    target = blocks[:, 0]
    between = blocks[:, 1] - target
    distance = np.linalg.norm(between, axis=-1)
    forward = np.where((kind == "block")[:, None], between / distance[:, None], edge)
    sideways = forward[:, ::-1] * [1, -1]
    place = _place(edge)
    done = done | is_done(tip, blocks, edge, kind)

    ahead = ((tip - target) * forward).sum(-1, keepdims=True)  # of the block; negative behind it
    aside = ((tip - target) * sideways).sum(-1, keepdims=True)
    push = speed * forward - 5 * aside * sideways

    way_round = 18 * np.where(aside > 0, 1, -1) * ((ahead + 11) / 8).clip(0, 1)
    behind = target - 11 * forward + way_round * sideways
    pushes = np.isin(kind, ("edge", "block"))[:, None]
    reached = np.where((kind == "move")[:, None], place, target)
    goal = np.where(pushes, behind, reached)
    goal = np.where(done[:, None], np.where(pushes, target - 22 * forward, tip), goal)
    approach = 5 * (goal - tip)
    approach *= np.minimum(1, speed / np.linalg.norm(approach, axis=-1, keepdims=True).clip(1e-6))

    is_behind = (ahead < -5) & (np.abs(aside) < 6)
    return np.where(is_behind & ~done[:, None] & pushes, push, approach), done


def _place(edge: np.ndarray) -> np.ndarray:
    """Where the tip goes that moves to an edge: (b, 2)."""
    return IMAGE_SIZE / 2 + (IMAGE_SIZE / 2 - 1.5 * BLOCK_BORDER) * edge


def is_done(
    tip: np.ndarray, blocks: np.ndarray, edge: np.ndarray, kind: np.ndarray, tolerance: float = 0.5
) -> np.ndarray:
    """Whether each task is done, to the tolerance [pixel]: bool (b,)."""
    target = blocks[:, 0]
    left = np.select(  # to go [pixel]
        [kind == "move", kind == "touch", kind == "block"],
        [
            np.linalg.norm(_place(edge) - tip, axis=-1) - 1,
            np.linalg.norm(target - tip, axis=-1) - CONTACT - 1,
            np.linalg.norm(blocks[:, 1] - target, axis=-1) - 11,
        ],
        IMAGE_SIZE / 2 - BLOCK_BORDER - ((target - IMAGE_SIZE / 2) * edge).sum(-1),
    )
    return left < tolerance


def moved(tip: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The tip (b, 2) after a step [pixel], inside the scene."""
    return (tip + step).clip(TIP_BORDER, IMAGE_SIZE - TIP_BORDER)


def pushed(tip: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Blocks (b, 3, 2) after those that the tip (b, 2) touches have given way."""
    from_tip = blocks - tip[:, None]
    distance = np.linalg.norm(from_tip, axis=-1, keepdims=True).clip(1e-6)
    pushed = tip[:, None] + from_tip * np.maximum(1, CONTACT / distance)
    return pushed.clip(BLOCK_BORDER, IMAGE_SIZE - BLOCK_BORDER)


@lru_cache(maxsize=512)
def _distractors(seed: int, group: int) -> np.ndarray:
    """Positions of two balls that wander and bounce off the borders; float32 (b, t, 2, 2)."""
    rng = _generator(seed, "distractors", group)
    start = rng.uniform(0, IMAGE_SIZE, (GROUP_SIZE, 1, 2, 2))
    velocity = 16 * _smooth_noise(rng, (GROUP_SIZE, MAX_LENGTH, 2, 2), 1.0)  # [pixel/s]
    position = start + velocity.cumsum(axis=1) / FPS
    folded = np.abs((position + IMAGE_SIZE) % (2 * IMAGE_SIZE) - IMAGE_SIZE)
    return folded.astype(np.float32)


@lru_cache(maxsize=512)
def _camera_shift(seed: int, group: int) -> np.ndarray:
    """How far the whole image is shifted; float32 (b, t, 2)."""
    rng = _generator(seed, "camera", group)
    return (2 * _smooth_noise(rng, (GROUP_SIZE, MAX_LENGTH, 2), 0.3)).astype(np.float32)


def _choose(rng: np.random.Generator, n: int) -> np.ndarray:
    """Three different numbers below n for each episode: int (b, 3)."""
    return rng.permuted(np.tile(np.arange(n), (GROUP_SIZE, 1)), axis=1)[:, :3]


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], duration: float) -> np.ndarray:
    """Ornstein-Uhlenbeck process of unit variance along axis 1, correlated over `duration` [s]."""
    white = rng.standard_normal(shape)
    decay = np.exp(-1 / (FPS * duration))
    noise = [white[:, 0]]
    for t in range(1, shape[1]):
        noise.append(decay * noise[-1] + np.sqrt(1 - decay**2) * white[:, t])
    return np.stack(noise, axis=1)


def _floor(rng: np.random.Generator) -> np.ndarray:
    """Rgb of the two tones of the floor, neither dark nor bright: float32 (b, 2, 3)."""
    tint = rng.uniform(-15, 15, (GROUP_SIZE, 1, 3)) - [25, 0, 0]  # no skin colour
    tone = rng.uniform(90, 170, (GROUP_SIZE, 1, 1)) + tint
    return (tone + np.array([[-9.0], [9.0]])).astype(np.float32)
