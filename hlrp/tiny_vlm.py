"""A vision-language model from scratch, small enough for a CPU; its tokenizer learns from the run's instructions."""

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGE_TOKENS = ("image_pad", "video_pad", "vision_start", "vision_end")


def tiny(image_size: int, instructions: Sequence[str]):
    """A Qwen3-VL of about 3 M parameters from scratch, with tokenizer and image processor."""
    import transformers

    patch_size, merge_size = 8, 2 if image_size >= 64 else 1
    if image_size < 16 or image_size % (patch_size * merge_size):
        multiple = f"a multiple of {patch_size * merge_size}"
        raise ValueError(f"image_size={image_size} does not fit tiny: expected {multiple} from 16 up")
    tokenizer = tiny_tokenizer(instructions)
    text = {"vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 512, "head_dim": 32}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = {"depth": 4, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 192}
    vision |= {"num_position_embeddings": (image_size // patch_size) ** 2, "deepstack_visual_indexes": [1]}
    patches = {"patch_size": patch_size, "temporal_patch_size": 2}
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in IMAGE_TOKENS}
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
    positions.data = 0.5 * sinusoids_2d(image_size // patch_size, positions.shape[1])  # as large as patches are
    return model, tokenizer, processor


def sinusoids_2d(side: int, dim: int) -> Tensor:
    """Features (side * side, dim) of the places on a grid in raster order, an eighth of a wave to two across it."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)) / side  # n 2
    angles = places[..., None] * torch.pi / 2 * 2 ** torch.linspace(-1, 3, dim // 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def tiny_tokenizer(instructions: Sequence[str]):
    """Byte-level BPE of at most 1024 tokens, the same for the same set of instructions; it knows every text."""
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
