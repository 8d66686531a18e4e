"""Folders of the VLM families, with random weights of a few thousand parameters and a tokenizer trained here."""

import json

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.smolvlm import processing_smolvlm

FAMILIES = ["smolvlm", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3", "internvl"]
IMAGE_SIZE = {"smolvlm": 46, "idefics3": 46, "paligemma": 28, "gemma3": 28, "internvl": 28}  # [pixel]
IMAGE_SIZE |= dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), 32)
TASKS = ["push the red cube", "open the drawer, then put the blue bowl on the plate"]

# As in the chat templates of SmolVLM2 and Qwen.
SMOLVLM_CHAT = processing_smolvlm.DEFAULT_CHAT_TEMPLATE
QWEN_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERNVL_CHAT = QWEN_CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
GEMMA_CHAT = (
    "<bos>{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SMOLVLM_SPECIAL = "<|endoftext|> <|im_start|> <end_of_utterance> <image> <fake_token_around_image> <global-img> <video>"
SMOLVLM_NAMES = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
QWEN_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>"
INTERNVL_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <img> </img> <IMG_CONTEXT> <video>"
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GEMMA_IDS = {"image": "<image_soft_token>", "boi": "<start_of_image>", "eoi": "<end_of_image>"}
GEMMA_LAYERS = ["sliding_attention", "full_attention"]
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def bytes_tokenizer(special, chat, **names):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special.split(), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TASKS, trainer)
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>" if "<|im_end|>" in special else "<end_of_utterance>",
        chat_template=chat,
        model_specific_special_tokens=names,
    )


def gemma_tokenizer(others=(), **names):
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *others, *names.values()]
    special_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    trainer = trainers.BpeTrainer(special_tokens=[*special, *special_bytes], show_progress=False)
    tokenizer.train_from_iterator([*TASKS, "\n"], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    extra = {"model_specific_special_tokens": names, "additional_special_tokens": [*others]} if names else {}
    return T.GemmaTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]], **extra)


def processor(family):
    if family == "idefics3":
        size = {"longest_edge": 46}
        images = T.Idefics3ImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
        tokenizer = bytes_tokenizer(SMOLVLM_SPECIAL, SMOLVLM_CHAT, **SMOLVLM_NAMES)
        return T.Idefics3Processor(images, tokenizer, image_seq_len=9, chat_template=SMOLVLM_CHAT)
    if family == "gemma3":
        images = T.Gemma3ImageProcessor(size={"height": 28, "width": 28}, image_seq_length=4)
        names = {f"{name}_token": token for name, token in GEMMA_IDS.items()}
        tokenizer = gemma_tokenizer(["<start_of_turn>", "<end_of_turn>"], **names)
        tokenizer.chat_template = GEMMA_CHAT
        return T.Gemma3Processor(images, tokenizer, GEMMA_CHAT, image_seq_length=4)
    if family == "internvl":
        images = T.GotOcr2ImageProcessor(size={"height": 28, "width": 28})
        names = {"start_image_token": "<img>", "end_image_token": "</img>"}
        names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
        tokenizer = bytes_tokenizer(INTERNVL_SPECIAL, INTERNVL_CHAT, **names)
        videos = T.InternVLVideoProcessor()
        return T.InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=INTERNVL_CHAT)
    if family == "smolvlm":
        size = {"longest_edge": 46}
        images = T.SmolVLMImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
        tokenizer = bytes_tokenizer(SMOLVLM_SPECIAL, SMOLVLM_CHAT, **SMOLVLM_NAMES)
        processing_smolvlm.num2words = str  # it wants the package, which only videos need
        videos = T.SmolVLMVideoProcessor()
        return T.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=9, chat_template=SMOLVLM_CHAT)
    if family == "paligemma":
        images = T.SiglipImageProcessor(size={"height": 28, "width": 28}, resample=3)
        images.image_seq_length = 16
        return T.PaliGemmaProcessor(images, gemma_tokenizer())
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = T.Qwen2VLImageProcessor(size=size, **patches)
    tokenizer = bytes_tokenizer(QWEN_SPECIAL, QWEN_CHAT)
    if family == "qwen2_vl":
        return T.Qwen2VLProcessor(images, tokenizer, T.Qwen2VLVideoProcessor(), QWEN_CHAT)
    if family == "qwen2_5_vl":
        return T.Qwen2_5_VLProcessor(images, tokenizer, T.Qwen2VLVideoProcessor(), QWEN_CHAT)
    return T.Qwen3VLProcessor(images, tokenizer, T.Qwen3VLVideoProcessor(), QWEN_CHAT)


def model(family, tokenizer, is_tied):
    text = TEXT | {"vocab_size": len(tokenizer) + 3}  # models pad their vocabulary
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family in ("smolvlm", "idefics3"):
        kind, config = {
            "smolvlm": (T.SmolVLMForConditionalGeneration, T.SmolVLMConfig),
            "idefics3": (T.Idefics3ForConditionalGeneration, T.Idefics3Config),
        }[family]
        return kind(
            config(
                text_config={"model_type": "llama", **text},
                vision_config=vision | {"image_size": 46, "patch_size": 7},
                scale_factor=2,
                image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                tie_word_embeddings=is_tied,
            )
        )
    if family == "paligemma":
        return T.PaliGemmaForConditionalGeneration(
            T.PaliGemmaConfig(
                text_config={"model_type": "gemma2", "query_pre_attn_scalar": 8, **text},
                vision_config=vision
                | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "vision_use_head": False},
                image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                projection_dim=16,
                hidden_size=16,
                tie_word_embeddings=is_tied,
            )
        )
    if family == "gemma3":
        ids = {f"{name}_token_index": tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA_IDS.items()}
        siglip = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "vision_use_head": False}
        return T.Gemma3ForConditionalGeneration(
            T.Gemma3Config(
                text_config={"query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": GEMMA_LAYERS, **text},
                vision_config=vision | siglip,
                mm_tokens_per_image=4,
                tie_word_embeddings=is_tied,
                **ids,
            )
        )
    if family == "internvl":
        return T.InternVLForConditionalGeneration(
            T.InternVLConfig(
                text_config={"model_type": "qwen2", **text},
                vision_config=vision | {"image_size": [28, 28], "patch_size": [7, 7]},
                image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
                image_seq_length=4,
                tie_word_embeddings=is_tied,
            )
        )
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    ids |= {f"vision_{x}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{x}|>") for x in ("start", "end")}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    text["rope_parameters"] = ROTARY
    options = {**ids, "tie_word_embeddings": is_tied}
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
        vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
        return T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(text_config=text, vision_config=vision, **options))
    if family == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return T.Qwen2_5_VLForConditionalGeneration(
            T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **options)
        )
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(text_config=text, vision_config=vision, **options))


def save_vlm(folder, family, is_tied=True, dtype=torch.float32):
    """Writes a folder of `family`, whose hub's own are in bfloat16; returns transformers' model and processor."""
    torch.manual_seed(0)
    own_processor = processor(family)
    own_model = model(family, own_processor.tokenizer, is_tied).eval()
    with torch.no_grad():
        for parameter in own_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)  # far from the linear regime, so that every position matters
    own_model.to(dtype).save_pretrained(folder)
    own_processor.save_pretrained(folder)
    return own_model, own_processor
