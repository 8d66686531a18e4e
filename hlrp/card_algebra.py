"""The algebra of latent actions in a probe card: whether they undo, add up, come back, and stay where nothing moves.

z(a, b) is the latent action from frame a to frame b, minus the mean of z(a, a), where nothing changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hlrp.laq import LAQ
from hlrp.laq_validation import partners
from hlrp.metrics import episode_split, ridge

CAMERA_SHIFT = 1 / 32  # of the frame's side
BRIGHTNESS = 0.8
BATCH_SIZE = 64
MIN_FITTED = 2  # episodes, to choose the penalty of a ridge on


def shifted(frames: Tensor, pixels: int) -> Tensor:
    """Frames uint8 (b, c, h, w) as a camera that turned sees them: moved right and down, the border repeated."""
    size = frames.shape[-1]
    padded = F.pad(frames.float(), (pixels, 0, pixels, 0), mode="replicate")
    return padded[..., :size, :size].to(torch.uint8)


def darker(frames: Tensor) -> Tensor:
    return (frames.float() * BRIGHTNESS).to(torch.uint8)


def relative_error(pred: Tensor, target: Tensor) -> float:
    """Squared error (b, d) over the variance of the target: 0 is exact, 1 as good as the mean."""
    spread = (target - target.mean(dim=0)).square().sum()
    return float((pred - target).square().sum() / spread.clamp(min=1e-12))


@torch.no_grad()
def algebra(laq: LAQ, frames: Tensor, tasks: list[str], episodes: Tensor, has_third: Tensor, seed: int = 0) -> dict:
    """frames: uint8 (b, 3, c, h, w), a, b, c, delta apart; has_third: bool (b,), whether the episode reaches c.

    Plain JSON:
        zero_transition         median length of z(a, a), over that of z(a, b)
        camera_shift            of z(a, a shifted), likewise
        crop, brightness        of what z(a, b) changes by where both frames are shifted, or darker, likewise;
                                None: half of all z(a, b) are z(a, a)
        reversal                relative error of -z(a, b) as z(b, a)
        additivity              of z(a, b) + z(b, c) as z(a, c); None: fewer than four episodes reach c
        cycle                   of z(a, decoded from a and z(a, b)) as z(a, b); None: no pixels are decoded
        cycle_tokens            share of the discrete tokens that the cycle gives back; None: continuous
    The last four are {"true", "shuffled"}: the latter with the latent action of another pair for z(a, b) or z(b, c).
    reversal and additivity are also {"linear", "linear_shuffled"}: the error of a ridge map from z(a, b), or from both,
    fitted on half of the episodes, which asks whether there is a rule at all, in whatever coordinates.
    """
    device = next(laq.parameters()).device

    def linear(x: Tensor, y: Tensor, of: Tensor) -> float:
        is_fit = episode_split(of, share=0.5, seed=seed).to(device)
        return relative_error(ridge(x[is_fit], y[is_fit], x[~is_fit], of.to(device)[is_fit]), y[~is_fit].double())

    def label(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        pairs = torch.stack([first, second], dim=1).split(BATCH_SIZE)
        vectors, indices = zip(*(laq.label(part.to(device)) for part in pairs), strict=True)
        return torch.cat(vectors).flatten(1), None if indices[0] is None else torch.cat(indices).flatten(1)

    def z(first: Tensor, second: Tensor) -> Tensor:
        return label(first, second)[0] - origin

    a, b, c = frames.unbind(1)
    pixels = max(1, round(CAMERA_SHIFT * frames.shape[-1]))
    nothing, _ = label(a, a)
    origin = nothing.mean(dim=0)
    forward, true_indices = label(a, b)
    forward = forward - origin
    others = partners(torch.zeros(len(a), dtype=torch.int64), seed).to(device)
    size = float(forward.norm(dim=-1).median())

    def response(difference: Tensor) -> float | None:
        return float(difference.norm(dim=-1).median()) / size if size else None

    figures = {
        "zero_transition": response(nothing - origin),
        "camera_shift": response(z(a, shifted(a, pixels))),
        "crop": response(z(shifted(a, pixels), shifted(b, pixels)) - forward),
        "brightness": response(z(darker(a), darker(b)) - forward),
    }
    backward = z(b, a)
    figures |= {"reversal": None, "additivity": None, "cycle": None, "cycle_tokens": None}
    if len(episodes.unique()) >= 2 * MIN_FITTED:
        figures["reversal"] = {
            "true": relative_error(-forward, backward),
            "shuffled": relative_error(-forward[others], backward),
            "linear": linear(forward, backward, episodes),
            "linear_shuffled": linear(forward[others], backward, episodes),
        }
    if len(episodes[has_third].unique()) >= 2 * MIN_FITTED:
        a, b, c = frames[has_third].unbind(1)
        first, second, both = forward[has_third.to(device)], z(b, c), z(a, c)
        swapped = partners(torch.zeros(len(second), dtype=torch.int64), seed)
        other, of = second[swapped.to(device)], episodes[has_third]
        figures["additivity"] = {
            "true": relative_error(first + second, both),
            "shuffled": relative_error(first + other, both),
            "linear": linear(torch.cat([first, second], dim=1), both, of),
            "linear_shuffled": linear(torch.cat([first, other], dim=1), both, of),
        }
    if "pixels" in laq.weights:
        a, b, _ = frames.unbind(1)
        decoded = [decode(laq, *part, device) for part in parts(a, b, tasks)]
        again, indices = label(a, torch.cat(decoded))
        again = again - origin
        figures["cycle"] = {"true": relative_error(again, forward), "shuffled": relative_error(again[others], forward)}
        if indices is not None:
            figures["cycle_tokens"] = {
                "true": float((indices == true_indices).double().mean()),
                "shuffled": float((indices[others] == true_indices).double().mean()),
            }
    return figures


def parts(a: Tensor, b: Tensor, tasks: list[str]):
    for i in range(0, len(a), BATCH_SIZE):
        rows = slice(i, i + BATCH_SIZE)
        yield a[rows], b[rows], tasks[rows]


def decode(laq: LAQ, first: Tensor, second: Tensor, tasks: list[str], device) -> Tensor:
    """The second frames as they are decoded, uint8."""
    codes, _ = laq.encode(torch.stack([first, second], dim=1).to(device))
    pixels = laq.decode(first.to(device), codes, tasks, second.to(device))["pixels"]
    return (pixels * 255).round().to(torch.uint8).cpu()
