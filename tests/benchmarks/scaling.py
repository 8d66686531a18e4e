"""What training costs on 1 to 512 GPUs, on paper: prints the tables of docs/scaling.md.

    python tests/benchmarks/scaling.py                          # about a minute on one core, 7 GB of memory
    python tests/benchmarks/scaling.py --efficiency 0.3 --bus 200

Counted on the real models: FLOPs of forward and backward pass by torch.utils.flop_counter, bytes of the tensors that
autograd keeps under bf16, parameters. A VLA is counted with two and three layers of each tower: layers are alike, so
that the rest follows exactly. Assumed: the arguments below, one by one in docs/scaling.md.
"""

import argparse
import multiprocessing
from dataclasses import dataclass

import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hlrp.laq import LAQ, LAQConfig
from hlrp.transformer import Block
from hlrp.vla import VLA, LatentSpace, VLAConfig
from hlrp.vlm import VLM, VLMConfig, tiny_tokenizer

GPUS = (1, 8, 64, 512)
COLUMNS = ("GPUs", "batch", "samples/s", "k tokens/s", "step, ms", "GB sent by a GPU a step", "in ms")
COLUMNS += ("memory, GB a GPU", "GPU-hours", "hours", "loader cores a GPU")
TASK = "put the red bowl on the plate, then close the drawer"


@dataclass
class Counted:
    name: str
    parameters: float  # trained
    flops: float  # of a sample, forward and backward
    activations: float  # kept for the backward pass, of a sample [byte]
    bytes_a_parameter: float  # weight, gradient, optimizer's state
    tokens: int  # of a sample, in the largest tower
    frozen: float = 0.0  # parameters that only label
    optimizer_flops: float = 0.0  # of a step, on every rank


def count(model, batch) -> tuple[float, float]:
    """FLOPs of a training step for one sample, and bytes kept between its passes for each sample."""
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(batch)
        loss.backward()
    model.zero_grad()
    two = {k: torch.cat([x, x]) if torch.is_tensor(x) else x * 2 if k == "task" else x for k, x in batch.items()}
    return counter.get_total_flops(), kept(model, two) - kept(model, batch)  # without bf16 copies of weights


def kept(model, batch) -> int:
    """Bytes that autograd keeps of a forward pass, weights left out."""
    sizes, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = []  # else an address could be used twice

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return x

    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model(batch)
    return sum(sizes.values())


def laq_base() -> tuple[Counted, float]:
    """Stage 1, and the FLOPs of labelling a pair for stage 2."""
    laq = LAQ(LAQConfig(size="base", num_tokens=4, codebook_size=8))
    frames = torch.randint(0, 256, (1, 2, 3, 256, 256), dtype=torch.uint8)
    flops, memory = count(laq, {"frames": frames, "step": 0})
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        laq.encode(frames)
    parameters = sum(p.numel() for p in laq.parameters() if p.requires_grad)
    patches = 2 * (256 // laq.config.patch_size) ** 2
    muon = newton_schulz(laq)
    return Counted("LAQ base", parameters, flops, memory, 12, patches, 0, muon), counter.get_total_flops()


def newton_schulz(laq: LAQ) -> float:
    """FLOPs of a step of Muon, which multiplies each matrix (m, n) of the blocks with itself in five iterations."""
    blocks = [module for module in laq.modules() if isinstance(module, Block)]
    shapes = [sorted(p.shape) for block in blocks for p in block.parameters() if p.ndim == 2]
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes)


# the published architectures of SmolVLM2-500M-Video-Instruct and SmolVLM2-2.2B-Instruct
VLMS = {
    "VLA 0.5B": {
        "text": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
        | {"num_attention_heads": 15, "num_key_value_heads": 5},
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "image_size": 512, "patch_size": 16},
        "scale_factor": 4,
    },
    "VLA 2B": {
        "text": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
        | {"num_attention_heads": 32, "num_key_value_heads": 32},
        "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "image_size": 384, "patch_size": 14},
        "scale_factor": 3,
    },
}


def vlm_of(name: str, text_layers: int | None = None, vision_layers: int | None = None):
    """transformers' model, its tokenizer, which reads byte by byte, and image processor."""
    tokenizer = tiny_tokenizer([TASK])
    tokenizer.add_tokens(["<image>", "<fake_token_around_image>", "<global-img>"], special_tokens=True)
    part = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    tokenizer.chat_template = f"{{% for part in messages[0]['content'] %}}{part}{{% endfor %}}<eos>"
    shape = VLMS[name]
    text = {"model_type": "llama", "vocab_size": 49280, "pad_token_id": tokenizer.pad_token_id} | shape["text"]
    vision, edge = dict(shape["vision"]), shape["vision"]["image_size"]
    text["num_hidden_layers"] = text_layers or text["num_hidden_layers"]
    vision["num_hidden_layers"] = vision_layers or vision["num_hidden_layers"]
    config = transformers.SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=shape["scale_factor"],
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    size = {"longest_edge": edge}
    processor = transformers.SmolVLMImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
    return transformers.SmolVLMForConditionalGeneration(config), tokenizer, processor


def vla_of(name: str, text_layers: int, vision_layers: int) -> list[float]:
    """FLOPs, bytes and tokens of stage 2 for one image of 256 pixels and one latent action."""
    space = LatentSpace(0.5, num_tokens=4, codebook_size=8, vector_dim=128, image_size=256, fingerprint="")
    frames = torch.randint(0, 256, (1, 1, 3, 256, 256), dtype=torch.uint8)
    batch = {"images": frames, "task": [TASK], "latent_indices": torch.zeros(1, 1, 4, dtype=torch.int64)}
    model = VLA(VLAConfig(), space, VLM(*vlm_of(name, text_layers, vision_layers), VLMConfig(vlm=name)))
    return [*count(model, batch), len(model.vlm.prompt(TASK, 1).ids) + space.num_tokens]


def vla(name: str, labelling: float, laq_parameters: float) -> Counted:
    """Stage 2 with a LAQ that labels along the way."""
    base, text, vision = (
        torch.tensor(alone(vla_of, name, *layers), dtype=torch.float64) for layers in ((2, 2), (3, 2), (2, 3))
    )
    more_text, more_vision = (VLMS[name][tower]["num_hidden_layers"] - 2 for tower in ("text", "vision"))
    flops, memory, tokens = (base + more_text * (text - base) + more_vision * (vision - base)).tolist()
    with torch.device("meta"):
        whole = vlm_of(name)[0]
    parameters = sum(p.numel() for p in whole.parameters())
    return Counted(name, parameters, flops + labelling, memory, 16, int(tokens), laq_parameters)


def alone(function, *arguments):
    """In a process of its own, whose memory is free afterwards."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def rows(model: Counted, per_gpu: int, in_shards: bool, samples: float, loader: float, args) -> list[str]:
    """A line for each number of GPUs."""
    lines = []
    for gpus in GPUS:
        others = (gpus - 1) / gpus
        weights = model.parameters * (2 * 2 + 4 if in_shards else 2 * 4)  # gathered twice in bf16, gradients in fp32
        passes = per_gpu * model.flops / (args.peak * 1e12 * args.efficiency)
        compute = passes + model.optimizer_flops / (args.peak * 1e12 * args.efficiency)
        traffic = others * weights
        communication = traffic / ((args.nvlink if gpus <= args.node else args.bus) * 1e9)
        step = compute + max(0.0, communication - args.overlap * 2 / 3 * passes)  # hidden behind the backward pass
        rate = gpus * per_gpu / step
        shared = gpus if in_shards else 1
        memory = model.parameters * (model.bytes_a_parameter / shared + 2) + 4 * model.frozen
        memory += per_gpu * model.activations
        cells = [
            f"{gpus}",
            f"{gpus * per_gpu:,}",
            f"{rate:,.0f}",
            f"{rate * model.tokens / 1e3:,.0f}",
            f"{step * 1e3:,.0f}",
            f"{traffic / 1e9:.1f}",
            f"{communication * 1e3:,.0f}",
            f"{memory / 1e9:.0f}",
            f"{samples / rate / 3600 * gpus:,.0f}",
            f"{samples / rate / 3600:,.2g}",
            f"{rate / gpus * loader / 1e3:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=798, help="bf16 matrix product of a GPU [TFLOP/s]")
    parser.add_argument("--efficiency", type=float, default=0.4, help="of it, over a step's own FLOPs")
    parser.add_argument("--node", type=int, default=8, help="GPUs")
    parser.add_argument("--nvlink", type=float, default=360, help="bus bandwidth of a collective in a node [GB/s]")
    parser.add_argument("--bus", type=float, default=300, help="between nodes, eight links of 400 Gb/s each [GB/s]")
    parser.add_argument("--overlap", type=float, default=0.8, help="share of the backward pass that hides it")
    parser.add_argument("--loader", type=float, default=0.7, help="of one core, for a pair of frames [ms]")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    laq, labelling = alone(laq_base)
    models = [(laq, 256, False, 100e6)]
    models += [(vla(name, labelling, laq.parameters), 32, name == "VLA 2B", 20e6) for name in VLMS]
    print("| model | trained | GFLOP a sample | tokens | kept for backward, MB a sample |\n|---|---|---|---|---|")
    for model, *_ in models:
        print(
            f"| {model.name} | {model.parameters / 1e6:,.0f} M | {model.flops / 1e9:,.0f} | {model.tokens} "
            f"| {model.activations / 1e6:,.0f} |"
        )
    print(f"\nLabelling a pair by LAQ base takes {labelling / 1e9:.0f} GFLOP, part of each VLA sample above.")
    print(f"A step of Muon takes {laq.optimizer_flops / 1e12:.1f} TFLOP for LAQ base, on every rank.")
    for model, per_gpu, in_shards, samples in models:
        layout = "FSDP2" if in_shards else "DDP"
        print(f"\n### {model.name}, {layout}, {per_gpu} samples a GPU and step, {samples / 1e6:.0f} M samples\n")
        print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
        print("\n".join(rows(model, per_gpu, in_shards, samples, args.loader, args)))


if __name__ == "__main__":
    main()
