"""The action expert: flow matching turns noise into a chunk of actions, given a backbone's hidden states.

Flow matching: Lipman et al. 2022 (arXiv:2210.02747). As a head of a vision-language model: pi0, Black et al. 2024
(arXiv:2410.24164), Sec. IV. With s from 0 (noise) to 1 (actions):

    x_s = s actions + (1 - s) noise,    velocity(x_s, s, context) -> actions - noise

One trunk serves several spaces, such as the latent actions of video and the actions of a robot.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from hlrp.transformer import FeedForward, attend, norm

LAST_TIME = 0.999  # training draws no later time: at 1, x_s is the actions themselves


class Context(NamedTuple):
    """What the expert attends to, computed once for all steps of the integration."""

    keys_values: list[tuple[Tensor, Tensor]]  # for each block, (b, heads, n, head_dim)
    bias: Tensor  # (b, 1, 1, n), -inf at padding

    def repeat(self, times: int) -> "Context":
        """The context of a batch that is repeated `times` times along its first axis."""
        keys_values = [(k.repeat(times, 1, 1, 1), v.repeat(times, 1, 1, 1)) for k, v in self.keys_values]
        return Context(keys_values, self.bias.repeat(times, 1, 1, 1))


def sinusoids(x: Tensor, dim: int, last: float) -> Tensor:
    """Features (..., dim) of numbers x (...), at dim / 2 frequencies between 1 and `last` [rad per unit of x]."""
    frequencies = last ** torch.linspace(0, 1, dim // 2, device=x.device)  # d / 2
    angles = x[..., None] * frequencies  # ... d / 2
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def mean_over_steps(errors: Tensor, is_pad: Tensor | None) -> Tensor:
    """The mean (b,) of errors (b, t) over the steps that are not padding; 0 where all are. is_pad: bool (b, t)."""
    if is_pad is None:
        return errors.mean(1)
    return torch.where(is_pad, 0.0, errors).sum(1) / (~is_pad).sum(1).clamp(min=1)


class ExpertBlock(nn.Module):
    """Attention among the chunk, attention to the context, feed-forward; the time modulates all three.

    The modulation is DiT's adaLN-Zero (Peebles and Xie 2022, arXiv:2212.09748, Sec. 3.2):
        x = x + gate * layer(norm(x) * (1 + scale) + shift)
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.to_q, self.to_kv = nn.Linear(dim, dim, bias=False), nn.Linear(context_dim, 2 * dim, bias=False)
        self.from_context = nn.Linear(dim, dim, bias=False)
        self.feed_forward = FeedForward(dim)
        self.to_modulation = nn.Linear(dim, 9 * dim)
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)

    def heads(self, x: Tensor, parts: int) -> Tensor:  # b n (parts d)
        return rearrange(x, "b n (parts h d) -> parts b h n d", parts=parts, h=self.num_heads)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:  # b n context_dim
        k, v = self.heads(self.to_kv(norm(context)), 2)  # b h n head_dim each
        return norm(k), v

    def forward(self, x: Tensor, time: Tensor, keys_values: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """x (b, t, d), time (b, d), keys and values (b, h, n, head_dim), bias (b, 1, 1, n) -> (b, t, d)."""
        shifts, scales, gates = self.to_modulation(time)[:, None].unflatten(-1, (3, 3, -1)).unbind(-3)  # b 1 3 d each

        def modulated(x: Tensor, i: int) -> Tensor:
            return norm(x) * (1 + scales[..., i, :]) + shifts[..., i, :]

        q, k, v = self.heads(self.to_qkv(modulated(x, 0)), 3)  # b h t head_dim each
        out = rearrange(attend(norm(q), norm(k), v), "b h t d -> b t (h d)")
        x = x + gates[..., 0, :] * self.to_out(out)

        (q,) = self.heads(self.to_q(modulated(x, 1)), 1)  # b h t head_dim
        k, v = keys_values
        out = rearrange(attend(norm(q), k, v, bias.to(q.dtype)), "b h t d -> b t (h d)")
        x = x + gates[..., 1, :] * self.from_context(out)

        return x + gates[..., 2, :] * self.feed_forward(modulated(x, 2))


class ActionExpert(nn.Module):
    """A transformer over the steps of a chunk that cross-attends to the hidden states of a backbone.

    spaces: name -> dimensions of one step. Values are expected at zero mean and unit variance.
    """

    def __init__(self, spaces: dict[str, int], context_dim: int, dim: int = 256, depth: int = 4, num_heads: int = 4):
        super().__init__()
        if dim % num_heads or dim % 2:
            raise ValueError(f"dim={dim}; expected an even number that is a multiple of num_heads={num_heads}")
        self.dim = dim
        self.sizes: dict[str, int] = {}  # dimensions of a step of each space
        self.from_space, self.to_space = nn.ModuleDict(), nn.ModuleDict()
        self.to_time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(ExpertBlock(dim, num_heads, context_dim) for _ in range(depth))
        for name, size in spaces.items():
            self.add_space(name, size)

    def add_space(self, name: str, size: int, out_size: int | None = None) -> None:
        """size: dimensions of a step. out_size: of the output for a step, where it is not a velocity."""
        self.sizes[name] = size
        self.from_space[name] = nn.Linear(size, self.dim)
        self.to_space[name] = to_space = nn.Linear(self.dim, size if out_size is None else out_size)
        nn.init.zeros_(to_space.weight)
        nn.init.zeros_(to_space.bias)

    def read(self, hidden: Tensor, mask: Tensor) -> Context:
        """hidden (b, n, context_dim), mask bool (b, n), True where the expert may attend."""
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
        keys_values = []
        for block in self.blocks:
            assert isinstance(block, ExpertBlock)
            keys_values.append(block.keys_values(hidden))
        return Context(keys_values, bias[:, None, None])

    def velocity(self, space: str, x: Tensor, time: Tensor, context: Context) -> Tensor:
        """x (b, t, a) at times (b,) in [0, 1] -> (b, t, a)."""
        steps = torch.arange(x.shape[1], device=x.device)
        hidden = self.from_space[space](x) + sinusoids(steps, self.dim, 1e-2)  # b t d
        time = self.to_time(sinusoids(time, self.dim, 1e3))  # b d
        for block, keys_values in zip(self.blocks, context.keys_values, strict=True):
            hidden = block(hidden, time, keys_values, context.bias)
        return self.to_space[space](norm(hidden)).float()  # b t a

    def errors(
        self, space: str, actions: Tensor, context: Context, is_pad: Tensor | None = None, num_draws: int = 1
    ) -> Tensor:
        """The flow-matching loss (b,) of actions (b, t, a), a mean over the steps that are not padding.

        Times are drawn from pi0's beta distribution, which prefers noise (its Appendix B). num_draws: pairs of time and
        noise per sample, over which the loss is a mean; the times are spread evenly over the distribution, and the
        context is computed once for all (CogACT, arXiv:2411.19650, Sec. 3.3).
        """
        (b, *shape), device = actions.shape, actions.device
        u = (torch.arange(num_draws, device=device)[:, None] + torch.rand(num_draws, b, device=device)) / num_draws
        time = LAST_TIME * (1 - u ** (1 / 1.5)).flatten()  # u^(1/1.5) is Beta(1.5, 1)
        noise = torch.randn(num_draws * b, *shape, device=device)
        if is_pad is not None:
            actions = actions.masked_fill(is_pad[..., None], 0.0)
        actions = actions.repeat(num_draws, 1, 1)
        s = time[:, None, None]
        repeated = context.repeat(num_draws) if num_draws > 1 else context
        predicted = self.velocity(space, s * actions + (1 - s) * noise, time, repeated)
        errors = (predicted - (actions - noise)).square().mean(-1).view(num_draws, b, -1).mean(0)
        return mean_over_steps(errors, is_pad)

    @torch.no_grad()
    def mean(self, space: str, shape: tuple[int, ...], context: Context) -> Tensor:
        """The mean of the actions (b, t, a) that `sample` draws, in one pass. At time 0 the velocity is the mean of
        actions - noise, and the noise here is zero."""
        nothing = torch.zeros(shape, device=context.bias.device)
        return self.velocity(space, nothing, torch.zeros(len(nothing), device=nothing.device), context)

    def regress(self, space: str, length: int, context: Context) -> Tensor:
        """The output (b, length, out_size) of one pass at time 0 with zeros as the noise."""
        b, device = len(context.bias), context.bias.device
        nothing = torch.zeros(b, length, self.sizes[space], device=device)
        return self.velocity(space, nothing, torch.zeros(b, device=device), context)

    @torch.no_grad()
    def sample(self, space: str, noise: Tensor, context: Context, num_steps: int = 10) -> Tensor:
        """Actions (b, t, a) from noise of that shape, by Euler steps."""
        x = noise
        for i in range(num_steps):
            time = torch.full((len(x),), i / num_steps, device=x.device)
            x = x + self.velocity(space, x, time, context) / num_steps
        return x
