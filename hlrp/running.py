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
        return (x - self.mean) / self.scale()

    def inverse(self, x: Tensor) -> Tensor:
        """What `forward` made x from, in evaluation mode."""
        return x * self.scale() + self.mean

    def scale(self) -> Tensor:
        """The standard deviation; 1 where none is known, as after a single sample."""
        return torch.where(self.variance > 0, self.variance + 1e-6, 1.0).sqrt()

    @torch.no_grad()
    def follow(self, x: Tensor):
        """The first 1 / momentum batches count alike, so that batches of one sample tell a variance too."""
        x = x.double() - self.mean  # squares of a large mean would hide a small variance
        count = x.new_tensor(len(x)).expand(x.shape[1:])
        total, squares, count = all_reduce(torch.stack([x.sum(dim=0), x.square().sum(dim=0), count]))
        step = total / count  # from the old mean to that of the batch
        weight = self.is_new.clamp(min=self.momentum)  # 1, 1/2, 1/3, ...: the first batch replaces the initial values
        variance = (squares / count - step.square()).clamp(min=0) + (1 - weight) * step.square()
        self.variance.lerp_(variance.to(self.variance.dtype), weight)
        self.mean.add_(weight * step)
        self.is_new.copy_(weight / (1 + weight))


class Codebook(nn.Module):
    """Learned codes and how much each is used, counted over all ranks, which hold the same codes to the bit.

    In training, a code that is hardly used restarts at an input of the batch before the lookup, one code an input; of
    a small batch, the other codes wait for the next one. When training begins, no code has been used: the first batches
    place them all.
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
        turn = order // num_ranks
        says = z.square().mean(dim=-1) > 5e-3**2  # more than the noise that a code of the stage before is placed with
        rows = torch.randperm(len(z), device=z.device)
        rows = rows[(~says[rows]).to(torch.uint8).argsort(stable=True)]
        inputs = z[rows[turn % len(z)]] + 1e-3 * z.square().mean().sqrt() * torch.randn_like(self.codes)  # k d
        given = dead & (order % num_ranks == rank) & (turn < says.sum())
        inputs = all_reduce(torch.where(given[:, None], F.pad(inputs, (0, 1), value=1.0), 0.0))  # the others add zero
        is_placed = inputs[:, -1] > 0
        self.codes.copy_(torch.where(is_placed[:, None], inputs[:, :-1], self.codes))
        self.usage.copy_(torch.where(is_placed, 1.0, self.usage))

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
            self.codes.copy_(torch.where(usage[:, None] > 0, totals / usage[:, None], self.codes))
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
