from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from hlrp.laq import LAQ, LAQConfig
from hlrp.quantizers import (
    FSQ,
    NSVQ,
    QUANTIZERS,
    VQ,
    Bottleneck,
    Codebook,
    Gaussian,
    Quantized,
    Quantizer,
    QuantizerName,
    RunningNorm,
    fsq_levels,
    make_quantizer,
)

NAMES = list(QUANTIZERS)
DISCRETE = [name for name in NAMES if name not in ("gaussian", "none")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained(name: str) -> nn.Module:
    """A quantizer of inputs (b, n, 16) that has seen some training batches."""
    quantizer = make_quantizer(name, dim=16, codebook_size=64, num_tokens=4, code_dim=8)
    for _ in range(3):
        quantizer(torch.randn(8, 4, 16))
    return quantizer


def state_of(module: nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(a: dict, b: dict):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# The interface


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_tokens_trains(name, num_tokens):
    quantizer = make_quantizer(name, dim=16, codebook_size=64, num_tokens=num_tokens)
    codes, indices, loss = quantizer(torch.randn(5, num_tokens, 16))
    (codes.square().mean() + loss).backward()
    assert codes.shape == (5, num_tokens, 16)
    assert loss.shape == () and loss.dtype == torch.float32
    if name in DISCRETE:
        assert indices.shape == (5, num_tokens)
        assert indices.dtype == torch.int64
        assert indices.min() >= 0 and indices.max() < quantizer.codebook_size == 64
    else:
        assert indices is None and quantizer.codebook_size is None


@pytest.mark.parametrize("name", DISCRETE)
def test_indices_decode_to_the_codes_they_stand_for(name):
    quantizer = trained(name).eval()
    codes, indices, _ = quantizer(torch.randn(8, 4, 16))
    assert torch.equal(quantizer.decode(indices), codes)


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_parameters_have_gradients(name):
    quantizer = trained(name)
    z = torch.randn(8, 4, 16, requires_grad=True)
    codes, _, loss = quantizer(z)
    codes.square().sum().backward(retain_graph=True)
    assert z.grad.isfinite().all() and (z.grad != 0).any(dim=-1).all()
    loss.backward() if loss.requires_grad else None
    assert all(p.grad.isfinite().all() and p.grad.any() for p in quantizer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic_and_changes_no_state(name):
    quantizer = trained(name).eval()
    z, before = torch.randn(8, 4, 16), state_of(quantizer)
    first, second = quantizer(z), quantizer(z)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.loss, second.loss)
    assert_same_state(before, quantizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    quantizer = trained(name).eval()
    z = torch.randn(8, 4, 16).bfloat16()
    expected = quantizer(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        codes, indices, loss = quantizer(z)
        decoded = quantizer.decode(indices) if name in DISCRETE else codes
    assert codes.dtype == torch.float32
    assert torch.equal(codes, expected.codes) and torch.equal(loss, expected.loss)
    assert torch.equal(decoded, codes)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_quantizer_goes_on_to_the_bit(name):
    def train(quantizer, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            codes, _, loss = quantizer(torch.randn(8, 4, 16))
            (codes.square().mean() + loss).backward()
            optimizer.step()
            optimizer.zero_grad()

    def start():
        quantizer = make_quantizer(name, dim=16, codebook_size=64, num_tokens=4, code_dim=8)
        for codebook in quantizer.modules():
            if isinstance(codebook, Codebook):
                codebook.decay = 0.5  # codes die and restart within the test
        return quantizer, torch.optim.SGD(quantizer.parameters(), lr=0.1)

    quantizer, optimizer = start()
    train(quantizer, optimizer, range(10))
    resumed, resumed_optimizer = start()
    resumed.load_state_dict(state_of(quantizer))
    train(quantizer, optimizer, range(10, 20))
    train(resumed, resumed_optimizer, range(10, 20))
    assert_same_state(quantizer.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("name", ["fsq", "vq-ema", "nsvq"])
def test_training_compiles_into_one_graph(name):
    quantizer, z = trained(name), torch.randn(8, 4, 16)
    before = state_of(quantizer)
    outcomes = []
    for run in (quantizer, torch.compile(quantizer, backend="aot_eager", fullgraph=True)):
        quantizer.load_state_dict(before)
        torch.manual_seed(1)
        outcomes.append((run(z).codes, state_of(quantizer)))
    torch.testing.assert_close(*outcomes)


def test_fsq_takes_the_fewest_levels():
    sizes = {7: (7,), 24: (6, 4), 64: (8, 8), 1000: (8, 5, 5, 5), 1024: (8, 8, 4, 4)}
    assert {size: fsq_levels(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("fsq", 22, r"codebook_size=22; expected a product .* such as 21 or 24"),
        ("fsq", 2, r"codebook_size=2; expected a product .* such as 3 or 4"),
        ("vq", 0, r"codebook_size=0; expected 1 or more"),
        ("vqvae", 64, r"quantizer='vqvae'; expected one of fsq, vq, .*, none"),
        ("simvq", 64, r"quantizer='simvq'; expected one of fsq"),
    ],
)
def test_a_size_that_does_not_fit_is_named_with_what_would(name, size, message):
    with pytest.raises(ValueError, match=message):
        make_quantizer(name, dim=16, codebook_size=size, num_tokens=4)


def test_a_new_quantizer_is_one_class_and_one_line_of_the_table(monkeypatch):
    class Signs(Quantizer):
        def forward(self, z):
            bits = (z > 0).long()
            indices = (bits << torch.arange(self.dim)).sum(dim=-1)
            return Quantized(z + (2.0 * bits - 1 - z).detach(), indices, z.new_zeros(()))

        def decode(self, indices):
            return 2.0 * (indices[..., None] >> torch.arange(self.dim) & 1) - 1

    monkeypatch.setitem(QUANTIZERS, "signs", lambda code_dim, codebook_size: Signs(3, codebook_size))
    quantizer = LAQ(LAQConfig(quantizer="signs", codebook_size=8)).quantizer
    codes, indices, _ = quantizer(torch.randn(2, 32, 128))
    assert len(indices.unique()) > 1
    torch.testing.assert_close(quantizer.decode(indices), codes)
    assert get_args(QuantizerName) == tuple(name for name in QUANTIZERS if name != "signs")  # what --help lists


def test_continuous_codes_refuse_indices():
    with pytest.raises(ValueError, match="Gaussian are continuous"):
        make_quantizer("gaussian", dim=16, codebook_size=64, num_tokens=4).decode(torch.zeros(1, 1, dtype=torch.int64))


# Each method is what its paper says


@pytest.mark.parametrize("level", range(3, 9))
def test_fsq_reaches_every_level_and_keeps_zero_at_zero(level):
    codes, indices, _ = FSQ((level,))(torch.linspace(-9, 9, 999)[None, :, None])
    assert indices.unique().tolist() == list(range(level))
    assert codes.min() == -1 and (codes.diff(dim=1) >= 0).all()
    assert FSQ((level,))(torch.zeros(1, 1, 1)).codes.item() == 0


def test_commitment_weight_is_on_the_pull_of_the_inputs():
    vq = VQ(dim=8, codebook_size=4, commitment_weight=0.25).eval()
    z = torch.randn(1, 1, 8, requires_grad=True)
    _, indices, loss = vq(z)
    loss.backward()
    code_grad = vq.codebook.codes.grad[indices.item()]
    torch.testing.assert_close(z.grad[0, 0], -0.25 * code_grad)
    torch.testing.assert_close(code_grad, 2 / 8 * (vq.codebook.codes[indices.item()] - z[0, 0]).detach())


def test_rotation_turns_the_gradient_by_the_angle_between_input_and_code():
    vq = VQ(dim=2, codebook_size=1, rotation=True).eval()
    vq.codebook.codes.data = torch.tensor([[0.0, 2.0]])
    z = torch.tensor([[[1.0, 0.0]]], requires_grad=True)  # a quarter turn and twice the length
    codes, _, _ = vq(z)
    codes.backward(torch.tensor([[[0.0, 1.0]]]))  # a push away from the origin
    torch.testing.assert_close(z.grad, torch.tensor([[[2.0, 0.0]]]))  # stays a push away from the origin


def test_nsvq_noise_is_as_long_as_the_error_and_only_in_training():
    nsvq, z = NSVQ(dim=8, codebook_size=16), torch.randn(4, 2, 8)
    nsvq.codebook.usage.fill_(1)
    noisy, indices, _ = nsvq(z)
    hard = nsvq.decode(indices)
    assert not torch.allclose(noisy, hard)
    torch.testing.assert_close((noisy - z).norm(dim=-1), (hard - z).norm(dim=-1))
    assert torch.equal(nsvq.eval()(z).codes, hard)


def test_gaussian_loss_is_the_kl_divergence():
    gaussian = Bottleneck(16, 2, Gaussian(8, kl_weight=1.0))
    z = torch.randn(4, 2, 16)
    mean, log_variance = gaussian.to_code(z).chunk(2, dim=-1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(gaussian(z).loss, kl.sum(-1).mean())


# The codebook


def test_usage_counts_every_input():
    codebook = Codebook(dim=4, codebook_size=8, ema=True, decay=0.9)
    codebook.usage.fill_(1)
    _, indices = codebook(torch.randn(16, 3, 4))
    counts = torch.bincount(indices.flatten(), minlength=8)
    torch.testing.assert_close(codebook.usage, 0.9 + 0.1 * counts * 8 / 48)


def test_the_batch_size_does_not_decide_which_codes_are_dead():
    usage = []
    for repeats in (1, 100):
        codebook = Codebook(dim=4, codebook_size=8, ema=False, decay=0.5)
        codebook.usage.fill_(1)
        inputs = codebook.codes.detach()[[0, 0, 0, 1, 1, 2]].repeat(repeats, 1)[None]
        for _ in range(6):
            codebook(inputs)
        usage.append(codebook.usage.clone())
    torch.testing.assert_close(*usage)
    assert (usage[0] < 0.02).sum() == 5


@pytest.mark.parametrize("inputs", [torch.randn(2, 4, 8), torch.ones(2, 4, 8)], ids=["few", "equal"])
def test_restarted_codes_are_pairwise_distinct(inputs):
    codebook = Codebook(dim=8, codebook_size=64, ema=False)
    codebook(inputs)
    assert torch.pdist(codebook.codes.detach()).min() > 1e-4


def test_dead_codes_restart_at_live_inputs_and_the_others_stay():
    codebook = Codebook(dim=8, codebook_size=16, ema=False)
    dead = torch.arange(16) % 3 == 0
    codebook.usage.copy_(torch.where(dead, 0.001, 1.0))
    before, inputs = codebook.codes.detach().clone(), torch.randn(8, 2, 8)
    codebook(inputs)
    assert torch.equal(codebook.codes[~dead], before[~dead])
    distances, sources = torch.cdist(codebook.codes[dead].detach(), inputs.flatten(0, 1)).min(dim=-1)
    assert distances.max() < 0.02 and len(sources.unique()) == dead.sum()


def test_codes_restart_by_steps_without_an_end_of_epoch():
    codebook = Codebook(dim=8, codebook_size=16, ema=True, decay=0.9)
    codebook(torch.randn(16, 4, 8))
    placed = codebook.codes.clone()
    for _ in range(100):
        codebook(torch.randn(16, 4, 8) + 10)  # the inputs move on
    assert (codebook.codes - placed).norm(dim=-1).min() > 5
    assert codebook.usage.min() > 0.05


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("name", ["vq", "vq-rotation", "vq-ema", "nsvq"])
def test_batches_of_one_sample_bring_most_codes_into_use(name, num_tokens):
    quantizer = make_quantizer(name, dim=16, codebook_size=64, num_tokens=num_tokens)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-3)
    for _ in range(50):
        z = 1 + torch.randn(1, num_tokens, 16)
        codes, _, loss = quantizer(z)
        (loss + F.mse_loss(codes, z)).backward()
        nn.utils.clip_grad_norm_(quantizer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    indices = quantizer.eval()(1 + torch.randn(500, num_tokens, 16)).indices
    assert len(indices.unique()) > 32


@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_running_norm_knows_a_small_spread_beside_a_large_mean(batch_size):
    norm = RunningNorm(4, 8, momentum=0.01)
    for _ in range(1000 // batch_size):
        norm(90 + 0.3 * torch.randn(batch_size, 4, 8))
    x = 90 + 0.3 * torch.randn(1000, 4, 8)
    z = norm.eval()(x)
    assert z.mean((0, 1, 2)).abs() < 0.1 and abs(z.std() - 1) < 0.1
    torch.testing.assert_close(norm.inverse(z), x)


def run_rank(rank: int, folder: str):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizers = [VQ(4, 32), VQ(4, 32, ema=True), NSVQ(4, 32)]
    torch.manual_seed(1 + rank)  # from here on, each rank has its own inputs and noise
    inputs = [torch.randn(8, 2, 4) + 10 * rank for _ in range(4)]
    for quantizer in quantizers:
        quantizer.codebook.decay = 0.3  # codes die and restart within the test
        for z in inputs:
            quantizer(z)
    torch.save([quantizer.state_dict() for quantizer in quantizers], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_hold_the_same_codes_to_the_bit(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    for first, second in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True):
        assert_same_state(first, second)
        codes = first["codebook.codes"]
        assert torch.pdist(codes).min() > 1e-4
        assert 12 <= (codes.mean(dim=-1) > 5).sum() <= 20  # both ranks gave their share of codes
        torch.testing.assert_close(first["codebook.usage"].mean(), torch.tensor(1.0), rtol=0.3, atol=0)


# The same numbers as vector-quantize-pytorch, where both define the same thing


def test_fsq_is_that_of_vector_quantize_pytorch():
    from vector_quantize_pytorch import FSQ as Reference

    ours, theirs, z = FSQ((8, 5, 4)), Reference([8, 5, 4]), 2 * torch.randn(64, 8, 3)
    codes, indices, _ = ours(z)
    their_codes, their_indices = theirs(z)
    every = torch.arange(160)
    torch.testing.assert_close(ours.decode(every), theirs.indices_to_codes(every))
    same = indices == their_indices
    assert same.float().mean() > 0.99  # the reference widens the range by 0.1 %, which moves a few
    torch.testing.assert_close(codes[same], their_codes[same])


def test_vq_has_the_gradients_of_vector_quantize_pytorch():
    from vector_quantize_pytorch import VectorQuantize

    for rotation in (False, True):
        ours = VQ(8, 16, rotation=rotation, commitment_weight=1.0)
        ours.codebook.usage.fill_(1)
        options = {"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 0}
        theirs = VectorQuantize(8, 16, rotation_trick=rotation, **options)
        theirs._codebook.embed.data.copy_(ours.codebook.codes.data)
        z, weight = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
        grads = []
        for quantizer, codebook in ((ours, ours.codebook.codes), (theirs, theirs._codebook.embed)):
            inputs = z.clone().requires_grad_()
            codes, indices, loss = quantizer(inputs)
            ((codes * weight).sum() + loss.sum()).backward()
            grads.append((codes.detach(), indices, inputs.grad, codebook.grad.squeeze(0)))
        for mine, their in zip(*grads, strict=True):
            torch.testing.assert_close(mine, their)


def test_ema_codes_move_as_those_of_vector_quantize_pytorch():
    from vector_quantize_pytorch import VectorQuantize

    ours = VQ(8, 16, ema=True)
    ours.codebook.usage.fill_(1)
    theirs = VectorQuantize(8, 16, decay=0.99, eps=0, threshold_ema_dead_code=0)
    theirs._codebook.embed.copy_(ours.codebook.codes)
    theirs._codebook.embed_avg.copy_(ours.codebook.codes)
    for _ in range(20):
        z = torch.randn(4, 4, 8)  # as many inputs as codes, where relative and absolute counts agree
        ours(z), theirs(z)
    torch.testing.assert_close(ours.codebook.codes, theirs.codebook)


# The toy: a point is moved by an action; both frames are seen through a fixed nonlinear map


def observe(position):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.tanh(position @ torch.randn(3, 64, generator=generator))
    return torch.tanh(hidden @ torch.randn(64, 64, generator=generator) / 4)


def toy_data(size: int):
    position, action = 2 * torch.rand(size, 3) - 1, torch.rand(size, 3) - 0.5
    return observe(position), observe(position + action), action


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 64))


class Toy(nn.Module):
    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = mlp(), quantizer, mlp()

    def forward(self, first, second):
        z = rearrange(self.encoder(torch.cat([first, second], dim=-1)), "b (n d) -> b n d", n=4)
        codes, _, loss = self.quantizer(z)
        codes = rearrange(codes, "b n d -> b (n d)")
        return first + self.decoder(torch.cat([first, codes], dim=-1)), codes, loss


def linear_r2(x, y, new_x, new_y):
    """Ridge regression from x (n, d) to y (n, a), scored on new data."""
    x, new_x = F.pad(x, (0, 1), value=1.0), F.pad(new_x, (0, 1), value=1.0)
    weight = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1]), x.T @ y)
    return 1 - F.mse_loss(new_x @ weight, new_y) / new_y.var(dim=0).mean()


@pytest.mark.parametrize("name", NAMES)
def test_latents_of_the_toy_reconstruct_and_tell_the_action(name):
    first, second, action = toy_data(4096)
    model = Toy(make_quantizer(name, dim=16, codebook_size=64, num_tokens=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    copy_error = F.mse_loss(first, second)
    for _ in range(300):
        batch = torch.randint(len(first), (128,))
        prediction, _, loss = model(first[batch], second[batch])
        loss = loss + F.mse_loss(prediction, second[batch]) / copy_error
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    new_first, new_second, new_action = toy_data(1024)
    with torch.no_grad():
        codes = model(first, second)[1]
        prediction, new_codes, _ = model(new_first, new_second)
    error = F.mse_loss(prediction, new_second) / F.mse_loss(new_first, new_second)
    r2 = linear_r2(codes, action, new_codes, new_action)
    control = linear_r2(first, action, new_first, new_action)
    print(f"{name}: error / copy error {error:.3f}, R2 {r2:.3f}, of the observation only {control:.3f}")
    assert error < 0.4
    assert r2 > control + 0.2
