"""Bottlenecks of a latent action, all with one interface: `codes, indices, loss = quantizer(z)`.

`make_quantizer("fsq", dim=384, codebook_size=64, num_tokens=4)` builds any of them by name. Each is a
`Bottleneck`: linear to the few dimensions of a code, a quantizer that works in these dimensions, linear back.

State that follows the samples of all ranks while training: a codebook that stays in use, a norm.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement, count
from math import atanh, prod
from typing import Literal, NamedTuple, get_args

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


QuantizerName = Literal[
    "fsq", "vq", "vq-rotation", "vq-ema", "nsvq", "simvq", "lfq", "bsq", "residual-vq", "gaussian", "none"
]


class Quantized(NamedTuple):
    codes: Tensor  # float (b, n, d), carry the gradient to the input
    indices: Tensor | None  # int64 (b, n), or (b, n, q) of a residual quantizer; None of continuous codes
    loss: Tensor  # float32 scalar, to be added to the loss of the model


def make_quantizer(
    name: QuantizerName,
    dim: int,
    codebook_size: int,
    num_tokens: int,
    code_dim: int = 32,
    num_quantizers: int = 2,
    kl_weight: float = 1e-4,
) -> "Bottleneck":
    """The bottleneck of that name for inputs (b, num_tokens, dim).

    codebook_size: values of one index ("gaussian" and "none" have none); "fsq" wants a product of numbers
    from 3 to 8, "lfq" and "bsq" a power of two. code_dim: dimensions of a code ("fsq", "lfq" and "bsq" derive
    theirs from codebook_size). num_quantizers: indices of a token in "residual-vq". kl_weight: of "gaussian".
    Raises ValueError for a size that the quantizer cannot have.
    """
    sizes = dict(dim=dim, codebook_size=codebook_size, code_dim=code_dim, num_quantizers=num_quantizers)
    for setting, size in sizes.items():
        if size < 1:
            raise ValueError(f"{setting}={size}, but it must be at least 1")
    match name:
        case "fsq":
            return Bottleneck(dim, num_tokens, FSQ(fsq_levels(codebook_size)))
        case "vq":
            return Bottleneck(dim, num_tokens, VQ(code_dim, codebook_size))
        case "vq-rotation":
            return Bottleneck(dim, num_tokens, VQ(code_dim, codebook_size, rotation=True))
        case "vq-ema":
            return Bottleneck(dim, num_tokens, VQ(code_dim, codebook_size, ema=True))
        case "nsvq":
            return Bottleneck(dim, num_tokens, NSVQ(code_dim, codebook_size))
        case "simvq":
            return Bottleneck(dim, num_tokens, SimVQ(code_dim, codebook_size))
        case "lfq":
            return Bottleneck(dim, num_tokens, LFQ(codebook_size))
        case "bsq":
            return Bottleneck(dim, num_tokens, BSQ(codebook_size))
        case "residual-vq":
            stages = [VQ(code_dim, codebook_size) for _ in range(num_quantizers)]
            return Bottleneck(dim, num_tokens, ResidualQuantizer(stages))
        case "gaussian":
            return Bottleneck(dim, num_tokens, Gaussian(code_dim, kl_weight), in_dim=2 * code_dim)
        case "none":
            return Bottleneck(dim, num_tokens, Identity(code_dim))
        case _:
            raise ValueError(f"quantizer={name!r}, but hlrp knows {', '.join(get_args(QuantizerName))}")


class Bottleneck(nn.Module):
    """Linear map to the dimensions of a code, quantizer, linear map back; in float32, also under autocast.

    What discrete codes are made from is normalised over samples: a latent that hardly varies, as that of a fresh
    model, would else fall on one code and teach the decoder to ignore it.
    """

    def __init__(self, dim: int, num_tokens: int, quantizer: nn.Module, in_dim: int | None = None):
        """in_dim: what the quantizer reads of a token, where that is not as wide as its codes."""
        super().__init__()
        self.codebook_size = quantizer.codebook_size  # values of one index; None of continuous codes
        self.to_code = nn.Linear(dim, in_dim or quantizer.dim)
        is_discrete = quantizer.codebook_size is not None
        self.norm = RunningNorm(num_tokens, quantizer.dim) if is_discrete else nn.Identity()
        self.quantizer = quantizer
        self.from_code = nn.Linear(quantizer.dim, dim)

    def forward(self, z: Tensor) -> Quantized:  # b n dim
        vectors, indices, loss = self.quantize(z)
        return Quantized(self.expand(vectors), indices, loss)

    def quantize(self, z: Tensor) -> Quantized:
        """As `forward`, but the codes are vectors (b, n, e) of the quantizer's own dimensions."""
        with torch.autocast(z.device.type, enabled=False):
            return self.quantizer(self.norm(self.to_code(z.float())))

    def expand(self, vectors: Tensor) -> Tensor:
        """The codes (..., n, dim) of vectors (..., n, e)."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self.from_code(vectors.float())

    def decode(self, indices: Tensor) -> Tensor:
        """The codes (b, n, dim) that these indices stand for; ValueError where codes are continuous."""
        return self.expand(self.lookup(indices))

    def lookup(self, indices: Tensor) -> Tensor:
        """The vectors (b, n, e) that these indices stand for; ValueError where codes are continuous."""
        if self.codebook_size is None:
            raise ValueError(f"codes of {type(self.quantizer).__name__} are continuous and have no indices")
        with torch.autocast(indices.device.type, enabled=False):
            return self.quantizer.decode(indices)


class FSQ(nn.Module):
    """Rounds each dimension to a few levels (Mentzer et al. 2023, arXiv:2309.15505)."""

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"levels={tuple(levels)}, but FSQ wants numbers of at least 3, one a dimension")
        self.dim = len(levels)
        self.codebook_size = prod(levels)
        offset = [0.0 if level % 2 else 0.5 for level in levels]  # an even number of levels has no middle one
        shift = [atanh(2 * o / (level - 1)) for o, level in zip(offset, levels, strict=True)]  # keeps 0 at 0
        basis = [prod(levels[:i]) for i in range(self.dim)]
        constants = {"levels": levels, "basis": basis, "offset": offset, "shift": shift}
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        half = self.levels // 2
        bounded = torch.tanh(z + self.shift) * (self.levels - 1) / 2 - self.offset  # App. A.1
        digits = bounded.round() + half  # 0 ... levels - 1
        indices = (digits.long() * self.basis).sum(dim=-1)  # b n d -> b n
        codes = straight_through(bounded / half, (digits - half) / half)
        return Quantized(codes, indices, z.new_zeros(()))

    def decode(self, indices: Tensor) -> Tensor:
        half = self.levels // 2
        digits = indices[..., None] // self.basis % self.levels  # b n -> b n d
        return (digits - half) / half


def fsq_levels(codebook_size: int) -> tuple[int, ...]:
    """The fewest levels from 3 to 8 whose product is the codebook size: 64 -> (8, 8), 512 -> (8, 8, 8)."""

    def fits(size: int) -> bool:
        return size == 1 or any(size % level == 0 and fits(size // level) for level in range(3, 9))

    if codebook_size < 3 or not fits(codebook_size):
        smaller = next(filter(fits, range(codebook_size, 2, -1)), 3)
        larger = next(filter(fits, count(max(codebook_size + 1, 4))))
        product = f"a product of numbers from 3 to 8, such as {smaller} or {larger}"
        raise ValueError(f"codebook_size={codebook_size}, but FSQ wants {product}")
    for num_levels in count(1):
        choices = combinations_with_replacement(range(8, 2, -1), num_levels)
        if fitting := [levels for levels in choices if prod(levels) == codebook_size]:
            return max(fitting, key=min)  # the most even ones: (6, 4) rather than (8, 3)


class VQ(nn.Module):
    """Nearest code of a learned codebook (van den Oord et al. 2017, arXiv:1711.00937).

    rotation: the gradient comes to z by the rotation trick (arXiv:2410.06424), not straight through.
    ema: codes follow the running mean of their inputs (App. A.1), not a gradient.
    """

    def __init__(self, dim: int, codebook_size: int, rotation=False, ema=False, commitment_weight=0.25):
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size
        self.codebook = Codebook(dim, codebook_size, ema)
        self.pass_gradient = rotate if rotation else straight_through
        self.commitment_weight = commitment_weight

    def forward(self, z: Tensor) -> Quantized:
        codes, indices = self.codebook(z)
        loss = self.commitment_weight * F.mse_loss(z, codes.detach())  # moves inputs to codes
        if not self.codebook.ema:
            loss = loss + F.mse_loss(codes, z.detach())  # moves codes to inputs; Eq. 3
        return Quantized(self.pass_gradient(z, codes), indices, loss)

    def decode(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook.codes)


class NSVQ(nn.Module):
    """Nearest code; in training, noise as long as the quantization error takes its place, which gives inputs
    and codes a gradient without any loss (Vali and Bäckström 2022, IEEE Access 10)."""

    def __init__(self, dim: int, codebook_size: int):
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size
        self.codebook = Codebook(dim, codebook_size, ema=False)

    def forward(self, z: Tensor) -> Quantized:
        codes, indices = self.codebook(z)
        if self.training:
            error = torch.linalg.vector_norm(z - codes, dim=-1, keepdim=True)  # b n 1
            codes = z + error * F.normalize(torch.randn_like(z), dim=-1)
        else:
            codes = straight_through(z, codes)
        return Quantized(codes, indices, z.new_zeros(()))

    def decode(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook.codes)


class SimVQ(nn.Module):
    """Nearest code of a frozen random codebook behind one learned linear map, which moves all codes at once
    (Zhu et al. 2024, arXiv:2411.02038)."""

    def __init__(self, dim: int, codebook_size: int, commitment_weight=0.25):
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size
        self.register_buffer("frozen_codes", torch.randn(codebook_size, dim) * dim**-0.5)
        self.from_frozen = nn.Linear(dim, dim, bias=False)
        self.commitment_weight = commitment_weight

    def forward(self, z: Tensor) -> Quantized:
        codebook = self.from_frozen(self.frozen_codes)
        indices = nearest(z, codebook)
        codes = F.embedding(indices, codebook)
        loss = F.mse_loss(codes, z.detach()) + self.commitment_weight * F.mse_loss(z, codes.detach())
        return Quantized(straight_through(z, codes), indices, loss)

    def decode(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.from_frozen(self.frozen_codes))


class LFQ(nn.Module):
    """The signs of the input, with an entropy loss over all codes (Yu et al. 2023, arXiv:2310.05737)."""

    def __init__(self, codebook_size: int, entropy_weight=0.1, commitment_weight=0.25, temperature=1.0):
        super().__init__()
        self.dim, self.codebook_size = num_bits(codebook_size), codebook_size
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        self.temperature = temperature

    def forward(self, z: Tensor) -> Quantized:
        indices = signs_to_indices(z)
        codes = self.decode(indices)
        codebook = self.decode(torch.arange(self.codebook_size, device=z.device))  # k d
        probs = (2 / self.temperature * z @ codebook.T).softmax(dim=-1)  # b n k, softmax of -|z - c|^2
        entropy_loss = entropy(probs).mean() - entropy(probs.mean(dim=(0, 1)))  # each sure, all used; Eq. 5
        loss = self.entropy_weight * entropy_loss + self.commitment_weight * F.mse_loss(z, codes)
        return Quantized(straight_through(z, codes), indices, loss)

    def decode(self, indices: Tensor) -> Tensor:
        return indices_to_signs(indices, self.dim)


class BSQ(nn.Module):
    """The signs of the input on the unit sphere, with an entropy loss over bits, cheap for any codebook size
    (Zhao et al. 2024, arXiv:2406.07548)."""

    def __init__(self, codebook_size: int, entropy_weight=0.1, temperature=0.01):
        super().__init__()
        self.dim, self.codebook_size = num_bits(codebook_size), codebook_size
        self.entropy_weight, self.temperature = entropy_weight, temperature

    def forward(self, z: Tensor) -> Quantized:
        z = F.normalize(z, dim=-1)
        indices = signs_to_indices(z)
        on = torch.sigmoid(2 / self.temperature * z * self.dim**-0.5)  # b n d, softmax over the two codes
        bits = torch.stack([on, 1 - on], dim=-1)  # b n d 2
        entropy_loss = entropy(bits).sum(dim=-1).mean() - entropy(bits.mean(dim=(0, 1))).sum()
        codes = straight_through(z, self.decode(indices))
        return Quantized(codes, indices, self.entropy_weight * entropy_loss)

    def decode(self, indices: Tensor) -> Tensor:
        return indices_to_signs(indices, self.dim) * self.dim**-0.5


class ResidualQuantizer(nn.Module):
    """Each quantizer codes what the ones before it left; their codes add up (Zeghidour et al. 2021,
    arXiv:2107.03312, Algorithm 1). They learn by their loss alone: the gradient passes straight through."""

    def __init__(self, quantizers: Sequence[nn.Module]):
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.dim, self.codebook_size = quantizers[0].dim, quantizers[0].codebook_size

    def forward(self, z: Tensor) -> Quantized:
        codes, indices, loss = torch.zeros_like(z), [], 0.0
        for quantizer in self.quantizers:
            quantized = quantizer(z - codes)
            codes = codes + quantized.codes.detach()
            indices.append(quantized.indices)
            loss = loss + quantized.loss
        return Quantized(straight_through(z, codes), torch.stack(indices, dim=-1), loss)

    def decode(self, indices: Tensor) -> Tensor:
        stages = zip(self.quantizers, indices.unbind(dim=-1), strict=True)
        return sum(quantizer.decode(index) for quantizer, index in stages)


class Gaussian(nn.Module):
    """Mean and log variance -> a sample in training, the mean in evaluation; the loss is the KL divergence to
    N(0, 1) (Kingma and Welling 2013, arXiv:1312.6114, App. B)."""

    def __init__(self, dim: int, kl_weight: float):
        super().__init__()
        self.dim, self.codebook_size, self.kl_weight = dim, None, kl_weight

    def forward(self, z: Tensor) -> Quantized:  # b n 2d
        mean, log_variance = z.chunk(2, dim=-1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1).mean()
        codes = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        return Quantized(codes, None, self.kl_weight * kl)


class Identity(nn.Module):
    """No quantizer: the few dimensions of a code are the bottleneck."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.codebook_size = dim, None

    def forward(self, z: Tensor) -> Quantized:
        return Quantized(z, None, z.new_zeros(()))


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, to the bit, with the gradient of z."""
    return codes.detach() + (z - z.detach())


def rotate(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, as z turned and scaled by constants, so that the gradient turns too (Fifty et al. 2024,
    arXiv:2410.06424, Sec. 4.2)."""
    with torch.no_grad():
        from_z, to_code = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        middle = F.normalize(from_z + to_code, dim=-1)
        scale = codes.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    reflected = z - 2 * (z * middle).sum(dim=-1, keepdim=True) * middle
    rotated = reflected + 2 * (z * from_z).sum(dim=-1, keepdim=True) * to_code
    return straight_through(scale * rotated, codes)


def entropy(probs: Tensor) -> Tensor:
    """Entropy [nat] over the last axis."""
    return -(probs * probs.clamp(min=1e-8).log()).sum(dim=-1)


def signs_to_indices(z: Tensor) -> Tensor:
    """Bit i of the index is on where dimension i of z is positive."""
    return ((z > 0).long() << torch.arange(z.shape[-1], device=z.device)).sum(dim=-1)


def indices_to_signs(indices: Tensor, dim: int) -> Tensor:
    bits = indices[..., None] >> torch.arange(dim, device=indices.device) & 1
    return 2.0 * bits - 1


def num_bits(codebook_size: int) -> int:
    bits = codebook_size.bit_length() - 1
    if codebook_size < 2 or codebook_size != 2**bits:
        power = f"a power of two, such as {max(2**bits, 2)} or {max(2 ** (bits + 1), 4)}"
        raise ValueError(f"codebook_size={codebook_size}, but LFQ and BSQ want {power}")
    return bits
