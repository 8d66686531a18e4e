"""The transformer that all models share: patches, rotary 2-D positions, blocks; and the readout of actions.

x = x + attention(norm(x));  x = x + feed_forward(norm(x))                  pre-norm, arXiv:2002.04745
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(b, c, h, w) -> (b, n, patch_size * patch_size * c), patches in raster order."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for a grid of (rows, columns)."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch_size, q=patch_size)


def rotary_2d(grid: tuple[int, int], head_dim: int, theta: float = 100.0) -> Tensor:
    """Angles of axial rotary embedding (Heo et al. 2024, arXiv:2403.13298, Sec. 3.2): (rows * columns, head_dim / 2).

    Half of the channel pairs turn with the row, the other half with the column. So the attention between two patches
    depends on their displacement along both axes. Raises ValueError where head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim={head_dim}; expected a multiple of 4 for 2-D rotary positions")
    frequencies = theta ** -torch.linspace(0, 1, head_dim // 4)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], dim=-1).float()  # n 2
    return rearrange(positions[..., None] * frequencies, "n two f -> n (two f)")


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the channel pairs of x (b, heads, n, head_dim) by angles (n, head_dim / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467); the next layer's weight is its gain."""
    return F.rms_norm(x, x.shape[-1:])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """softmax(scale q k' + mask) v for q, k, v (b, heads, n, d); arguments as for F.scaled_dot_product_attention.

    Calls the fused kernel, or plain products where these are faster (docs/experiments.md).
    """
    if q.device.type != "cpu" or k.shape[-2] > 320 or dropout:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale)
    logits = q @ (k * (k.shape[-1] ** -0.5 if scale is None else scale)).mT  # b h n m
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(dim=-1) @ v  # b h n d


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions and normalised queries and keys.

    Query-key normalisation: Dehghani et al. 2023 (arXiv:2302.05442), Sec. 2.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim}; expected a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """x (b, n, d), angles (n, d / num_heads / 2) of `rotary_2d` -> (b, n, d)."""
        q, k, v = rearrange(self.to_qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        q, k = rotate(norm(q), angles), rotate(norm(k), angles)  # b h n d
        out = attend(q, k, v)  # b h n d
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Two layers with a GELU between. The hidden width is a multiple of 64, which suits tensor cores."""

    def __init__(self, dim: int, expansion: float = 4.0):
        super().__init__()
        hidden = 64 * round(dim * expansion / 64)
        self.to_hidden = nn.Linear(dim, hidden)
        self.to_out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # b n d
        return self.to_out(F.gelu(self.to_hidden(x)))  # b n d


class Block(nn.Module):
    """Pre-norm transformer block. A modulation scales and shifts what attention and feed-forward read."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.feed_forward = FeedForward(dim)

    def forward(self, x: Tensor, angles: Tensor, modulation: Tensor | None = None) -> Tensor:
        """x (b, n, d), modulation (b, 1, 4 d) of two scales and two shifts -> (b, n, d). Zeros change nothing."""
        if modulation is None:
            x = x + self.attention(norm(x), angles)
            return x + self.feed_forward(norm(x))
        scale, other_scale, shift, other_shift = modulation.chunk(4, dim=-1)  # b 1 d each
        x = x + self.attention(norm(x) * (1 + scale) + shift, angles)
        return x + self.feed_forward(norm(x) * (1 + other_scale) + other_shift)


class Transformer(nn.Module):
    """`depth` blocks over the patches of a grid, behind optional prefix tokens.

    forward(patches (b, n, d), prefix (b, m, d) or None) -> (b, m + n, d). Prefix tokens have no position: their angles
    are zero. modulations: one for each block.
    """

    angles: Tensor

    def __init__(self, dim: int, depth: int, num_heads: int, grid: tuple[int, int]):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.register_buffer("angles", rotary_2d(grid, dim // num_heads), persistent=False)

    def forward(self, patches: Tensor, prefix: Tensor | None = None, modulations: list[Tensor] | None = None) -> Tensor:
        x, angles = patches.float(), self.angles  # float32 under autocast too: x sums over the blocks
        if prefix is not None:
            x = torch.cat([prefix.float(), x], dim=1)  # b (m n) d
            angles = F.pad(angles, (0, 0, prefix.shape[1], 0))  # (m n) f
        for i, block in enumerate(self.blocks):
            x = block(x, angles, None if modulations is None else modulations[i])
        return norm(x)


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean of `values` (b,) over the samples that `mask` bool (b,) marks on all ranks; zero where it marks none.

    Gradients are averaged later, over ranks and over the batches accumulated in a step. So each batch divides its sum
    by the mean count per batch, and the average is exact however unevenly the marked samples lie.
    count: that mean; by default it is computed for this batch over the ranks.
    """
    if count is None:
        count = mask.sum().to(values.dtype)
        if dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
    values = torch.where(mask, values, 0.0)  # not values * mask: a masked value may be infinite
    return values.sum() / torch.where(count > 0, count, 1.0)


def mean_action(action: Tensor, action_is_pad: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (b, a) of the actions (b, t, a) that are not padding, and which samples have any: bool (b,)."""
    is_action = ~action_is_pad  # b t
    action = action.masked_fill(action_is_pad[..., None], 0.0)  # b t a
    mean = action.sum(1) / is_action.sum(1, keepdim=True).clamp(min=1)  # b a
    return mean, is_action.any(1)


class ActionReadout(nn.Module):
    """A linear map from features (b, d) to the mean action of a chunk, with weights of its own for each source."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, num_sources: int, action_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_sources, dim, action_dim))
        self.register_buffer("mean", torch.zeros(num_sources, action_dim))
        self.register_buffer("std", torch.ones(num_sources, action_dim))

    def set_statistics(self, statistics: list[tuple[Tensor, Tensor]]) -> None:
        """statistics: mean and standard deviation (a,) of each source's actions; errors are divided by the latter."""
        for source, (mean, std) in enumerate(statistics):
            self.mean[source, : len(mean)] = mean
            self.std[source, : len(std)] = std

    def forward(self, features: Tensor, source: Tensor) -> Tensor:
        """features (b, d), source int64 (b,) -> actions (b, a) in their own units."""
        standardised = torch.einsum("bd,bda->ba", features.float(), self.weight[source])  # b a
        return standardised * self.std[source] + self.mean[source]

    def loss(self, features: Tensor, batch: dict) -> Tensor:
        """Squared error in standard deviations, a mean over the samples that have actions.

        batch: action (b, t, a), action_is_pad bool (b, t), source int64 (b,); num_labelled: `masked_mean`'s count.
        """
        target, is_labelled = mean_action(batch["action"], batch["action_is_pad"])
        source = batch["source"]
        errors = (self(features, source) - target) / self.std[source]
        return masked_mean(errors.square().mean(-1), is_labelled, batch.get("num_labelled"))
