"""Vision-language models as backbones of a policy, by transformers: SmolVLM2, Idefics3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
PaliGemma 2, Gemma 3 and InternVL (its -hf folders).

All have one interface: images and instructions in, last hidden states out. The caller may add embeddings behind the
prompt (`suffix`). Prompts are padded on the left, so that a suffix starts at the same index in every row. Only this
module knows how the families differ: in prompts, patches, positions and masks.

`tiny` is a model from scratch, small enough for a CPU; its tokenizer learns from the run's instructions.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from hlrp.backbones import Pretrained, interpolation_of, load, read, to_pixels, use_attention


@dataclass
class VLMConfig:
    vlm: str = "tiny"  # hub id or folder of SmolVLM2, SmolVLA, Qwen-VL, PaliGemma 2, Gemma 3 ...; tiny: from scratch
    image_size: int | None = None  # side of the image that the VLM sees [pixel]; None: its own (tiny: the LAQ's)

    freeze: tuple[Literal["vision", "language"], ...] = ()  # parts of the VLM that are not trained
    freeze_layers: int = 0  # first layers of the language model that are not trained
    lora_rank: int = 0  # rank of adapters (peft) that are trained in place of the language model; 0: none
    gradient_checkpointing: bool = False  # save memory, for about a third more compute


class VLMFamily(NamedTuple):
    model: str  # class of transformers
    text: str = "language_model"  # where its base model keeps the language model
    vision: str = "visual"  # and the image encoder
    frame: str = "{}"  # what stands around the tokens of an image, where the chat template has none of it
    unused: tuple[str, ...] = ()


IDEFICS = "text_model", "vision_model", "<fake_token_around_image><global-img>{}<fake_token_around_image>"
VLMS = {
    "smolvlm": VLMFamily("SmolVLMForConditionalGeneration", *IDEFICS),
    "idefics3": VLMFamily("Idefics3ForConditionalGeneration", *IDEFICS),
    "qwen2_vl": VLMFamily("Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": VLMFamily("Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": VLMFamily("Qwen3VLForConditionalGeneration"),
    "paligemma": VLMFamily("PaliGemmaForConditionalGeneration", vision="vision_tower"),
    "gemma3": VLMFamily(
        "Gemma3ForConditionalGeneration", vision="vision_tower", frame="\n\n<start_of_image>{}<end_of_image>\n\n"
    ),
    "internvl": VLMFamily("InternVLForConditionalGeneration", vision="vision_tower", frame="<img>{}</img>"),
}


class Prompt(NamedTuple):
    ids: Tensor  # n, on the CPU
    positions: Tensor  # axes n: Qwen's rotary positions have three axes, the others' one
    last_image: Tensor  # places of the tokens of the last image, counted from the end: -1 is the last token


class Prefix(NamedTuple):
    embeds: Tensor  # b n d, placeholders where the images go
    mask: Tensor  # bool (b, n), False at the padding on the left
    positions: Tensor  # axes b n
    images: dict[str, Tensor]  # what the family's base model takes: pixel_values, image_grid_thw, token_type_ids


class Cache(NamedTuple):
    keys_values: Any  # transformers' DynamicCache
    position: Tensor  # b, the next


class Encoded(NamedTuple):
    hidden: Tensor  # b n d, behind the final norm
    mask: Tensor  # bool (b, n)
    cache: Cache | None

    def without(self, length: int) -> "Encoded":
        """The positions before the last `length`."""
        end = self.hidden.shape[1] - length
        return Encoded(self.hidden[:, :end], self.mask[:, :end], None)

    def last(self, length: int) -> "Encoded":
        """The last `length` positions."""
        return Encoded(self.hidden[:, -length:], self.mask[:, -length:], None)

    def followed_by(self, other: "Encoded") -> "Encoded":
        """The positions of both."""
        hidden, mask = (torch.cat(parts, dim=1) for parts in zip(self[:2], other[:2], strict=True))
        return Encoded(hidden, mask, None)


class VLM(nn.Module):
    """A vision-language model without its text generation.

    dim: width of the language model;  vocab_size: rows of `vocab_head`
    image_size: side of the image [pixel];  num_image_tokens: tokens of an image
    embed_scale: factor on word embeddings, which the caller applies to a suffix too (Gemma: sqrt(dim))

    Images stay uint8 until they are on the model's device. The model sees them whole, resized once; SmolVLM2's own
    processor resizes twice, since it also makes crops. The layers that project images to the language model belong to
    neither tower. Frozen parts have no dropout. `forward` does not call `lm_head`.
    """

    config: Pretrained
    model: Pretrained
    lm_head: nn.Module | None

    def __init__(self, model: Pretrained, tokenizer: Any, processor: Pretrained, config: VLMConfig):
        """model: transformers' model with a language head;  processor: its image processor."""
        super().__init__()
        self.config, self.family = model.config, model.config.model_type
        self.is_qwen, self.is_paligemma = self.family.startswith("qwen"), self.family == "paligemma"
        self.is_idefics = self.family in ("smolvlm", "idefics3")
        self.tokenizer, self.processor = tokenizer, processor
        family = VLMS[self.family]

        use_attention(model)
        self.model = model.model  # without the head
        embedding = self.model.get_input_embeddings()
        self.dim, self.vocab_size = embedding.embedding_dim, embedding.num_embeddings
        self.embed_scale = getattr(embedding, "scalar_embed_scale", 1.0)
        is_tied = model.lm_head.weight is embedding.weight
        self.lm_head = None if is_tied else model.lm_head
        self.text: list[Any] = [self.model.get_submodule(family.text)]  # in lists: each module has one name
        self.vision = [self.model.get_submodule(family.vision)]
        self.layers = [*self.text[0].layers]
        lists = [module for module in self.vision[0].modules() if isinstance(module, nn.ModuleList)]
        self.blocks = [*max(lists, key=len)]

        self.image_size, self.num_image_tokens = self.check_image_size(config)
        self.interpolation = interpolation_of(config.vlm, processor)
        self.check_tokenizer(config.vlm)
        self.prompts: dict[tuple[str, int], Prompt] = {}
        self.choose_trainable(config)
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.is_checkpointing = config.gradient_checkpointing
        self.train()

    @classmethod
    def from_config(cls, config: VLMConfig, instructions: Sequence[str]) -> "VLM":
        """The pretrained model that `config.vlm` names, or `tiny`, whose tokenizer learns from `instructions`."""
        if config.vlm == "tiny":
            return cls(*tiny(64 if config.image_size is None else config.image_size, instructions), config)
        model, architecture, _ = load(config.vlm, VLMS)
        return cls(model, *read_parts(architecture.name_or_path), config)

    @classmethod
    def from_folder(cls, folder: Path | str, config: VLMConfig) -> "VLM":
        """The model that `save_parts` described. Its weights are not set: load the checkpoint's."""
        import transformers
        from transformers.initialization import no_init_weights

        architecture = read(transformers.AutoConfig, str(folder))
        if architecture.model_type not in VLMS:
            raise ValueError(f"{folder} is a {architecture.model_type!r} model; expected one of {', '.join(VLMS)}")
        with no_init_weights():
            model = getattr(transformers, VLMS[architecture.model_type].model)(architecture)
        model.tie_weights()
        return cls(model.float(), *read_parts(str(folder)), config)

    def save_parts(self, folder: Path | str) -> None:
        """Writes architecture, tokenizer and image processor, but no weights."""
        for part in (self.config, self.tokenizer, self.processor):
            part.save_pretrained(folder)

    def check_image_size(self, config: VLMConfig) -> tuple[int, int]:
        """Side of the image [pixel] and its number of tokens. Raises ValueError for a size that it cannot take."""
        vision, processor = self.config.vision_config, self.processor
        if self.is_qwen:  # any size within the processor's limits; its own is what that makes of 224
            merge, step = vision.spatial_merge_size, vision.patch_size * vision.spatial_merge_size
            least, most = (int(processor.size[edge] ** 0.5) for edge in ("shortest_edge", "longest_edge"))
            own = min(-(-max(224, least) // step), most // step) * step
        elif self.is_idefics:
            merge, step = self.config.scale_factor, vision.patch_size * self.config.scale_factor
            own = most = processor.max_image_size["longest_edge"]
        else:
            own, most = first(vision.image_size), 0
            merge = step = 1
            if self.family == "gemma3":
                merge = own // vision.patch_size // math.isqrt(self.config.mm_tokens_per_image)
            elif self.family == "internvl":
                merge = round(1 / self.config.downsample_ratio)
        size, others = own if config.image_size is None else config.image_size, range(step, most + 1, step)
        if size != own and size not in others:
            expected = f"{own} or a multiple of {step} up to {others[-1]}" if others else f"{own}"
            raise ValueError(f"image_size={size}; expected {expected} for {config.vlm}")
        return size, (size // first(vision.patch_size) // merge) ** 2

    def check_tokenizer(self, name: str) -> None:
        """Raises ValueError where the tokenizer does not know the image token: transformers makes one up where the
        tokenizer's files are missing."""
        image_token = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        ids = self.tokenizer(str(image_token), add_special_tokens=False).input_ids
        if ids != [self.config.image_token_id] or len(self.tokenizer) > self.vocab_size:
            sizes = f"a tokenizer of {len(self.tokenizer)} tokens for a model of {self.vocab_size}"
            expected = f"one whose token {self.config.image_token_id} stands for images"
            raise ValueError(f"{name} has {sizes}; expected {expected}, in files beside the model's")

    def choose_trainable(self, config: VLMConfig) -> None:
        """Sets `requires_grad` and adds adapters; earlier adapters are merged into the weights that they adapt."""
        self.merge_adapters()
        self.requires_grad_(True)
        if unknown := set(config.freeze) - {"vision", "language"}:
            raise ValueError(f"freeze={sorted(unknown)}; expected some of vision, language")
        if not 0 <= config.freeze_layers <= len(self.layers):
            expected = f"0 to {len(self.layers)}, the layers of {config.vlm}"
            raise ValueError(f"freeze_layers={config.freeze_layers}; expected {expected}")
        if config.lora_rank < 0:
            raise ValueError(f"lora_rank={config.lora_rank}; expected a rank, or 0 for no adapters")
        frozen = self.layers[: config.freeze_layers]
        if "vision" in config.freeze:
            frozen += [child for name, child in self.vision[0].named_children() if "merger" not in name]
        if "language" in config.freeze:
            frozen += [*self.text] if self.lm_head is None else [*self.text, self.lm_head]
        for module in [self] if config.lora_rank else frozen:
            module.requires_grad_(False)
        if config.lora_rank:
            if "language" in config.freeze or config.freeze_layers == len(self.layers):
                frozen = f"freeze={config.freeze} and freeze_layers={config.freeze_layers}"
                raise ValueError(f"lora_rank={config.lora_rank}, but {frozen} leave no layer to adapt")
            from peft import LoraConfig, inject_adapter_in_model

            names = [
                f"layers.{i}.{name}"
                for i, layer in enumerate(self.layers[config.freeze_layers :], start=config.freeze_layers)
                for name, module in layer.named_modules()
                if isinstance(module, nn.Linear)
            ]
            lora = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=names)
            inject_adapter_in_model(lora, self.text[0])

    def merge_adapters(self) -> None:
        text = self.text[0]
        adapted: dict[str, Any] = {name: module for name, module in text.named_modules() if hasattr(module, "lora_A")}
        for name, module in adapted.items():
            module.merge()
            text.set_submodule(name, module.get_base_layer())

    def train(self, mode: bool = True):
        super().train(mode)
        blocks = self.block_classes()
        for module in self.modules():
            parameters = [*module.parameters()]
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                for child in module.modules():
                    child.training = mode and type(child) in blocks  # a layer's own: checkpointing
        return self

    def block_classes(self) -> set[type[nn.Module]]:
        """The repeated layers of both towers: units to shard, checkpoint or compile."""
        return {type(self.layers[0]), type(self.blocks[0])}

    @property
    def vocab_head(self) -> Tensor:
        """(vocab_size, dim); the weight of the token embeddings where the model ties the two."""
        head: Any = self.lm_head or self.model.get_input_embeddings()
        return head.weight

    def vocab_logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., dim) -> (..., vocab_size), as the pretrained head gives them."""
        return self.cap_logits(hidden @ self.vocab_head.T)

    def cap_logits(self, logits: Tensor) -> Tensor:
        """Bounds the logits of words where the family does: Gemma 2 (arXiv:2408.00118, Sec. 2)."""
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def prompt(self, task: str, num_views: int) -> Prompt:
        """The prompt of an instruction behind `num_views` images, cached."""
        key = (task, num_views)
        if key not in self.prompts:
            if len(self.prompts) == 4096:
                self.prompts.pop(next(iter(self.prompts)))
            self.prompts[key] = self.make_prompt(task, num_views)
        return self.prompts[key]

    def make_prompt(self, task: str, num_views: int) -> Prompt:
        tokenizer, image_id = self.tokenizer, self.config.image_token_id
        image = tokenizer.convert_ids_to_tokens(image_id)
        if self.is_paligemma:
            text = f"{image * num_views}{tokenizer.bos_token}{task}\n"
        else:
            content = [{"type": "image"}] * num_views + [{"type": "text", "text": task}]
            message = {"role": "user", "content": content}
            text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        tokens = VLMS[self.family].frame.format(image * self.num_image_tokens)
        text = text.replace("<start_of_image>" if self.family == "gemma3" else image, tokens)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        places = [place - len(ids) for place, number in enumerate(ids) if number == image_id]
        if len(places) != num_views * self.num_image_tokens:
            raise ValueError(f"the instruction {task!r} holds {image!r}, which stands for an image")
        ids, last_image = torch.tensor(ids), torch.tensor(places[-self.num_image_tokens :])
        if self.is_qwen:
            kinds = ids.eq(image_id)[None].int()
            positions, _ = self.model.get_rope_index(
                ids[None], mm_token_type_ids=kinds, image_grid_thw=self.grids(num_views)
            )
            return Prompt(ids, positions[:, 0], last_image)
        first = 1 if self.is_paligemma else 0
        return Prompt(ids, torch.arange(first, first + len(ids))[None], last_image)

    def grids(self, num_images: int) -> Tensor:
        side = self.image_size // self.config.vision_config.patch_size
        return torch.tensor([[1, side, side]]).expand(num_images, -1)  # time, rows, columns

    def preprocess(self, images: Tensor) -> dict[str, Tensor]:
        """images uint8 (b, v, c, h, w) -> what the family's base model takes, float32."""
        processor, vision = self.processor, self.config.vision_config
        b, v = images.shape[:2]
        mean, std = list(processor.image_mean), list(processor.image_std)
        pixels = to_pixels(
            images.flatten(0, 1), self.image_size, self.interpolation, processor.rescale_factor, mean, std
        )
        if self.is_idefics:
            return {"pixel_values": pixels.unflatten(0, (b, v))}
        if not self.is_qwen:
            return {"pixel_values": pixels}
        merge, patch = vision.spatial_merge_size, vision.patch_size
        sizes = {"m": merge, "s": merge, "p": patch, "q": patch, "t": vision.temporal_patch_size}
        pattern = "b c (h m p) (w s q) -> (b h w m s) (c t p q)"  # patches that will merge stand together
        patches, grids = repeat(pixels, pattern, **sizes), self.grids(b * v).to(pixels.device)
        return {"pixel_values": patches, "image_grid_thw": grids}

    def prefix(self, images: Tensor, tasks: Sequence[str]) -> Prefix:
        """images: uint8 (b, v, c, h, w), v views at the same time, in the order of the prompt."""
        if len(tasks) != len(images):
            raise ValueError(f"{len(tasks)} instructions; expected {len(images)}, one for each row of images")
        embedding = self.model.get_input_embeddings()
        prompts = [self.prompt(task, images.shape[1]) for task in tasks]
        n = max(len(prompt.ids) for prompt in prompts)
        left = [n - len(prompt.ids) for prompt in prompts]
        pad_id = self.tokenizer.pad_token_id or 0
        ids = [F.pad(prompt.ids, (pad, 0), value=pad_id) for prompt, pad in zip(prompts, left, strict=True)]
        positions = [F.pad(prompt.positions, (pad, 0)) for prompt, pad in zip(prompts, left, strict=True)]
        mask = torch.arange(n) >= torch.tensor(left)[:, None]  # b n
        ids, positions = torch.stack(ids), torch.stack(positions, dim=1)  # b n, axes b n
        device = embedding.weight.device
        ids, positions, mask = (x.to(device, non_blocking=True) for x in (ids, positions, mask))
        pixels = self.preprocess(images.to(mask.device))
        if self.family == "gemma3":  # 1: attends in both directions to its own image, 0: causally
            pixels["token_type_ids"] = (ids == self.config.image_token_id).long()
        return Prefix(embedding(ids), mask, positions, pixels)

    def forward(
        self, images: Tensor, tasks: Sequence[str], suffix: Tensor | None = None, use_cache: bool = False
    ) -> Encoded:
        """images uint8 (b, v, c, h, w), b instructions, suffix (b, m, d) -> hidden (b, n + m, d).

        A suffix position sees the prompt and the suffix up to itself: hidden[:, -m - 1 : -1] predicts the suffix.
        """
        embeds, mask, positions, pixels = self.prefix(images, tasks)  # b n d, b n, axes b n
        options = {}
        num_suffix = 0 if suffix is None else suffix.shape[1]
        if self.is_paligemma:  # 0: attends in both directions, 1: causally
            types = torch.arange(embeds.shape[1] + num_suffix, device=mask.device) >= embeds.shape[1]
            options["token_type_ids"] = types.long().expand(len(mask), -1)
        position = positions.amax(dim=(0, 2)) + 1  # b
        if suffix is not None:
            embeds = torch.cat([embeds, suffix.to(embeds.dtype)], dim=1)  # b (n m) d
            positions = torch.cat([positions, self.follow(position, num_suffix, len(positions))], dim=-1)
            mask = F.pad(mask, (0, num_suffix), value=True)
            if self.family == "gemma3":
                pixels["token_type_ids"] = F.pad(pixels["token_type_ids"], (0, num_suffix))
        hidden, keys_values = self.run(embeds, mask, positions, use_cache=use_cache, **pixels, **options)  # b (n m) d
        return Encoded(hidden, mask, Cache(keys_values, position + num_suffix) if use_cache else None)

    def extend(self, encoded: Encoded, suffix: Tensor) -> Encoded:
        """`encoded` and m more positions (b, m, d) -> hidden (b, n + m, d). `encoded` can be extended again."""
        assert encoded.cache is not None, "extend needs what forward(use_cache=True) or extend returned"
        keys_values, position = copy.copy(encoded.cache.keys_values), encoded.cache.position
        keys_values.layers = [copy.copy(layer) for layer in keys_values.layers]  # tensors stay shared
        axes, m = 3 if self.is_qwen else 1, suffix.shape[1]
        mask = F.pad(encoded.mask, (0, m), value=True)
        suffix = suffix.to(encoded.hidden.dtype)
        hidden, keys_values = self.run(suffix, mask, self.follow(position, m, axes), cache=keys_values, use_cache=True)
        return Encoded(torch.cat([encoded.hidden, hidden], dim=1), mask, Cache(keys_values, position + m))

    def at_image(self, prompt: Encoded, tasks: Sequence[str], num_views: int) -> Tensor:
        """The hidden states (b, num_image_tokens, d) of a prompt at the tokens of its last image, in raster order."""
        device = prompt.hidden.device
        places = torch.stack([self.prompt(task, num_views).last_image for task in tasks])  # the left is padded
        rows = torch.arange(len(tasks), device=device)[:, None]
        return prompt.hidden[rows, places.to(device, non_blocking=True)]

    def follow(self, position: Tensor, length: int, axes: int) -> Tensor:
        """The next positions, the same on all axes: (axes, b, length)."""
        return (position[:, None] + torch.arange(length, device=position.device)).expand(axes, -1, -1)

    def run(self, embeds: Tensor, mask: Tensor, positions: Tensor, use_cache: bool, **options):
        assert not (use_cache and self.training and self.is_checkpointing), "checkpointing fills no cache"
        if not self.is_qwen:
            positions = positions[0]
        options |= {"attention_mask": mask.long(), "position_ids": positions, "use_cache": use_cache}
        output = self.model(inputs_embeds=embeds, **options)
        return output.last_hidden_state, output.cache


def first(size: int | Sequence[int]) -> int:
    """Height of a size, which some configs give with the width."""
    return size if isinstance(size, int) else size[0]


def read_parts(name: str):
    """Tokenizer and image processor of a hub id or folder, the tokenizer with the processor's chat template."""
    import json

    import transformers
    from transformers.utils import cached_file

    tokenizer, processor = (read(getattr(transformers, auto), name) for auto in ("AutoTokenizer", "AutoImageProcessor"))
    faults = ("missing_entries", "connection_errors")
    options: dict[str, Any] = {f"_raise_exceptions_for_{fault}": False for fault in faults}
    legacy = cached_file(name, "chat_template.json", **options)  # where processors kept it before *.jinja
    if legacy is not None:
        tokenizer.chat_template = json.loads(Path(legacy).read_text())["chat_template"]
    return tokenizer, processor


IMAGE_TOKENS = ("image_pad", "video_pad", "vision_start", "vision_end")


def tiny(image_size: int, instructions: Sequence[str]):
    """A Qwen3-VL of about 3 million parameters from scratch, with tokenizer and image processor."""
    import transformers

    patch_size, merge_size = 8, 2 if image_size >= 64 else 1
    if image_size < 16 or image_size % (patch_size * merge_size):
        multiple = f"a multiple of {patch_size * merge_size}"
        raise ValueError(f"image_size={image_size}; expected {multiple} from 16 up for tiny")
    tokenizer = tiny_tokenizer(instructions)
    text: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 512, "head_dim": 32}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = {"depth": 4, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 192}
    vision |= {"num_position_embeddings": (image_size // patch_size) ** 2, "deepstack_visual_indexes": [1]}
    patches: dict[str, Any] = {"patch_size": patch_size, "temporal_patch_size": 2}
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in IMAGE_TOKENS}
    config = transformers.Qwen3VLConfig(
        text_config=text | {"tie_word_embeddings": True},
        vision_config=vision | patches | {"spatial_merge_size": merge_size},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    processor = transformers.Qwen2VLImageProcessor(size=size, merge_size=merge_size, **patches)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    positions = model.model.visual.pos_embed.weight
    positions.data = 0.5 * sinusoids_2d(image_size // patch_size, positions.shape[1])  # the size of patch embeddings
    return model, tokenizer, processor


def sinusoids_2d(side: int, dim: int) -> Tensor:
    """Features (side * side, dim) of the places on a grid in raster order; across it, waves of 1/8 to 2 periods."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)) / side  # n 2
    angles = places[..., None] * torch.pi / 2 * 2 ** torch.linspace(-1, 3, dim // 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def tiny_tokenizer(instructions: Sequence[str]):
    """Byte-level BPE of at most 1024 tokens. It depends on the set of instructions alone, and encodes any text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<pad>", "<bos>", "<eos>", *(f"<|{name}|>" for name in IMAGE_TOKENS)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sorted(set(instructions)), trainer)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    content = f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    template = f"{{% for part in messages[0]['content'] %}}{content}{{% endfor %}}<eos>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special[3:],
        chat_template=template,
    )
