"""Frozen pretrained features of frames (FrozenEncoder) and instructions (TextEncoder), by transformers.

Each takes a hub id or a local folder, reads safetensors weights only, and raises ValueError where a tensor is
missing, unexpected or misshapen: no weight is ever random. No module but this and vlm imports transformers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlrp.checkpoints import weights_hash
from hlrp.transformer import patchify


class Family(NamedTuple):
    model: str  # class of transformers
    unused: tuple[str, ...] = ()  # prefixes of the checkpoint's tensors that this part of it leaves behind


VISION = {
    "dinov2": Family("Dinov2Model"),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel"),
    "dinov3_vit": Family("DINOv3ViTModel"),
    "siglip": Family("SiglipVisionModel", ("text_model.", "logit_")),  # SigLIP 2 of one fixed size as well
    "siglip_vision_model": Family("SiglipVisionModel"),
    "siglip2": Family("Siglip2VisionModel", ("text_model.", "logit_")),  # NaFlex
    "siglip2_vision_model": Family("Siglip2VisionModel"),
    "vjepa2": Family("VJEPA2Model"),
}
TEXT = {
    "t5": Family("T5EncoderModel", ("decoder.", "lm_head.")),
    "siglip": Family("SiglipTextModel", ("vision_model.", "logit_")),
    "siglip2": Family("Siglip2TextModel", ("vision_model.", "logit_")),
    "clip": Family("CLIPTextModel", ("vision_model.", "visual_projection.", "text_projection.", "logit_")),
    "clip_text_model": Family("CLIPTextModel"),
    "bert": Family("BertModel", ("cls.",)),
}


class FrozenEncoder(nn.Module):
    """Patch features of frozen DINOv2 (with or without registers), DINOv3 ViT, SigLIP, SigLIP 2 or V-JEPA 2.

    name: hub id, or folder of config.json, model.safetensors and the image processor's config.
    image_size: height and width that frames are resized to, the checkpoint's own [pixel]
    grid: (rows, columns) of patches;  dim: features of each
    fingerprint: of the weights and the preprocessing, so that what was trained on them can refuse others

    Frames are shown whole: the checkpoint's mean, std, interpolation and size are used, its centre crop is
    not, so that the grid covers the frame. A frame that is not square is stretched. The precision is that of
    the parameters, or autocast's; the mode is always evaluation.
    """

    def __init__(self, name: str):
        super().__init__()
        import transformers

        model, config = load(name, VISION)
        config = getattr(config, "vision_config", config)
        self.family, self.patch_size, self.dim = config.model_type, config.patch_size, config.hidden_size
        is_dino, is_video = self.family.startswith("dino"), self.family == "vjepa2"
        processor = read(getattr(transformers, f"Auto{'Video' if is_video else 'Image'}Processor"), name)
        if is_dino:
            size = processor.crop_size if processor.do_center_crop else processor.size
            self.image_size = size["height"]
        elif is_video:
            model, self.image_size = model.encoder, config.crop_size  # without the predictor
        elif self.family == "siglip2_vision_model":
            self.image_size = int(config.num_patches**0.5) * self.patch_size
        else:
            self.image_size = config.image_size
        self.grid = (self.image_size // self.patch_size,) * 2
        self.num_prefix = 1 + getattr(config, "num_register_tokens", 0) if is_dino else 0  # CLS, registers

        self.interpolation, self.scale = interpolation_of(name, processor), processor.rescale_factor
        self.mean, self.std = list(processor.image_mean), list(processor.image_std)

        self.model = model.eval().requires_grad_(False)
        facts = (self.family, self.image_size, self.interpolation, self.scale, self.mean, self.std)
        self.fingerprint = weights_hash(model, *facts)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 (b, c, h, w) -> features (b, n, d) of the patches in raster order."""
        pixels = self.preprocess(frames).to(next(self.model.parameters()).dtype)
        if self.family == "vjepa2":
            return self.model(pixels[:, None]).last_hidden_state  # it repeats one frame to a tubelet
        if self.family == "siglip2_vision_model":
            patches = patchify(pixels, self.patch_size)  # b n (p q c)
            mask = patches.new_ones(patches.shape[:2], dtype=torch.int64)
            grids = torch.tensor([self.grid]).expand(len(frames), -1)  # on the CPU, where the model reads it
            return self.model(patches, mask, grids).last_hidden_state
        return self.model(pixels).last_hidden_state[:, self.num_prefix :]

    def preprocess(self, frames: Tensor) -> Tensor:
        """frames uint8 (b, c, h, w) -> float32 (b, c, image_size, image_size), resized and normalised.

        What transformers' processor gives for the whole frame, but for its rounding in the resize.
        """
        return to_pixels(frames, self.image_size, self.interpolation, self.scale, self.mean, self.std)


class TextEncoder(nn.Module):
    """Token features of instructions from frozen T5, SigLIP, SigLIP 2, CLIP or BERT.

    name: hub id, or folder of config.json, model.safetensors and the tokenizer;  dim: features of a token
    fingerprint: of the weights. Raises ValueError where the tokenizer is not that of the model.
    """

    def __init__(self, name: str):
        super().__init__()
        import transformers

        model, config = load(name, TEXT)
        config = getattr(config, "text_config", config)
        self.tokenizer = read(transformers.AutoTokenizer, name)
        # Without its files transformers makes up a tokenizer. Models pad theirs by a few tokens.
        if not 0.9 * config.vocab_size <= len(self.tokenizer) <= config.vocab_size:
            found = f"a tokenizer of {len(self.tokenizer)} tokens for a model of {config.vocab_size}"
            raise ValueError(f"{name} has {found}; expected the tokenizer's files beside the model's")
        self.is_siglip = config.model_type.startswith("siglip")  # trained on lower case, padding in sight
        positions = getattr(config, "max_position_embeddings", 512)  # T5's are relative
        self.max_length = min(self.tokenizer.model_max_length, positions)
        self.model, self.dim = model.eval().requires_grad_(False), config.hidden_size
        self.fingerprint = weights_hash(model, config.model_type)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """b texts -> features (b, n, d) and mask bool (b, n), True at tokens and False at padding.

        Instructions too long for the model are cut off. One that occurs twice is encoded once.
        """
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        shown = [text.lower() for text in unique] if self.is_siglip else list(unique)
        padding = "max_length" if self.is_siglip else "longest"
        options = {"truncation": True, "return_attention_mask": True, "return_tensors": "pt"}
        tokens = self.tokenizer(shown, padding=padding, max_length=self.max_length, **options)
        ids, mask = tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
        features = self.model(ids, attention_mask=None if self.is_siglip else mask).last_hidden_state
        indices = torch.tensor([unique[text] for text in texts], device=self.model.device)
        return features[indices], mask[indices].bool()


def interpolation_of(name: str, processor) -> str:
    """The mode of F.interpolate that stands for the resample of `name`'s image processor."""
    # By PIL's numbers. 1 is Lanczos, for which transformers takes bicubic on a GPU as well.
    modes = {1: "bicubic", 2: "bilinear", 3: "bicubic"}
    if processor.resample not in modes:
        raise ValueError(f"{name}: resample={processor.resample}; expected one of {modes}")
    return modes[processor.resample]


def to_pixels(
    frames: Tensor, size: int, interpolation: str, scale: float, mean: list[float], std: list[float]
) -> Tensor:
    """frames uint8 (b, c, h, w) -> float32 (b, c, size, size), resized with antialias, scaled and normalised."""
    pixels = frames.float()
    for shape in ((frames.shape[-2], size), (size, size)):
        if pixels.shape[-2:] != shape:
            pixels = F.interpolate(pixels, shape, mode=interpolation, antialias=True)
            pixels = pixels.clamp(0, 255)  # bicubic overshoots, which PIL cuts off along each axis
    channels = zip((pixels * scale).unbind(dim=1), mean, std, strict=True)
    return torch.stack([(channel - m) / s for channel, m, s in channels], dim=1)


def load(name: str, families: dict[str, Family]):
    """The float32 model and the config of a hub id or folder. Raises ValueError naming what does not fit."""
    import transformers
    from transformers.utils import logging

    config = read(transformers.AutoConfig, name)
    if config.model_type not in families:
        raise ValueError(f"{name} is a {config.model_type!r} model; expected one of {', '.join(families)}")
    family = families[config.model_type]
    options = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers' report would list all of the unused tensors
    try:
        model, info = read(getattr(transformers, family.model), name, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
    faults += [f"unexpected {k}" for k in sorted(info["unexpected_keys"]) if not k.startswith(family.unused)]
    for key, found, expected in sorted(info["mismatched_keys"]):
        faults.append(f"{key} is {tuple(found)}, expected {tuple(expected)}")
    if faults:
        shown = "; ".join(faults[:8])
        raise ValueError(f"{name} does not fit {family.model}: {shown} ({len(faults)} faults in all)")
    return model, config


def read(auto, name: str, **options):
    """auto.from_pretrained(name) without code of the hub, and a ValueError that names `name` and what would fit."""
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        examples = "facebook/dinov2-base, google-t5/t5-base or HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
        files = "config.json, model.safetensors and the config of its processor or tokenizer"
        fits = f"a hub id such as {examples}, or a folder with {files}"
        raise ValueError(f"cannot read {name!r}: {error}\nExpected {fits}") from error
