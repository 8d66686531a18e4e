"""What hlrp does on one GPU, in one sitting: what must be right, then how fast it is. Nothing is downloaded.

    python tests/benchmarks/gpu.py --output-dir outputs/gpu     # on a GPU: 25 minutes are aimed at, none has run it
    python tests/benchmarks/gpu.py --rehearse                   # the same code with small sizes on a CPU

The machine needs torch, torchvision, transformers, accelerate, and the wheels of tyro, einops, safetensors, pandas,
matplotlib, scikit-learn, av and webdataset; stage 3 is left out where LeRobot is missing, and that is said. Each row
of the table has what was asked for where something was. OUTPUT_DIR gets gpu.json and gpu.md. The exit status is 1
where a check failed.
"""

import copy
import json
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import hlrp
from hlrp.checkpoints import write_json, write_text
from hlrp.cli import tell_mistakes
from hlrp.laq import LAQ, LAQConfig
from hlrp.optimizers import make_optimizer, orthogonal
from hlrp.transformer import Block
from hlrp.vla import VLA, LatentSpace, VLAConfig
from hlrp.vlm import VLM, VLMConfig

ROOT = Path(__file__).parents[2]
TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.0}  # dense bfloat16, from their data sheets
TASKS = ["push the red block to the left", "open the drawer"]


@dataclass
class Args:
    output_dir: Path = Path("outputs/gpu")  # folder for gpu.json and gpu.md
    rehearse: bool = False  # small sizes, on a CPU too
    batch_sizes: tuple[int, ...] = (64, 128, 256, 512)  # pairs of frames in a step of LAQ base
    seconds: float = 5.0  # how long each speed is measured, after a warm-up [s]
    parts: tuple[str, ...] = field(default_factory=lambda: tuple(PARTS))  # what to run

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Row(NamedTuple):
    what: str
    figure: str
    wanted: str = ""
    passed: bool | None = None  # None: nothing is asked


def main(args: Args) -> int:
    if args.device.type == "cpu" and not args.rehearse:
        raise ValueError("no GPU is there; expected one, or --rehearse")
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise ValueError(f"parts={unknown}; expected some of {', '.join(PARTS)}")
    if args.rehearse:
        args.batch_sizes, args.seconds = (2, 4), 0.2
    args.output_dir.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU, a rehearsal"
    rows = [Row("machine", f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}")]
    for part in args.parts:
        start = time.monotonic()
        try:
            found = list(PARTS[part](args))
        except Exception as error:  # the others still run; the exit status tells
            traceback.print_exc()
            found = [Row(part, f"{type(error).__name__}: {error}".splitlines()[0][:200], "to run", False)]
        rows += [row._replace(what=f"{part}: {row.what}") for row in found]
        print(*(" | ".join(str(x) for x in row if x is not None) for row in found), sep="\n", flush=True)
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
    write_json(args.output_dir / "gpu.json", [row._asdict() for row in rows])
    signs = {None: "", True: "yes", False: "**no**"}
    lines = ["| what | figure | wanted | met |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.figure} | {row.wanted} | {signs[row.passed]} |" for row in rows]
    write_text(args.output_dir / "gpu.md", "\n".join(lines) + "\n")
    return int(any(row.passed is False for row in rows))


def laq_of(args: Args, **settings) -> LAQ:
    torch.manual_seed(0)
    size = {"size": "tiny", "image_size": 32} if args.rehearse else {"size": "base"}
    return LAQ(LAQConfig(**size | settings)).to(args.device)


def frames_of(args: Args, laq: LAQ, pairs: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (pairs, 2, 3, laq.image_size, laq.image_size), dtype=torch.uint8, generator=generator)
    return frames.to(args.device)


def vla_of(args: Args) -> tuple[VLA, dict]:
    """A VLA of half a billion parameters with random weights, and a batch for it."""
    torch.manual_seed(0)
    space = LatentSpace(0.5, num_tokens=4, codebook_size=8, vector_dim=8, image_size=64, fingerprint="")
    if args.rehearse:
        vlm = VLM.from_config(VLMConfig("tiny", 64), TASKS)
    else:
        from scaling import vlm_of  # beside this file

        vlm = VLM(*vlm_of("VLA 0.5B"), VLMConfig("random"))
    vla, b = VLA(VLAConfig(head="parallel"), space, vlm).to(args.device), args.batch_sizes[0]
    images = torch.randint(256, (b, 1, 3, vlm.image_size, vlm.image_size), dtype=torch.uint8, device=args.device)
    codes = torch.randint(8, (b, 1, 4), device=args.device)
    return vla, {"images": images, "task": (TASKS * b)[:b], "latent_indices": codes}


def autocast(args: Args):
    return torch.autocast(args.device.type, torch.bfloat16)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_of(args: Args, model: Callable, batch: dict, optimizer: Optimizer | None = None) -> Callable[[], Tensor]:
    """A training step as the scripts take it: forward in bfloat16, backward, clipping, the optimizer (AdamW)."""
    if optimizer is None:
        assert isinstance(model, nn.Module)
        optimizer = make_optimizer("adamw", model, set(), 1e-4, 0.05)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> Tensor:
        with autocast(args):
            loss, _ = model(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def seconds_of(args: Args, call: Callable) -> float:
    """The time of a call after three that warm up, a mean over `args.seconds`."""
    for _ in range(3):
        call()
    synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds:
        call()
        synchronize()
        count += 1
    return (time.perf_counter() - start) / count


def memory() -> str:
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else "-"


def precision(args: Args) -> Iterator[Row]:
    """bfloat16 against float32."""
    laq = laq_of(args)
    batch = {"frames": frames_of(args, laq, 4), "step": 0}
    losses, gradients = [], []
    for context in (nullcontext(), autocast(args)):
        laq.zero_grad()
        with context:
            loss, _ = laq(batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in laq.parameters() if p.grad is not None]))
    off = abs(losses[1] / losses[0] - 1)
    yield Row("loss in bfloat16, off by", f"{off:.2%}", "2 %", off < 0.02)
    cosine = float(torch.cosine_similarity(*gradients, dim=0))
    yield Row("cosine of the gradients", f"{cosine:.4f}", ".99", cosine > 0.99)


def optimizers(args: Args) -> Iterator[Row]:
    """Fused AdamW against a plain one; Muon's matrices."""
    one = nn.Linear(64, 64, device=args.device)
    other = copy.deepcopy(one)
    fused, plain = torch.optim.AdamW(one.parameters(), fused=True), torch.optim.AdamW(other.parameters(), fused=False)
    for layer, optimizer in ((one, fused), (other, plain)):
        for i in range(20):
            layer(torch.full((4, 64), i / 20, device=args.device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    off = float((one.weight - other.weight).detach().abs().max())
    yield Row("fused AdamW and the plain one differ by", f"{off:.1e}", "1e-5", off < 1e-5)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 256, 512, device=args.device)).float())
    low, high = float(values.min()), float(values.max())
    yield Row("singular values of Muon's update", f"{low:.2f} to {high:.2f}", ".3 to 1.3", low > 0.3 and high < 1.3)


def compiled(args: Args) -> Iterator[Row]:
    """--compile against the same step without it."""
    laq = laq_of(args)
    batch = {"frames": frames_of(args, laq, args.batch_sizes[0]), "step": 0}
    with autocast(args), torch.no_grad():
        expected = laq(batch)[0].item()
    plain = seconds_of(args, step_of(args, copy.deepcopy(laq), batch))
    for block in (module for module in laq.modules() if isinstance(module, Block)):
        block.compile(backend="aot_eager" if args.rehearse else "inductor")
    start = time.perf_counter()
    with autocast(args):
        found = laq(batch)[0]
    found.backward()
    laq.zero_grad()
    synchronize()
    warm_up = time.perf_counter() - start
    off = abs(found.item() / expected - 1)
    yield Row("loss of compiled blocks, off by", f"{off:.2%}", "1 %", off < 0.01)
    ratio = plain / seconds_of(args, step_of(args, laq, batch))
    yield Row("a compiled step", f"{ratio:.2f} times as fast, {warm_up:.0f} s to compile")


def run(folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A short run of train_laq.py; gives its weights."""
    data = ["--data", "world:clean?episodes=20", "--image-size", "32", "--batch-size", "8", "--num-workers", "0"]
    more = ["--val-samples", "16", "--save-freq", "5", "--pictures", "usage", "--output-dir", str(folder)]
    script = [str(ROOT / "train_laq.py"), *data, *more, *flags]
    result = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{script}: {result.stderr[-500:]}")
    return load_file(folder / "checkpoints/last/pretrained_model/model.safetensors")


def runs(args: Args) -> Iterator[Row]:
    """The script itself: a resume, and one rank of NCCL."""
    folder = args.output_dir / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    whole = run(folder / "whole", "--steps", "10")
    run(folder / "cut", "--steps", "10")
    shutil.rmtree(folder / "cut/checkpoints/000010")
    same = all(torch.equal(x, whole[name]) for name, x in run(folder / "cut", "--steps", "10").items())
    yield Row("a resumed run is the whole one to the bit", "yes" if same else "no", "yes", same)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    ranked = run(folder / "rank", "--steps", "10", launcher=launcher)
    off = max(float((x - whole[name]).abs().max()) for name, x in ranked.items() if x.is_floating_point())
    yield Row("one rank below a launcher differs by", f"{off:.1e}", "1e-3", off < 1e-3)


def laq(args: Args) -> Iterator[Row]:
    """Stage 1 over batch sizes."""
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else ""
    peak = next((tflops for gpu, tflops in TFLOPS.items() if gpu in name), None)
    for size in args.batch_sizes:
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = laq_of(args)
        batch = {"frames": frames_of(args, model, size), "step": 0}
        with FlopCounterMode(display=False) as counter, autocast(args):
            model(batch)[0].backward()
        model.zero_grad()
        seconds = seconds_of(args, step_of(args, model, batch))
        tflops = counter.get_total_flops() / seconds / 1e12
        used = f", {tflops / peak:.0%} of the peak" if peak else ""
        figure = f"{size / seconds:.0f} pairs/s, {1e3 * seconds:.0f} ms, {tflops:.1f} TFLOP/s{used}, {memory()}"
        yield Row(f"{size} pairs a step, AdamW", figure)
    muon = make_optimizer("muon", model, {Block}, 1e-4, 0.05)
    share = seconds_of(args, step_of(args, model, batch, muon)) / seconds - 1
    yield Row(f"what Muon adds to a step of {size}", f"{share:.0%}", "2 %", None if args.rehearse else share < 0.02)


def vla(args: Args) -> Iterator[Row]:
    """Stage 2, and the decoding of its codes."""
    model, batch = vla_of(args)
    count = sum(p.numel() for p in model.parameters())
    seconds = seconds_of(args, step_of(args, model, batch))
    size = len(batch["task"])
    yield Row(f"a step of {size} samples, {count / 1e6:.0f} M", f"{size / seconds:.0f} samples/s, {memory()}")
    model.eval()
    one = batch["images"][:1], batch["task"][:1]
    with autocast(args):
        seconds = seconds_of(args, lambda: model.generate(*one))
    yield Row("codes for one image", f"{1e3 * seconds:.1f} ms")


def inference(args: Args) -> Iterator[Row]:
    """Latent actions of new frames, and the same as a CUDA graph."""
    model = laq_of(args).eval()
    for size in (1, args.batch_sizes[0]):
        frames = frames_of(args, model, size)
        with torch.no_grad(), autocast(args):
            seconds = seconds_of(args, lambda frames=frames: model.label(frames))
        yield Row(f"latent actions of {size} pairs", f"{1e3 * seconds:.2f} ms")
    if args.device.type != "cuda":
        return
    frames = frames_of(args, model, 1)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        expected = model.label(frames).vectors
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model.label(frames).vectors
        graph.replay()
        same = torch.allclose(captured, expected, atol=1e-2)
        seconds = seconds_of(args, graph.replay)
    yield Row("one pair as a CUDA graph", f"{1e3 * seconds:.2f} ms, {'equal' if same else 'other'}", "equal", same)


@contextmanager
def told_of_syncs(args: Args):
    """A warning from each line at which the host waits for the GPU."""
    if args.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        if args.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def waits(args: Args, name: str, step: Callable) -> Row:
    step()  # caches and workspaces
    with warnings.catch_warnings(record=True) as caught, told_of_syncs(args):
        warnings.simplefilter("always")
        step()
    places = [(Path(w.filename), w.lineno) for w in caught if "synchroniz" in str(w.message)]
    own = [f"{path.name}:{line}" for path, line in places if path.parent == Path(hlrp.__file__).parent]
    figure = f"{len(places)} times" + (f", {', '.join(own[:4])}" if own else "")
    return Row(f"a step of the {name} waits", figure, "in no line of hlrp", not own)


def syncs(args: Args) -> Iterator[Row]:
    """An ordinary step does not wait for the GPU, but for what transformers' models read back (docs/performance.md)."""
    model = laq_of(args)
    batch = {"frames": frames_of(args, model, 2), "step": 0}
    yield waits(args, "LAQ", step_of(args, model, batch))
    yield waits(args, "VLA", step_of(args, *vla_of(args)))


def policy(args: Args) -> Iterator[Row]:
    """Stage 3, where LeRobot is there: a step, which waits for nothing, and a chunk."""
    if find_spec("lerobot") is None:
        yield Row("left out", "LeRobot is not installed")
        return
    from lerobot.configs import FeatureType, PolicyFeature

    from hlrp.policy import HLRPConfig, HLRPPolicy

    key, b = "observation.images.top", args.batch_sizes[0]
    config = HLRPConfig(vlm="tiny", image_size=64, device=args.device.type, push_to_hub=False)
    config.input_features = {key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
    model = HLRPPolicy(config, instructions=TASKS).to(args.device)
    batch = {key: torch.rand(b, 3, 64, 64, device=args.device), "task": (TASKS * b)[:b]}
    batch["action"] = torch.randn(b, config.chunk_size, 7, device=args.device)
    step = step_of(args, partial(model, as_tensors=True), batch, make_optimizer("adamw", model, set(), 1e-4, 0.05))
    yield waits(args, "policy", step)
    yield Row(f"a step of {b} samples, tiny", f"{b / seconds_of(args, step):.0f} samples/s")
    model.eval()
    one = {key: batch[key][:1], "task": batch["task"][:1]}
    with autocast(args):
        seconds = seconds_of(args, lambda: model.predict_action_chunk(one))
    yield Row("a chunk of actions for one observation", f"{1e3 * seconds:.1f} ms")


def curve(args: Args) -> Iterator[Row]:
    """MT10 at 128 pixels, small, where the simulator is there: hlrp and cloning, one demonstration of each task."""
    if find_spec("metaworld") is None:
        yield Row("left out", "MetaWorld is not installed")
        return
    folder = args.output_dir / "curve"
    tasks = ["reach-v3"] if args.rehearse else ["mt10"]
    data = f"metaworld:{tasks[0]}?episodes={8 if args.rehearse else 100}"
    command = [sys.executable, "-m", "hlrp.curve", "--data", data, "--tasks", *tasks, "--demonstrations", "1"]
    command += ["--seeds", "0", "--methods", "bc_long", "hlrp", "--episodes", "1" if args.rehearse else "5"]
    steps = "--steps 2 --batch-size 4 --num-workers 0" if args.rehearse else "--steps 2000"
    command += [f"--laq-flags={steps} --pictures usage", f"--vla-flags={steps} --pictures usage --accept-failed-laq"]
    command += [f"--policy-flags=--no-state {steps}", "--batch-size", "4" if args.rehearse else "64"]
    result = subprocess.run([*command, "--output-dir", str(folder)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr[-500:])
    rows = json.loads((folder / "curve.json").read_text())
    for method in ("bc_long", "hlrp"):
        outcomes = [row["success"] for row in rows if row["method"] == method]
        yield Row(f"{method}, success with one demonstration", f"{sum(outcomes)} of {len(outcomes)}")


PARTS: dict[str, Callable[[Args], Iterator[Row]]] = {
    "precision": precision,
    "optimizers": optimizers,
    "runs": runs,
    "syncs": syncs,
    "compile": compiled,
    "LAQ base": laq,
    "VLA 0.5B": vla,
    "inference": inference,
    "policy": policy,
    "curve": curve,
}

if __name__ == "__main__":
    tell_mistakes()
    sys.exit(main(tyro.cli(Args, description=__doc__)))
