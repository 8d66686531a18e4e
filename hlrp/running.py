"""State that follows the samples of all ranks while training: a codebook that stays in use, a norm."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """Zero mean and unit variance over samples, of each dimension of x (b, *shape), by running statistics.

    Unlike batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167), training and evaluation compute one function, and
    no sample depends on the others of its batch.
    """

    def __init__(self, *shape: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("is_new", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.follow(x.detach())
        return (x - self.mean) * (self.variance + 1e-6).rsqrt()

    def inverse(self, x: Tensor) -> Tensor:
        """What `forward` made x from, in evaluation mode."""
        return x * (self.variance + 1e-6).sqrt() + self.mean

    @torch.no_grad()
    def follow(self, x: Tensor):
        count = x.new_tensor(len(x)).expand(x.shape[1:])
        total, squares, count = all_reduce(torch.stack([x.sum(dim=0), x.square().sum(dim=0), count]))
        mean = total / count
        weight = self.is_new.clamp(min=self.momentum)  # the first batch replaces the initial values
        shift = (1 - weight) * (mean - self.mean).square()
        self.variance.lerp_((squares / count - mean.square()).clamp(min=0) + shift, weight)
        self.mean.lerp_(mean, weight)
        self.is_new.zero_()


class Codebook(nn.Module):
    """Learned codes and how much each is used, counted over all ranks, which hold the same codes to the bit.

    In training, a code that is hardly used restarts at an input of the batch before the lookup. When training
    begins, no code has been used: the first batch places them all.
    """

    def __init__(self, dim: int, codebook_size: int, ema: bool, decay=0.99, dead_below=0.01):
        """decay: of the running means, per training step. dead_below: relative usage that restarts a code."""
        super().__init__()
        codes = torch.randn(codebook_size, dim)
        if ema:
            self.register_buffer("codes", codes)
        else:
            self.codes = nn.Parameter(codes)
        self.register_buffer("usage", torch.zeros(codebook_size))  # 1: used as often as the mean code
        self.ema, self.decay, self.dead_below = ema, decay, dead_below

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes (b, n, d), with the gradient to the codebook, and their indices (b, n)."""
        inputs = rearrange(z.detach(), "b n d -> (b n) d")
        if self.training:
            self.restart_dead_codes(inputs)
        indices = nearest(z, self.codes)
        codes = F.embedding(indices, self.codes)
        if self.training:
            self.count(inputs, indices.flatten())
        return codes, indices

    @torch.no_grad()
    def restart_dead_codes(self, z: Tensor):
        """Inputs z (n, d) of all ranks in turn give new codes; noise keeps apart those at equal inputs."""
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        dead = self.usage < self.dead_below
        order = dead.cumsum(dim=0) - 1  # 0, 1, 2, ... over the dead codes
        draw = torch.randperm(len(z), device=z.device)[order // num_ranks % len(z)]
        inputs = z[draw] + 1e-3 * z.square().mean().sqrt() * torch.randn_like(self.codes)  # k d
        is_mine = (order % num_ranks == rank)[:, None]
        inputs = all_reduce(torch.where(is_mine, inputs, 0.0))  # one rank gives, the others add zero
        self.codes.copy_(torch.where(dead[:, None], inputs, self.codes))
        self.usage.copy_(torch.where(dead, 1.0, self.usage))

    @torch.no_grad()
    def count(self, z: Tensor, indices: Tensor):
        """Moves usage, and codes that follow their inputs, to a batch z (n, d) with these indices (n,)."""
        codebook_size, dim = self.codes.shape
        sums = z.new_zeros(codebook_size, dim + 1)
        sums = all_reduce(sums.index_add_(0, indices, F.pad(z, (0, 1), value=1.0)))  # last column: the counts
        sums = sums * codebook_size / sums[:, -1].sum()  # independent of the batch size
        usage = torch.lerp(sums[:, -1], self.usage, self.decay)
        if self.ema:
            totals = torch.lerp(sums[:, :-1], self.usage[:, None] * self.codes, self.decay)
            self.codes.copy_(totals / usage[:, None])
        self.usage.copy_(usage)


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Index (b, n) of the code (k, d) closest to each input (b, n, d)."""
    size = codebook.square().sum(dim=-1)
    distances = torch.addmm(size, rearrange(z, "b n d -> (b n) d"), codebook.T, alpha=-2)  # less |z|^2
    return distances.argmin(dim=-1).view(z.shape[:-1])


def all_reduce(x: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x
