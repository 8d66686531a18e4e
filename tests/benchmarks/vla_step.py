"""CPU time of a training step and of decoding of the VLA, beside what transformers itself would take.

    python tests/benchmarks/vla_step.py    # one thread: about a minute of CPU time

All is timed in one run, in turns, by `time.process_time`, in float32. The model has random weights and the shape of
SmolVLM2-256M's language model, but 10 of its 30 layers: width 576, 49,280 words, input and output rows untied. A
small vision tower gives 64 tokens an image; an instruction is about 30 more. The exit status is 1 where transformers
takes less than --min-ratio times as long as hlrp for a step, or parallel decoding more than --max-prefills prefills.

Training   Forward and backward. hlrp: head=tokens with token_rows=vocabulary, whose logits are of the positions that
           predict codes. transformers: the same weights, embeddings resized by a row for each code at each position,
           no cache, and `labels=` that mask the prompt: logits and softmax of all positions, which is what makes the
           ratio. Losses and all gradients are asserted to be equal before. Tied rows would differ in one thing:
           codes have rows of their own for input and for output, transformers' gradient is the sum of the two.
           `VLM.preprocess` makes the pixels, in hlrp's step and beforehand for transformers.
Decoding   One image: parallel, all codes at once, and tokens, code after code, beside the prefill, the floor of both.
"""

import argparse
import copy
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from hlrp.distributed import keep_freed_memory
from hlrp.vla import VLA, LatentSpace, VLAConfig
from hlrp.vlm import VLM, VLMConfig, tiny_tokenizer

SPACE = LatentSpace(0.5, num_tokens=4, codebook_size=8, vector_dim=128, image_size=64, fingerprint="")
IMAGE_SIZE, VOCAB_SIZE = 256, 49280
TASKS = ["push the red block to the left", "open the drawer", "put the bowl on the plate", "pick it up"]


def build():
    """Model, tokenizer, which reads an instruction byte by byte, and image processor."""
    tokenizer = tiny_tokenizer([])
    tokenizer.add_tokens(["<image>", "<fake_token_around_image>", "<global-img>"], special_tokens=True)
    part = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    tokenizer.chat_template = f"{{% for part in messages[0]['content'] %}}{part}{{% endfor %}}<eos>"
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = {"model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 576, "intermediate_size": 1536}
    text |= {"num_hidden_layers": 10, "num_attention_heads": 9, "num_key_value_heads": 3}
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = transformers.SmolVLMConfig(
        text_config=text | ids,
        vision_config=vision | {"image_size": IMAGE_SIZE, "patch_size": 16},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    size = {"longest_edge": IMAGE_SIZE}
    processor = transformers.SmolVLMImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
    return transformers.SmolVLMForConditionalGeneration(config), tokenizer, processor


def own_inputs(vlm: VLM, batch: dict) -> dict:
    """What transformers' model takes: prompt, padded on the left, and codes as ids; labels on the codes alone."""
    codes = batch["latent_indices"].flatten(1)
    codes = VOCAB_SIZE + torch.arange(codes.shape[1]) * SPACE.codebook_size + codes  # b n
    prompts = [vlm.prompt(task, 1).ids for task in batch["task"]]
    longest = max(map(len, prompts))
    prompts = torch.stack([F.pad(ids, (longest - len(ids), 0), value=-1) for ids in prompts])
    ids = torch.cat([prompts, codes], dim=1)
    inputs = {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}
    inputs |= {"labels": ids.masked_fill(ids < VOCAB_SIZE, -100), "use_cache": False}
    return inputs | vlm.preprocess(batch["images"])


def check_equal(vla: VLA, model, loss: Tensor, expected: Tensor) -> None:
    """Losses are equal to 1e-5, gradients to 1e-4 of the largest entry of each parameter's."""
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found = {name.removeprefix("vlm."): parameter.grad for name, parameter in vla.named_parameters()}
    for name, codes in (("model.text_model.embed_tokens.weight", "embeddings"), ("lm_head.weight", "rows")):
        found[name] = torch.cat([found[name], found.pop(f"head.{codes}").flatten(0, 1)])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        atol = 1e-4 * gradient.abs().max().item() + 1e-9  # some are zero but for rounding: biases of keys
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol)


def medians(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each call, taken in turns after one untimed round; prints them."""
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    found = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, values in times.items():
        print(f"  {name:16}{found[name]:8.3f} s  ({min(values[1:]):.3f} to {max(values[1:]):.3f})")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--min-ratio", type=float, default=1.2)
    parser.add_argument("--max-prefills", type=float, default=1.15)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)

    cpuinfo = Path("/proc/cpuinfo").read_text()
    machine = re.search(r"model name\s*: (.*)", cpuinfo)
    flags = [f"{flag} {'yes' if flag in cpuinfo.split() else 'no'}" for flag in ("avx512_bf16", "amx_bf16")]
    print(f"{machine[1] if machine else 'unnamed CPU'}, {', '.join(flags)}; {args.threads} thread(s)")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")

    torch.manual_seed(0)
    model, tokenizer, processor = build()
    vlm = VLM(model, tokenizer, processor, VLMConfig(vlm="random"))
    vla = VLA(VLAConfig(head="tokens", token_rows="vocabulary"), SPACE, vlm)
    images = torch.randint(256, (args.batch_size, 1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    batch = {"images": images, "task": (TASKS * args.batch_size)[: args.batch_size]}
    batch["latent_indices"] = torch.randint(SPACE.codebook_size, (args.batch_size, 1, SPACE.num_tokens))
    reference, inputs = copy.deepcopy(model), own_inputs(vlm, batch)
    reference.resize_token_embeddings(VOCAB_SIZE + vla.head.rows[..., 0].numel(), mean_resizing=False)
    with torch.no_grad():
        reference.get_input_embeddings().weight[VOCAB_SIZE:] = vla.head.embeddings.flatten(0, 1)
        reference.lm_head.weight[VOCAB_SIZE:] = vla.head.rows.flatten(0, 1)

    def step(model, **kwargs) -> Tensor:
        model.zero_grad()
        loss = model(**kwargs)[0]
        loss.backward()
        return loss.detach()

    calls = {"transformers": lambda: step(reference, **inputs), "hlrp": lambda: step(vla, batch=batch)}
    check_equal(vla, reference, calls["hlrp"](), calls["transformers"]())
    size = f"{sum(p.numel() for p in vla.parameters()) / 1e6:.0f} M parameters, {args.batch_size} samples"
    print(f"{size} of {inputs['input_ids'].shape[1]} tokens: losses and gradients are equal\ntraining step:")
    times = medians(calls, args.repeats)
    ratio = times["transformers"] / times["hlrp"]

    vla.eval().zero_grad()
    parallel = VLA(VLAConfig(head="parallel"), SPACE, vlm).eval()
    one = images[:1], batch["task"][:1]
    calls = {"prefill": torch.no_grad()(lambda: vlm(*one)), "parallel": lambda: parallel.generate(*one)}
    print(f"{SPACE.num_tokens} codes for one image:")
    times = medians(calls | {"tokens": lambda: vla.generate(*one)}, 4 * args.repeats)
    prefills = times["parallel"] / times["prefill"]

    print(f"a step takes transformers {ratio:.2f} times as long; {args.min_ratio:g} are asked for")
    print(f"parallel takes {prefills:.2f} prefills; up to {args.max_prefills:g} are allowed")
    return 0 if ratio >= args.min_ratio and prefills <= args.max_prefills else 1


if __name__ == "__main__":
    sys.exit(main())
