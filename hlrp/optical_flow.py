"""Optical flow between two frames: a frozen RAFT teacher, and the loss of a prediction against it.

RAFT: Teed and Deng 2020 (arXiv:2003.12039). A flow is float (b, 2, h, w): how far each pixel of the first
frame moves, right (channel 0) and down (channel 1) [pixel].
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.utils import flow_to_image

MIN_SIZE = 128  # RAFT's correlation pyramid needs 16 x 16 features of 8 x 8 pixels [pixel]


class FlowTeacher(nn.Module):
    """Frozen RAFT of torchvision.

    weights: name of torchvision's weights ("C_T_V2", ...), which torchvision downloads once into the cache of
    torch.hub, checks against their hash and reads with weights_only=True; or a safetensors file of RAFT's
    state dict; or "random" (for tests). Raises ValueError naming weights that can't be read or do not fit.
    num_flow_updates: refinements of the flow (Sec. 3.3).
    """

    def __init__(self, weights: str, size: Literal["small", "large"] = "small", num_flow_updates: int = 12):
        super().__init__()
        self.raft = get_model(f"raft_{size}", weights=None)
        self.num_flow_updates = num_flow_updates
        if weights != "random":
            try:
                self.raft.load_state_dict(read_weights(weights, size))
            except RuntimeError as error:
                raise ValueError(f"flow weights {weights!r} do not fit raft_{size}: {error}") from error
        self.raft.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 (b, 2, c, h, w) -> flow float32 (b, 2, h, w) [pixel], in float32 under autocast too.

        Frames below 128 pixels are enlarged for RAFT, and sides stretched to the next multiple of 8.
        """
        height, width = frames.shape[-2:]
        enlarge = max(1.0, MIN_SIZE / min(height, width))
        size = [8 * -(-round(side * enlarge) // 8) for side in (height, width)]
        pixels = frames.flatten(0, 1).float() / 127.5 - 1  # (b t) c h w
        if size != [height, width]:
            pixels = F.interpolate(pixels, size, mode="bilinear")
        first, second = pixels.unflatten(0, (-1, 2)).unbind(dim=1)
        with torch.autocast(frames.device.type, enabled=False):
            flow = self.raft(first, second, num_flow_updates=self.num_flow_updates)[-1]
        self.raft.corr_block.corr_pyramid = None  # b (h w / 64)^2 floats, kept until the next call otherwise
        return resize_flow(flow, (height, width))


def farneback(frames: Tensor) -> Tensor:
    """Optical flow by no learned model (Farneback 2003), of OpenCV: uint8 (b, 2, c, h, w) -> float32 (b, 2, h, w)."""
    import cv2

    settings = {"pyr_scale": 0.5, "levels": 3, "winsize": 11, "iterations": 3, "poly_n": 5, "poly_sigma": 1.1}
    pictures = rearrange(frames.cpu(), "b t c h w -> b t h w c").contiguous().numpy()
    flows = []
    for pair in pictures:
        first, second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in pair)
        flows.append(torch.from_numpy(cv2.calcOpticalFlowFarneback(first, second, None, flags=0, **settings)))
    return rearrange(torch.stack(flows), "b h w xy -> b xy h w")


def read_weights(weights: str, size: str) -> dict[str, Tensor]:
    """The state dict that `weights` names. Raises ValueError that names it where it can't be read."""
    known = get_model_weights(f"raft_{size}")
    if weights in known.__members__:
        try:
            return known[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)
        except OSError as error:
            raise ValueError(
                f"cannot download flow weights {weights!r} from {known[weights].url}: {error}. "
                f"Put that file into {torch.hub.get_dir()}/checkpoints, or name a safetensors file"
            ) from error
    if not (weights.endswith(".safetensors") and Path(weights).is_file()):
        names = ", ".join(known.__members__)
        raise ValueError(f"flow weights {weights!r}: expected {names} or an existing safetensors file")
    return load_file(weights)


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """flow (b, 2, h, w) at another (height, width), its values in the pixels of that size."""
    height, width = flow.shape[-2:]
    if (height, width) == tuple(size):
        return flow
    scale = flow.new_tensor([size[1] / width, size[0] / height])  # x, y
    antialias = size[0] < height or size[1] < width
    return F.interpolate(flow, tuple(size), mode="bilinear", antialias=antialias) * scale[:, None, None]


def mean_flow(flow: Tensor) -> Tensor:
    """The mean over a frame: (b, 2, h, w) -> (b, 2)."""
    return flow.mean(dim=(-2, -1))


def flow_to_rgb(flow: Tensor) -> Tensor:
    """flow (b, 2, h, w) -> uint8 (b, 3, h, w): hue is direction, saturation length over the batch's largest.

    Flows that are to be compared belong in one batch.
    """
    return flow_to_image(flow.float())


def flow_loss(pred: Tensor, target: Tensor, mean_flow_weight: float) -> Tensor:
    """Charbonnier distance of two flows (b, 2, h, w) plus mean_flow_weight times that of their means: (b,).

    In the unit of the flows. The distance is averaged over pixels, of which most stand still; the means keep
    the direction of the whole.
    """
    distance = charbonnier(pred - target).mean(dim=(-2, -1))
    return distance + mean_flow_weight * charbonnier(mean_flow(pred) - mean_flow(target))


def charbonnier(difference: Tensor, epsilon: float = 1e-2) -> Tensor:
    """sqrt(|x|^2 + epsilon^2) - epsilon along dimension 1, smooth at zero (Charbonnier et al. 1994)."""
    return (difference.float().square().sum(dim=1) + epsilon**2).sqrt() - epsilon
