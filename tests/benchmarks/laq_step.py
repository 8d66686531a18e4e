"""Time of a training step of LAQ, size "base", beside a model of the same shape written as the public ones are.

    python tests/benchmarks/laq_step.py                       # one thread, 16 pairs: about five minutes, 18 GB
    python tests/benchmarks/laq_step.py --threads 8 --batch-size 32

Both sides are timed in one run, in turns, in CPU time (`time.process_time`). A step is forward, backward, gradient
clipping and fused AdamW, the last two the same calls on both sides. The exit status is 1 where the reference takes
less than --min-ratio times as long as hlrp in bf16.

hlrp       A `base` LAQ of four tokens of eight codes, as the reference has, under bf16 autocast: `train_laq.py --size
           base --num-tokens 4 --codebook-size 8 --mixed-precision bf16`. That script's own choice is bf16 on a GPU and
           float32 on a CPU: "hlrp float32" is the latter.
reference  Width, heads, depths, patches, tokens and size of LAPA's LAQ (arXiv:2410.11758), in float32, as it is
           published: 8 spatial blocks over the patches of each frame, 8 temporal blocks over the two frames at each
           patch, 8 decoder blocks over the first frame. Attention by einsum and softmax, of cosine similarity, with
           a relative-position bias from a learned network; a depthwise 3-D convolution before each block; GEGLU of
           width 8/3 dim = 2730; NSVQ; cross-attention of the decoder to the codes.

What makes the ratio. (1) Precision: the floor below says what it is worth on this machine, 2.3x with avx512_bf16,
6x with amx_bf16. (2) Work, 164 instead of 206 GFLOP a pair: hlrp's second stage reads the change between the frames,
half as many tokens, and its decoder adds the codes to the patches instead of attending to them. (3) The share of the
floor that each reaches: no convolutions, a width that is a multiple of 64, fewer passes over memory. Depth, width
and parameters a block are equal. The two are not the same function, so no losses are compared: what both define
alike, attention without positions, is asserted to be equal before anything is timed.

What the reference is spared. Host syncs of the published code (`.item()`, `unique`, counts on the CPU), which cost
nothing here; null keys, dropout layers, unfused AdamW (1 s more a step). Its bias is computed once a stage, as
published, not in each attention, and from the 225 distinct displacements instead of all 4096 pairs of patches, a
cost that does not grow with the batch and would at 16 pairs weigh 4 times what it does at the published 64.

glibc gives large freed blocks back to the system and gets them again page by page, a cost that varies twofold here
from minute to minute. `train_laq.py` asks it to keep them, and so does the run, for both sides; --system-malloc
measures without.
"""

import argparse
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hlrp.distributed import keep_freed_memory
from hlrp.laq import LAQ, SIZES, LAQConfig
from hlrp.optimizers import parameter_groups
from hlrp.transformer import Attention

SIZE = SIZES["base"]
GRID = SIZE.image_size // SIZE.patch_size
NUM_TOKENS = 4  # of a latent action; 2 x 2, by convolutions
CODEBOOK_SIZE, CODE_DIM = 8, 32


class EinsumAttention(nn.Module):
    """Cosine-similarity attention by einsum and softmax, scores and probabilities as tensors of their own."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim // num_heads))
        self.k_scale = nn.Parameter(torch.ones(dim // num_heads))

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        k, v = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.num_heads) for y in (self.to_q(x), k, v))
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias
        out = torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class PositionBias(nn.Module):
    """A network from the displacement of two patches to one bias a head (Liu et al. 2021, arXiv:2111.09883, Eq. 3)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            *(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, num_heads),
        )

    def forward(self, grid: int) -> Tensor:
        steps = torch.arange(1 - grid, grid)
        displacements = torch.cartesian_prod(steps, steps).float()
        biases = self.net(displacements.sign() * displacements.abs().log1p())  # (2 grid - 1)^2 h
        row, column = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).unbind(1)
        rows, columns = (x[:, None] - x + grid - 1 for x in (row, column))  # n n
        return rearrange(biases[rows * (2 * grid - 1) + columns], "i j h -> h i j")


class PositionConvolution(nn.Module):
    """Depthwise 3 x 3 x 3 convolution, causal in time (Chu et al. 2021, arXiv:2102.10882, in three dimensions)."""

    def __init__(self, dim: int):
        super().__init__()
        self.convolution = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:  # b t h w d
        x = F.pad(rearrange(x, "b t h w d -> b d t h w"), (1, 1, 1, 1, 2, 0))
        return rearrange(self.convolution(x), "b d t h w -> b t h w d")


class GEGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = int(dim * 8 / 3)
        self.to_hidden = nn.Linear(dim, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.to_hidden(x).chunk(2, dim=-1)
        return self.to_out(F.gelu(gate) * hidden)


class ReferenceBlock(nn.Module):
    """One block over the patches of each frame, or, with over="time", over the frames at each patch."""

    def __init__(self, dim: int, num_heads: int, over: str, with_context: bool):
        super().__init__()
        self.pattern = {"space": "(b t) (h w) d", "time": "(b h w) t d"}[over]
        self.position = PositionConvolution(dim)
        self.attention_norm, self.attention = nn.LayerNorm(dim), EinsumAttention(dim, num_heads)
        if with_context:
            self.cross_norm, self.cross_attention = nn.LayerNorm(dim), EinsumAttention(dim, num_heads)
        self.feed_forward = nn.Sequential(nn.LayerNorm(dim), GEGLU(dim))

    def forward(self, x: Tensor, bias: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        b, t, h, w, _ = x.shape
        x = x + self.position(x)
        x = rearrange(x, f"b t h w d -> {self.pattern}")
        x = x + self.attention(self.attention_norm(x), bias=bias)
        if context is not None:
            x = x + self.cross_attention(self.cross_norm(x), context)
        x = x + self.feed_forward(x)
        return rearrange(x, f"{self.pattern} -> b t h w d", b=b, t=t, h=h, w=w)


class NoiseSubstitution(nn.Module):
    """NSVQ of the difference of two frames, each reduced to 2 x 2 tokens by convolutions."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_code, self.from_code = nn.Linear(dim, CODE_DIM), nn.Linear(CODE_DIM, dim)
        self.reduce = nn.Sequential(
            nn.Conv2d(CODE_DIM, CODE_DIM, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(CODE_DIM, CODE_DIM, 3)
        )
        self.codes = nn.Parameter(torch.randn(CODEBOOK_SIZE, CODE_DIM))

    def forward(self, x: Tensor) -> Tensor:  # b t h w d -> b n d
        b = len(x)
        tokens = self.reduce(rearrange(self.to_code(x), "b t h w d -> (b t) d h w"))
        first, second = rearrange(tokens, "(b t) d h w -> t (b h w) d", t=2)
        z = (second - first).float()
        distances = z.square().sum(1, keepdim=True) - 2 * z @ self.codes.T + self.codes.square().sum(1)
        nearest = self.codes[distances.argmin(dim=1)]
        noise = torch.randn_like(z)
        error = (z - nearest).norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        return self.from_code(rearrange(z + error * noise, "(b n) d -> b n d", b=b))


class Reference(nn.Module):
    """frames uint8 (b, 2, c, h, w) -> mean squared error of the second frame's pixels."""

    def __init__(self):
        super().__init__()
        dim, num_heads, pixels = SIZE.dim, SIZE.num_heads, 3 * SIZE.patch_size**2

        def blocks(depth: int, over: str, with_context=False) -> nn.ModuleList:
            return nn.ModuleList(ReferenceBlock(dim, num_heads, over, with_context) for _ in range(depth))

        self.from_pixels = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))
        self.bias = PositionBias(dim, num_heads)
        self.spatial = blocks(SIZE.encoder_depth, "space")
        self.temporal = blocks(SIZE.change_depth, "time")
        self.quantizer = NoiseSubstitution(dim)
        self.decoder = blocks(SIZE.decoder_depth, "space", with_context=True)
        self.spatial_norm, self.temporal_norm, self.decoder_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.to_pixels = nn.Linear(dim, pixels)

    def forward(self, batch: dict) -> tuple[Tensor, dict]:
        p = SIZE.patch_size
        patches = rearrange(batch["frames"] / 255, "b t c (h p) (w q) -> b t h w (c p q)", p=p, q=p)
        embedded = self.from_pixels(patches)

        x, bias = embedded, self.bias(GRID)
        for block in self.spatial:
            x = block(x, bias)
        x = self.spatial_norm(x)
        for block in self.temporal:
            x = block(x)
        codes = self.quantizer(self.temporal_norm(x))

        x, bias = embedded[:, :1].detach(), self.bias(GRID)
        for block in self.decoder:
            x = block(x, bias, codes)
        prediction = self.to_pixels(self.decoder_norm(x))
        return F.mse_loss(prediction.float(), patches[:, 1:]), {}


@torch.no_grad()
def check_attention() -> None:
    """What both sides define alike: attention without positions, on the same weights and inputs."""
    torch.manual_seed(0)
    ours, theirs = Attention(128, 4), EinsumAttention(128, 4)
    to_q, to_k, to_v = ours.to_qkv.weight.chunk(3)
    theirs.to_q.weight.copy_(to_q)
    theirs.to_kv.weight.copy_(torch.cat([to_k, to_v]))
    theirs.to_out.weight.copy_(ours.to_out.weight)
    x, unturned = torch.randn(2, 64, 128), torch.zeros(64, 16)
    torch.testing.assert_close(theirs(x), ours(x, unturned), rtol=1e-4, atol=1e-5)


def gflop(build, batch_size: int) -> float:
    """Matrix products and convolutions of forward and backward for one pair, from their shapes alone.

    Backward counts twice forward: one product for the inputs, one for the weights.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
        frames = torch.empty(batch_size, 2, 3, SIZE.image_size, SIZE.image_size, dtype=torch.uint8)
        model = build()
        with FlopCounterMode(display=False) as counter:
            model({"frames": frames, "step": 0})
    return 3 * counter.get_total_flops() / batch_size / 1e9


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a 1024 x 1024 x 1024 product: the floor of a step is its GFLOP by this."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    times = []
    for _ in range(9):
        start = time.process_time()
        for _ in range(4):
            a @ b.T
        times.append((time.process_time() - start) / 4)
    return 2 * 1024**3 / statistics.median(times) / 1e9


def step_times(model: nn.Module, optimizer, batch: dict, bf16: bool) -> tuple[float, float]:
    """CPU seconds of forward + backward, and of clipping + AdamW."""
    optimizer.zero_grad()
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = model(batch)
    loss.backward()
    middle = time.process_time()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return middle - start, time.process_time() - middle


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of each side, after one untimed")
    parser.add_argument("--min-ratio", type=float, default=3.0, help="least reference / hlrp, time of a step")
    parser.add_argument("--system-malloc", action="store_true", help="leave malloc as it is")
    args = parser.parse_args()
    if not args.system_malloc:
        keep_freed_memory()

    torch.set_num_threads(args.threads)
    cpuinfo = Path("/proc/cpuinfo").read_text()
    machine = re.search(r"model name\s*: (.*)", cpuinfo)
    flags = [f"{flag} {'yes' if flag in cpuinfo.split() else 'no'}" for flag in ("avx512_bf16", "amx_bf16")]
    print(
        f"{machine[1] if machine else 'unnamed CPU'}, {', '.join(flags)}; torch {torch.__version__}; "
        f"{args.threads} thread(s); {'system malloc' if args.system_malloc else 'freed memory kept'}"
    )
    check_attention()
    print("attention: einsum and hlrp give equal outputs on equal weights")

    torch.manual_seed(0)
    builds = {"reference": Reference, "hlrp": lambda: LAQ(LAQConfig(size="base", num_tokens=4, codebook_size=8))}
    work = {side: gflop(build, args.batch_size) for side, build in builds.items()}
    models = {side: build() for side, build in builds.items()}
    optimizers = {
        side: torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-5, fused=True) for side, model in models.items()
    }
    frames = (args.batch_size, 2, 3, SIZE.image_size, SIZE.image_size)
    frames = torch.randint(256, frames, dtype=torch.uint8)

    ours, theirs = ("hlrp", "bf16"), ("reference", "float32")
    between = [("reference", "bf16"), ("hlrp", "float32")]  # one change at a time; timed once
    times: dict[tuple, list] = {variant: [] for variant in (theirs, *between, ours)}
    rates: dict[str, list] = {"float32": [], "bf16": []}
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
    for repeat in range(args.repeats + 1):
        for side, precision in (theirs, ours, *(between if repeat == args.repeats else ())):
            rates[precision].append(matmul_rate(dtypes[precision]))
            batch = {"frames": frames, "step": repeat}
            measured = step_times(models[side], optimizers[side], batch, precision == "bf16")
            if repeat:  # the first step of a side makes kernels, gradients and the optimizer's state
                times[side, precision].append(measured)
    floor = {precision: statistics.median(values) for precision, values in rates.items()}
    steps = {variant: statistics.median(map(sum, values)) for variant, values in times.items()}

    print(f"matmul floor: float32 {floor['float32']:.0f}, bf16 {floor['bf16']:.0f} GFLOP/s")
    print(f"\nCPU seconds of a step of {args.batch_size} pairs; reference / this")
    heads = "params GFLOP/pair fwd+bwd GFLOP/s of-floor update step least..most ratio".split()
    print(f"{'':18}" + "".join(f"{head:>12}" for head in heads))
    for (side, precision), values in times.items():
        passes, updates = (statistics.median(column) for column in zip(*values, strict=True))
        step, totals = steps[side, precision], [sum(value) for value in values]
        rate = work[side] * args.batch_size / passes
        cells = (
            f"{sum(p.numel() for p in models[side].parameters()) / 1e6:.0f} M",
            f"{work[side]:.0f}",
            f"{passes:.2f}",
            f"{rate:.0f}",
            f"{rate / floor[precision]:.0%}",
            f"{updates:.2f}",
            f"{step:.2f}",
            f"{min(totals):.2f}..{max(totals):.2f}",
            f"{steps[theirs] / step:.2f}",
        )
        print(f"{side + ' ' + precision:18}" + "".join(f"{cell:>12}" for cell in cells))

    ratio = steps[theirs] / steps[ours]
    print(f"\n{ratio:.2f} times as fast as the reference; {args.min_ratio:g} are asked for")
    return 0 if ratio >= args.min_ratio else 1


if __name__ == "__main__":
    sys.exit(main())
