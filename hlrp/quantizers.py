"""Quantizers: how the vectors of a latent action become codes. One interface: `codes, indices, loss = quantizer(z)`.

`make_quantizer("fsq", dim=384, codebook_size=64, num_tokens=4)` builds a `Bottleneck` by name: a linear map to the few
dimensions of a code, the quantizer, a linear map back. A new quantizer is one class here and one line of `QUANTIZERS`.
"""

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement, count
from math import atanh, prod
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# name on the command line -> the quantizer for (dimensions of a code, codebook size)
QUANTIZERS: dict[str, Callable[[int, int], "Quantizer"]] = {
    "fsq": lambda code_dim, codebook_size: FSQ(fsq_levels(codebook_size)),
    "vq": lambda code_dim, codebook_size: VQ(code_dim, codebook_size),
    "vq-rotation": lambda code_dim, codebook_size: VQ(code_dim, codebook_size, rotation=True),
    "vq-ema": lambda code_dim, codebook_size: VQ(code_dim, codebook_size, ema=True),
    "nsvq": lambda code_dim, codebook_size: NSVQ(code_dim, codebook_size),
    "gaussian": lambda code_dim, codebook_size: Gaussian(code_dim),
    "none": lambda code_dim, codebook_size: Identity(code_dim),
}
if TYPE_CHECKING:
    QuantizerName = str
else:
    QuantizerName = Literal[*QUANTIZERS]  # the choices of --quantizer


class Quantized(NamedTuple):
    codes: Tensor  # float (b, n, d); the gradient flows through them to the input
    indices: Tensor | None  # int64 (b, n); None where codes are continuous
    loss: Tensor  # float32 scalar, to be added to the loss of the model


def make_quantizer(
    name: QuantizerName, dim: int, codebook_size: int, num_tokens: int, code_dim: int = 32
) -> "Bottleneck":
    """The bottleneck of that name for inputs (b, num_tokens, dim).

    codebook_size: values of one index ("gaussian" and "none" have no indices); for "fsq" a product of numbers from 3
    to 8. code_dim: dimensions of a code ("fsq" derives its own from codebook_size).
    Raises ValueError for an unknown name and for a size that the quantizer cannot have.
    """
    for setting, size in {"dim": dim, "codebook_size": codebook_size, "code_dim": code_dim}.items():
        if size < 1:
            raise ValueError(f"{setting}={size}; expected 1 or more")
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer={name!r}; expected one of {', '.join(QUANTIZERS)}")
    return Bottleneck(dim, num_tokens, QUANTIZERS[name](code_dim, codebook_size))


class Quantizer(nn.Module):
    """What a quantizer provides: `forward(z)` for z (b, n, in_dim) returns `Quantized` codes (b, n, dim)."""

    def __init__(self, dim: int, codebook_size: int | None = None, in_dim: int | None = None):
        """dim: dimensions of a code. codebook_size: values of an index; None where codes are continuous.
        in_dim: numbers that it reads per token; None: dim."""
        super().__init__()
        self.dim, self.codebook_size, self.in_dim = dim, codebook_size, in_dim or dim
        # of each dimension of an index, the first one runs fastest; empty where codes are continuous
        self.levels: tuple[int, ...] = () if codebook_size is None else (codebook_size,)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes (b, n, dim) for indices (b, n). Raises ValueError where codes are continuous."""
        raise ValueError(f"codes of {type(self).__name__} are continuous and have no indices")


class Bottleneck(nn.Module):
    """Linear map to the dimensions of a code, quantizer, linear map back; in float32, also under autocast.

    Inputs of discrete codes are normalised over samples. In a fresh model latents hardly vary; without the norm all
    would get the same code, and the decoder would learn to ignore it.
    """

    def __init__(self, dim: int, num_tokens: int, quantizer: Quantizer):
        super().__init__()
        self.codebook_size = quantizer.codebook_size  # values of one index; None where codes are continuous
        self.levels = quantizer.levels
        self.to_code = nn.Linear(dim, quantizer.in_dim)
        is_discrete = quantizer.codebook_size is not None
        self.norm = RunningNorm(num_tokens, quantizer.dim) if is_discrete else nn.Identity()
        self.quantizer = quantizer
        self.from_code = nn.Linear(quantizer.dim, dim)

    def forward(self, z: Tensor) -> Quantized:  # b n dim
        vectors, indices, loss = self.quantize(z)  # b n d, b n
        return Quantized(self.expand(vectors), indices, loss)  # b n dim, b n

    def quantize(self, z: Tensor) -> Quantized:
        """As `forward`, but the codes (b, n, d) have the quantizer's own dimensions."""
        with torch.autocast(z.device.type, enabled=False):
            return self.quantizer(self.norm(self.to_code(z.float())))

    def expand(self, vectors: Tensor) -> Tensor:
        """Codes in the quantizer's own dimensions (..., n, d) -> codes (..., n, dim)."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self.from_code(vectors.float())

    def decode(self, indices: Tensor) -> Tensor:
        """The codes (b, n, dim) for indices (b, n). Raises ValueError where codes are continuous."""
        return self.expand(self.lookup(indices))

    def lookup(self, indices: Tensor) -> Tensor:
        """As `decode`, but the codes (b, n, d) have the quantizer's own dimensions."""
        with torch.autocast(indices.device.type, enabled=False):
            return self.quantizer.decode(indices)


class FSQ(Quantizer):
    """Rounds each dimension to a few levels (Mentzer et al. 2023, arXiv:2309.15505)."""

    num_levels: Tensor
    basis: Tensor
    offset: Tensor
    shift: Tensor

    def __init__(self, levels: Sequence[int]):
        """levels: of each dimension, 3 or more. The codebook has as many codes as their product."""
        if not levels or min(levels) < 3:
            raise ValueError(f"levels={tuple(levels)}; expected one number of 3 or more for each dimension")
        super().__init__(dim=len(levels), codebook_size=prod(levels))
        self.levels = tuple(levels)
        offset = [0.0 if level % 2 else 0.5 for level in levels]  # an even number of levels has no middle one
        shift = [atanh(2 * o / (level - 1)) for o, level in zip(offset, levels, strict=True)]  # keeps 0 at 0
        basis = [prod(levels[:i]) for i in range(self.dim)]
        constants = {"num_levels": levels, "basis": basis, "offset": offset, "shift": shift}
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, z: Tensor) -> Quantized:  # b n d
        half = self.num_levels // 2
        bounded = torch.tanh(z + self.shift) * (self.num_levels - 1) / 2 - self.offset  # b n d; App. A.1
        digits = bounded.round() + half  # b n d, from 0 to levels - 1
        indices = (digits.long() * self.basis).sum(dim=-1)  # b n d -> b n
        codes = straight_through(bounded / half, (digits - half) / half)
        return Quantized(codes, indices, z.new_zeros(()))

    def decode(self, indices: Tensor) -> Tensor:
        half = self.num_levels // 2
        digits = indices[..., None] // self.basis % self.num_levels  # b n -> b n d
        return (digits - half) / half


def fsq_levels(codebook_size: int) -> tuple[int, ...]:
    """The fewest levels from 3 to 8 whose product is the codebook size: 64 -> (8, 8), 512 -> (8, 8, 8)."""

    def is_product(size: int) -> bool:
        return size == 1 or any(size % level == 0 and is_product(size // level) for level in range(3, 9))

    if codebook_size < 3 or not is_product(codebook_size):
        smaller = next(filter(is_product, range(codebook_size, 2, -1)), 3)
        larger = next(filter(is_product, count(max(codebook_size + 1, 4))))
        product = f"a product of numbers from 3 to 8 for quantizer='fsq', such as {smaller} or {larger}"
        raise ValueError(f"codebook_size={codebook_size}; expected {product}")
    num_levels = 1
    while True:
        choices = combinations_with_replacement(range(8, 2, -1), num_levels)
        if choices := [levels for levels in choices if prod(levels) == codebook_size]:
            return max(choices, key=min)  # the most even levels: (6, 4) rather than (8, 3)
        num_levels += 1


class VQ(Quantizer):
    """Nearest code of a learned codebook (van den Oord et al. 2017, arXiv:1711.00937).

        loss = |codes - sg[z]|^2 + commitment_weight |z - sg[codes]|^2                                      Eq. 3

    rotation: the gradient reaches z by the rotation trick (arXiv:2410.06424), not straight through.
    ema: codes follow the running mean of their inputs (App. A.1), and the first term is left out.
    commitment_weight: the paper has .25. Inputs are normalised here, so that term would be larger than the error of the
    pixels, and the inputs would gather in clusters that say nothing.
    """

    def __init__(self, dim: int, codebook_size: int, rotation=False, ema=False, commitment_weight=0.005):
        super().__init__(dim, codebook_size)
        self.codebook = Codebook(dim, codebook_size, ema)
        self.pass_gradient = rotate if rotation else straight_through
        self.commitment_weight = commitment_weight

    def forward(self, z: Tensor) -> Quantized:  # b n d
        codes, indices = self.codebook(z)  # b n d, b n
        loss = self.commitment_weight * F.mse_loss(z, codes.detach())  # moves inputs to codes
        if not self.codebook.ema:
            loss = loss + F.mse_loss(codes, z.detach())  # moves codes to inputs
        return Quantized(self.pass_gradient(z, codes), indices, loss)

    def decode(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook.codes)


class NSVQ(Quantizer):
    """Nearest code; in training z plus noise of the same distance (Vali and Bäckström 2022, IEEE Access 10).

        codes = z + |z - nearest| v / |v|,  v ~ N(0, 1)

    The noise gives inputs and codes a gradient, so there is no loss.
    """

    def __init__(self, dim: int, codebook_size: int):
        super().__init__(dim, codebook_size)
        self.codebook = Codebook(dim, codebook_size, ema=False)

    def forward(self, z: Tensor) -> Quantized:  # b n d
        codes, indices = self.codebook(z)  # b n d, b n
        if self.training:
            error = torch.linalg.vector_norm(z - codes, dim=-1, keepdim=True)  # b n 1
            codes = z + error * F.normalize(torch.randn_like(z), dim=-1)
        else:
            codes = straight_through(z, codes)
        return Quantized(codes, indices, z.new_zeros(()))

    def decode(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook.codes)


class Gaussian(Quantizer):
    """z holds mean and log variance; the code is a sample in training and the mean in evaluation.

    loss = kl_weight KL(N(mean, variance) || N(0, 1))          Kingma and Welling 2013, arXiv:1312.6114, App. B
    """

    def __init__(self, dim: int, kl_weight: float = 1e-4):
        super().__init__(dim, in_dim=2 * dim)
        self.kl_weight = kl_weight

    def forward(self, z: Tensor) -> Quantized:  # b n (2 d)
        mean, log_variance = z.chunk(2, dim=-1)  # b n d each
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1).mean()
        codes = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        return Quantized(codes, None, self.kl_weight * kl)


class Identity(Quantizer):
    """No quantizer: the few dimensions of a code are the bottleneck."""

    def forward(self, z: Tensor) -> Quantized:  # b n d
        return Quantized(z, None, z.new_zeros(()))


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, to the bit, with the gradient of z."""
    return codes.detach() + (z - z.detach())


def rotate(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, reached from z by a constant rotation and scale, so that the gradient turns with them.

    Fifty et al. 2024, arXiv:2410.06424, Sec. 4.2.
    """
    with torch.no_grad():
        from_z, to_code = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        middle = F.normalize(from_z + to_code, dim=-1)
        scale = codes.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    reflected = z - 2 * (z * middle).sum(dim=-1, keepdim=True) * middle
    rotated = reflected + 2 * (z * from_z).sum(dim=-1, keepdim=True) * to_code
    return straight_through(scale * rotated, codes)


class Codebook(nn.Module):
    """Learned codes and how often each is used, counted over all ranks, which hold the same codes to the bit.

    In training, a code that is hardly used restarts at an input of the batch, before the lookup. Each input restarts
    one code at most; in a small batch the other codes wait for the next one. When training begins, no code has been
    used, so the first batches place them all.
    """

    codes: Tensor
    usage: Tensor

    def __init__(self, dim: int, codebook_size: int, ema: bool, decay=0.99, dead_below=0.01):
        """ema: codes follow the running mean of their inputs, not a gradient. decay: of the running means, per
        training step. dead_below: a code restarts when it is used less often than this times the mean code."""
        super().__init__()
        codes = torch.randn(codebook_size, dim)
        if ema:
            self.register_buffer("codes", codes)
        else:
            self.codes = nn.Parameter(codes)
        self.register_buffer("usage", torch.zeros(codebook_size))  # 1: used as often as the mean code
        self.ema, self.decay, self.dead_below = ema, decay, dead_below

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The codes nearest to z, with the gradient to the codebook, and their indices."""
        inputs = rearrange(z.detach(), "b n d -> (b n) d")
        if self.training:
            self.restart_dead_codes(inputs)
        indices = nearest(z, self.codes)  # b n
        codes = F.embedding(indices, self.codes)  # b n d
        if self.training:
            self.follow(inputs, indices.flatten())
        return codes, indices

    @torch.no_grad()
    def restart_dead_codes(self, z: Tensor):
        """Moves each dead code to one of the inputs z (n, d); the ranks give inputs in turn. Noise keeps apart the
        codes of equal inputs."""
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        is_dead = self.usage < self.dead_below  # k
        order = is_dead.cumsum(dim=0) - 1  # 0, 1, 2, ... over the dead codes
        turn = order // num_ranks
        is_varied = z.square().mean(dim=-1) > 5e-3**2  # the norm turns a first batch of one sample into zeros
        rows = torch.randperm(len(z), device=z.device)
        rows = rows[(~is_varied[rows]).to(torch.uint8).argsort(stable=True)]  # the varied inputs first
        inputs = z[rows[turn % len(z)]] + 1e-3 * z.square().mean().sqrt() * torch.randn_like(self.codes)  # k d
        is_given = is_dead & (order % num_ranks == rank) & (turn < is_varied.sum())  # by this rank
        inputs = all_reduce(torch.where(is_given[:, None], F.pad(inputs, (0, 1), value=1.0), 0.0))  # k (d + 1)
        is_placed = inputs[:, -1] > 0
        self.codes.copy_(torch.where(is_placed[:, None], inputs[:, :-1], self.codes))
        self.usage.copy_(torch.where(is_placed, 1.0, self.usage))

    @torch.no_grad()
    def follow(self, z: Tensor, indices: Tensor):
        """Moves the usage, and with `ema` the codes, towards a batch of inputs z (n, d) with these indices (n,)."""
        codebook_size, dim = self.codes.shape
        sums = z.new_zeros(codebook_size, dim + 1)
        sums = all_reduce(sums.index_add_(0, indices, F.pad(z, (0, 1), value=1.0)))  # k (d + 1); last: the counts
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
    distances = torch.addmm(size, rearrange(z, "b n d -> (b n) d"), codebook.T, alpha=-2)  # (b n) k, less |z|^2
    return distances.argmin(dim=-1).view(z.shape[:-1])


def all_reduce(x: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class RunningNorm(nn.Module):
    """Scales each dimension of x (b, *shape) to zero mean and unit variance over samples, by running statistics.

    Unlike batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167), it computes one function in training and evaluation,
    and no sample depends on the others of its batch.
    """

    mean: Tensor
    variance: Tensor
    is_new: Tensor

    def __init__(self, *shape: int, momentum: float = 0.1):
        """momentum: weight of a new batch once 1 / momentum batches have counted alike."""
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("is_new", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:  # b ...
        if self.training:
            self.follow(x.detach())
        return (x - self.mean) / self.scale()

    def inverse(self, x: Tensor) -> Tensor:
        """The inputs from which `forward` makes x in evaluation mode."""
        return x * self.scale() + self.mean

    def scale(self) -> Tensor:
        """The standard deviation; 1 where it is not known, as after a single sample."""
        return torch.where(self.variance > 0, self.variance + 1e-6, 1.0).sqrt()

    @torch.no_grad()
    def follow(self, x: Tensor):
        """Moves mean and variance towards a batch x. The first 1 / momentum batches count alike, so that batches of
        one sample give a variance too."""
        x = x.double() - self.mean  # squares of a large mean would hide a small variance
        count = x.new_tensor(len(x)).expand(x.shape[1:])
        total, squares, count = all_reduce(torch.stack([x.sum(dim=0), x.square().sum(dim=0), count]))
        step = total / count  # from the old mean to the mean of the batch
        weight = self.is_new.clamp(min=self.momentum)  # 1, 1/2, 1/3, ...: the first batch replaces the initial values
        variance = (squares / count - step.square()).clamp(min=0) + (1 - weight) * step.square()
        self.variance.lerp_(variance.to(self.variance.dtype), weight)
        self.mean.add_(weight * step)
        self.is_new.copy_(weight / (1 + weight))
