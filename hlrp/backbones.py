"""Pretrained models that stay frozen: features of frames and of instructions, and optical flow between frames.

`FrozenEncoder` and `TextEncoder` take a hub id or a folder of transformers, and read safetensors weights only. They
raise ValueError where a tensor is missing, unexpected or misshapen, so no weight is ever random. A new family of
encoders is one line of `VISION_ENCODERS` or `TEXT_ENCODERS`, and a class where its models need code of their own.

`FlowTeacher` is RAFT (Teed and Deng 2020, arXiv:2003.12039). A flow is float (b, 2, h, w): how far each pixel of the
first frame moves, right (channel 0) and down (channel 1) [pixel].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from hlrp.checkpoints import WEIGHTS, weights_hash
from hlrp.transformer import attend, patchify

# a model, config or processor of transformers, whose types do not tell what a family has
Pretrained = Any


@dataclass(frozen=True)
class VisionFamily:
    """A family of transformers' vision models. Its methods say what its models do in their own way."""

    model: str  # class of transformers
    unused: tuple[str, ...] = ()  # prefixes of tensors in the checkpoint that are not part of this class
    processor: str = "AutoImageProcessor"
    encoder: str = ""  # where the model keeps its encoder; the rest is not loaded to the device

    def image_size(self, config, processor) -> int:
        """Height and width that the checkpoint wants [pixel]."""
        return config.image_size

    def features(self, encoder: Pretrained, pixels: Tensor) -> Tensor:
        """pixels (b, c, h, w) -> features (b, n, d) of the patches in raster order."""
        return encoder(pixels).last_hidden_state


class DINO(VisionFamily):
    """A class token and registers stand before the patches."""

    def image_size(self, config, processor) -> int:
        return (processor.crop_size if processor.do_center_crop else processor.size)["height"]

    def features(self, encoder: Pretrained, pixels: Tensor) -> Tensor:
        num_prefix = 1 + getattr(encoder.config, "num_register_tokens", 0)
        return encoder(pixels).last_hidden_state[:, num_prefix:]  # b (prefix n) d -> b n d


class NaFlex(VisionFamily):
    """SigLIP 2 that takes patches, a mask and the shape of the grid."""

    def image_size(self, config, processor) -> int:
        return int(config.num_patches**0.5) * config.patch_size

    def features(self, encoder: Pretrained, pixels: Tensor) -> Tensor:
        patch_size = encoder.config.patch_size
        patches = patchify(pixels, patch_size)  # b n (p q c)
        mask = patches.new_ones(patches.shape[:2], dtype=torch.int64)  # b n
        grid = [side // patch_size for side in pixels.shape[-2:]]
        grids = torch.tensor([grid]).expand(len(pixels), -1)  # b 2, on the CPU, where the model reads it
        return encoder(patches, mask, grids).last_hidden_state


class VJEPA(VisionFamily):
    """V-JEPA 2: a video of one frame, which the model repeats to a tubelet."""

    def image_size(self, config, processor) -> int:
        return config.crop_size

    def features(self, encoder: Pretrained, pixels: Tensor) -> Tensor:
        return encoder(pixels[:, None]).last_hidden_state  # b 1 c h w -> b n d


@dataclass(frozen=True)
class TextFamily:
    model: str  # class of transformers
    unused: tuple[str, ...] = ()  # prefixes of tensors in the checkpoint that are not part of this class


# model_type in a checkpoint's config.json -> its family
VISION_ENCODERS: dict[str, VisionFamily] = {
    "dinov2": DINO("Dinov2Model"),
    "dinov2_with_registers": DINO("Dinov2WithRegistersModel"),
    "dinov3_vit": DINO("DINOv3ViTModel"),
    "siglip": VisionFamily("SiglipVisionModel", ("text_model.", "logit_")),  # SigLIP 2 of one fixed size as well
    "siglip_vision_model": VisionFamily("SiglipVisionModel"),
    "siglip2": NaFlex("Siglip2VisionModel", ("text_model.", "logit_")),
    "siglip2_vision_model": NaFlex("Siglip2VisionModel"),
    "vjepa2": VJEPA("VJEPA2Model", processor="AutoVideoProcessor", encoder="encoder"),
}
TEXT_ENCODERS: dict[str, TextFamily] = {
    "t5": TextFamily("T5EncoderModel", ("decoder.", "lm_head.")),
    "siglip": TextFamily("SiglipTextModel", ("vision_model.", "logit_")),
    "siglip2": TextFamily("Siglip2TextModel", ("vision_model.", "logit_")),
    "clip": TextFamily("CLIPTextModel", ("vision_model.", "visual_projection.", "text_projection.", "logit_")),
    "clip_text_model": TextFamily("CLIPTextModel"),
    "bert": TextFamily("BertModel", ("cls.",)),
}


class FrozenEncoder(nn.Module):
    """Patch features of frozen DINOv2 (with or without registers), DINOv3 ViT, SigLIP, SigLIP 2 or V-JEPA 2.

    name: hub id, or folder of config.json, model.safetensors and the image processor's config
    image_size: height and width to which frames are resized: the checkpoint's own [pixel]
    grid: (rows, columns) of patches;  dim: features of a patch
    fingerprint: hash of weights and preprocessing, so that a model trained on them can refuse others

    The model sees whole frames: it uses the checkpoint's mean, std, interpolation and size, but not its centre crop, so
    the grid covers the frame. A frame that is not square is stretched. The parameters' dtype, or autocast, sets the
    precision. The mode is always evaluation.
    """

    def __init__(self, name: str):
        super().__init__()
        import transformers

        model, config, self.family = load(name, VISION_ENCODERS)
        config = getattr(config, "vision_config", config)
        processor = read(getattr(transformers, self.family.processor), name)
        self.image_size = self.family.image_size(config, processor)
        self.patch_size, self.dim = config.patch_size, config.hidden_size
        self.grid = (self.image_size // self.patch_size, self.image_size // self.patch_size)

        self.interpolation, self.scale = interpolation_of(name, processor), processor.rescale_factor
        self.mean, self.std = list(processor.image_mean), list(processor.image_std)

        self.model = model.get_submodule(self.family.encoder).eval().requires_grad_(False)
        facts = (config.model_type, self.image_size, self.interpolation, self.scale, self.mean, self.std)
        self.fingerprint = weights_hash(self.model, *facts)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 (b, c, h, w) -> features (b, n, d) of the patches in raster order."""
        pixels = self.preprocess(frames).to(next(self.model.parameters()).dtype)  # b c h w
        return self.family.features(self.model, pixels)  # b n d

    def preprocess(self, frames: Tensor) -> Tensor:
        """frames uint8 (b, c, h, w) -> float32 (b, c, image_size, image_size), resized and normalised.

        Equals transformers' processor on the whole frame, except that the processor rounds after the resize.
        """
        return to_pixels(frames, self.image_size, self.interpolation, self.scale, self.mean, self.std)


class TextEncoder(nn.Module):
    """Token features of instructions from frozen T5, SigLIP, SigLIP 2, CLIP or BERT.

    name: hub id, or folder of config.json, model.safetensors and the tokenizer;  dim: features of a token
    fingerprint: hash of the weights

    Raises ValueError where the tokenizer does not belong to the model.
    """

    def __init__(self, name: str):
        super().__init__()
        import transformers

        model, config, _ = load(name, TEXT_ENCODERS)
        config = getattr(config, "text_config", config)
        self.tokenizer = read(transformers.AutoTokenizer, name)
        # Without its files transformers makes up a tokenizer. Models pad theirs by a few tokens.
        if not 0.9 * config.vocab_size <= len(self.tokenizer) <= config.vocab_size:
            sizes = f"a tokenizer of {len(self.tokenizer)} tokens for a model of {config.vocab_size}"
            raise ValueError(f"{name} has {sizes}; expected the tokenizer's files beside the model's")
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

        A text too long for the model is cut off. A text that occurs twice is encoded once.
        """
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        inputs = [text.lower() for text in unique] if self.is_siglip else list(unique)
        padding = "max_length" if self.is_siglip else "longest"
        options = {"truncation": True, "return_attention_mask": True, "return_tensors": "pt"}
        tokens = self.tokenizer(inputs, padding=padding, max_length=self.max_length, **options)
        ids, mask = tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
        features = self.model(ids, attention_mask=None if self.is_siglip else mask).last_hidden_state  # unique n d
        indices = torch.tensor([unique[text] for text in texts], device=self.model.device)
        return features[indices], mask[indices].bool()


def interpolation_of(name: str, processor) -> str:
    """The mode of F.interpolate for the `resample` of `name`'s image processor."""
    # PIL's numbers. 1 is Lanczos, for which transformers takes bicubic on a GPU as well.
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
            pixels = pixels.clamp(0, 255)  # bicubic overshoots; PIL clips after each axis
    channels = zip((pixels * scale).unbind(dim=1), mean, std, strict=True)
    return torch.stack([(channel - m) / s for channel, m, s in channels], dim=1)


def load(name: str, families: dict) -> tuple[Pretrained, Pretrained, Any]:
    """Loads the float32 model of a hub id or folder; returns it with its config and its entry in `families`.

    families: model_type -> an object with `model`, the class of transformers, and `unused`, prefixes of tensors that
    the checkpoint has and the class has not. Raises ValueError where a tensor is missing, unexpected or misshapen.
    Of a SmolVLA policy, the vision-language model is loaded; the config's `name_or_path` is the model it began as.
    """
    import transformers
    from transformers.utils import logging

    origin, layers, weights = of_smolvla(name) or (name, 0, None)
    config = read(transformers.AutoConfig, origin)
    if layers:
        config.text_config.num_hidden_layers = layers
    if config.model_type not in families:
        raise ValueError(f"{name} is a {config.model_type!r} model; expected one of {', '.join(families)}")
    family = families[config.model_type]
    options = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True}
    if weights is not None:
        options |= {"config": config, "state_dict": weights}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers' report would list all of the unused tensors
    try:
        where = name if weights is None else None
        model, info = read(getattr(transformers, family.model), where, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
    faults += [f"unexpected {k}" for k in sorted(info["unexpected_keys"]) if not k.startswith(family.unused)]
    for key, shape, expected in sorted(info["mismatched_keys"]):
        faults.append(f"{key} is {tuple(shape)}, expected {tuple(expected)}")
    if faults:
        first = "; ".join(faults[:8])
        raise ValueError(f"{name} is no checkpoint of {family.model}: {first} ({len(faults)} faults in all)")
    return model, config, family


def of_smolvla(name: str) -> tuple[str, int, dict[str, Tensor]] | None:
    """What a SmolVLA policy of LeRobot (Shukor et al. 2025, arXiv:2506.01844, Sec. 3.1) holds of a SmolVLM2: the name
    of that model, the number of its layers that are kept (0: all), their weights. None where `name` is something else.
    """
    import transformers
    from transformers.utils import cached_file

    with readable(name):
        config, _ = transformers.PreTrainedConfig.get_config_dict(name)
        if config.get("type") != "smolvla":
            return None
        path: Any = cached_file(name, WEIGHTS)  # raises where it is missing
        prefix, tensors = "model.vlm_with_expert.vlm.", load_file(path)
    weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return config["vlm_model_name"], max(0, config["num_vlm_layers"]), weights


def read(auto, name: str | None, **options):
    """auto.from_pretrained(name), without code from the hub. Raises ValueError where it cannot be read."""
    with readable(name):
        return auto.from_pretrained(name, trust_remote_code=False, **options)


@contextmanager
def readable(name: str | None) -> Iterator[None]:
    """Raises ValueError, which says what is expected, where the body cannot read the hub id or folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        examples = "facebook/dinov2-base, google-t5/t5-base or HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
        files = "config.json, model.safetensors and the config of its processor or tokenizer"
        expected = f"a hub id such as {examples}, or a folder with {files}"
        raise ValueError(f"cannot read {name!r}: {error}\nExpected {expected}") from error


PLAIN = "hlrp"  # names under which transformers knows the two functions below
PACKED = "hlrp_flash"  # Qwen looks for "flash" in the name, and then packs the images of a batch one behind the other


def use_attention(model: Pretrained) -> None:
    """Makes one of transformers' models attend by `hlrp.transformer.attend`, in place; for Qwen also replaces the patch
    embedding by a faster one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PLAIN, plain_attention)
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PLAIN, sdpa_mask)
    for config in (getattr(model.config, name) for name in model.config.sub_configs):
        if config._attn_implementation == "sdpa":  # Gemma 2 caps its logits, which the fused kernels cannot
            config._attn_implementation = PLAIN
    if model.config.model_type.startswith("qwen"):
        model.model.visual.config._attn_implementation = PACKED
        model.model.visual.patch_embed.proj = PatchProjection.of(model.model.visual.patch_embed.proj)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_,
) -> tuple[Tensor, None]:
    """query (b, heads, n, d), key and value (b, heads / groups, m, d) -> (b, n, heads, d)."""
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    masks_later = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    out = attend(query, key, value, attention_mask, scaling, dropout, masks_later)
    return out.transpose(1, 2).contiguous(), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_,
) -> tuple[Tensor, None]:
    """Attention within each part of a packed sequence: an image, or a window of one, of any length.

    query, key, value (1, heads, n, d) -> (1, n, heads, d). cu_seq_lens_q (parts + 1,): where each part begins, and n.
    max_length_q: length of the longest part.
    """
    num_parts = len(cu_seq_lens_q) - 1
    if num_parts * max_length_q == query.shape[2]:
        q, k, v = (rearrange(x, "1 h (b n) d -> b h n d", b=num_parts) for x in (query, key, value))
        return rearrange(attend(q, k, v, None, scaling, dropout), "b h n d -> 1 (b n) h d"), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [attend(q, k, v, None, scaling, dropout) for q, k, v in parts]
    return torch.cat(outs, dim=2).transpose(1, 2), None


class PatchProjection(nn.Conv3d):
    """A Conv3d whose kernel is as large as its input, computed as one matrix product."""

    @classmethod
    def of(cls, conv: nn.Conv3d) -> "PatchProjection":
        is_biased, (t, p, q) = conv.bias is not None, conv.kernel_size
        size = (t, p, q)
        projection = cls(conv.in_channels, conv.out_channels, size, size, bias=is_biased, device="meta")
        projection.weight, projection.bias = conv.weight, conv.bias
        return projection

    def forward(self, patches: Tensor) -> Tensor:
        """(n, c, t, p, q) -> (n, d)"""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


MIN_SIZE = 128  # RAFT's correlation pyramid needs 16 x 16 features of 8 x 8 pixels [pixel]


class FlowTeacher(nn.Module):
    """Frozen RAFT of torchvision.

    weights: a name of torchvision's weights, such as "C_T_V2" (torchvision downloads them into torch.hub's cache,
    checks their hash and reads them with weights_only=True); a safetensors file of RAFT's state dict; or "random", for
    tests. num_flow_updates: refinements of the flow (Sec. 3.3).
    Raises ValueError where the weights cannot be read or belong to another model.
    """

    def __init__(self, weights: str, size: Literal["small", "large"] = "small", num_flow_updates: int = 12):
        super().__init__()
        from torchvision.models import get_model

        self.raft: Any = get_model(f"raft_{size}", weights=None)
        self.num_flow_updates = num_flow_updates
        if weights != "random":
            try:
                self.raft.load_state_dict(read_weights(weights, size))
            except RuntimeError as error:
                raise ValueError(f"flow weights {weights!r}; expected weights of raft_{size}: {error}") from error
        self.raft.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 (b, 2, c, h, w) -> flow float32 (b, 2, h, w) [pixel], in float32 under autocast too.

        For RAFT, frames below 128 pixels are enlarged, and sides are stretched to the next multiple of 8.
        """
        height, width = frames.shape[-2:]
        enlarge = max(1.0, MIN_SIZE / min(height, width))
        size = [8 * -(-round(side * enlarge) // 8) for side in (height, width)]
        pixels = frames.flatten(0, 1).float() / 127.5 - 1  # (b t) c h w
        if size != [height, width]:
            pixels = F.interpolate(pixels, size, mode="bilinear")
        first, second = pixels.unflatten(0, (-1, 2)).unbind(dim=1)
        with torch.autocast(frames.device.type, enabled=False):
            flow = self.raft(first, second, num_flow_updates=self.num_flow_updates)[-1]
        self.raft.corr_block.corr_pyramid = None  # b (h w / 64)^2 floats, kept until the next call otherwise
        return resize_flow(flow, (height, width))


def farneback(frames: Tensor) -> Tensor:
    """OpenCV's optical flow by no learned model (Farneback 2003): uint8 (b, 2, c, h, w) -> float32 (b, 2, h, w)."""
    import cv2

    settings: dict[str, Any] = {"flow": None, "flags": 0}
    settings |= {"pyr_scale": 0.5, "levels": 3, "winsize": 11, "iterations": 3, "poly_n": 5, "poly_sigma": 1.1}
    pictures = rearrange(frames.cpu(), "b t c h w -> b t h w c").contiguous().numpy()
    flows = []
    for pair in pictures:
        first, second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in pair)
        flows.append(torch.from_numpy(cv2.calcOpticalFlowFarneback(first, second, **settings)))
    return rearrange(torch.stack(flows), "b h w xy -> b xy h w")


def read_weights(weights: str, size: str) -> dict[str, Tensor]:
    """The state dict that `weights` names. Raises ValueError where it cannot be read."""
    from torchvision.models import get_model_weights

    known = get_model_weights(f"raft_{size}")
    if weights in known.__members__:
        try:
            return known[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)
        except OSError as error:
            raise ValueError(
                f"cannot download flow weights {weights!r} from {known[weights].url}: {error}. "
                f"Put that file into {torch.hub.get_dir()}/checkpoints, or name a safetensors file"
            ) from error
    if not (weights.endswith(".safetensors") and Path(weights).is_file()):
        names = ", ".join(known.__members__)
        raise ValueError(f"flow weights {weights!r}: expected {names} or an existing safetensors file")
    return load_file(weights)


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a flow (b, 2, h, w) to (height, width); its values become pixels of the new size."""
    height, width = flow.shape[-2:]
    if (height, width) == tuple(size):
        return flow
    scale = flow.new_tensor([size[1] / width, size[0] / height])  # x, y
    antialias = size[0] < height or size[1] < width
    return F.interpolate(flow, tuple(size), mode="bilinear", antialias=antialias) * scale[:, None, None]


def mean_flow(flow: Tensor) -> Tensor:
    """The mean over a frame: (b, 2, h, w) -> (b, 2)."""
    return flow.mean(dim=(-2, -1))


def flow_to_rgb(flow: Tensor) -> Tensor:
    """flow (b, 2, h, w) -> uint8 (b, 3, h, w). Hue is the direction, saturation the length divided by the batch's
    largest: to compare flows, draw them in one batch."""
    from torchvision.utils import flow_to_image

    return flow_to_image(flow.float())


def flow_loss(pred: Tensor, target: Tensor, mean_flow_weight: float) -> Tensor:
    """Charbonnier distance (b,) of two flows (b, 2, h, w), plus mean_flow_weight times the distance of their means.

    Both have the unit of the flows. Most pixels stand still and dominate the first term; the means keep the direction
    of the whole frame.
    """
    distance = charbonnier(pred - target).mean(dim=(-2, -1))
    return distance + mean_flow_weight * charbonnier(mean_flow(pred) - mean_flow(target))


def charbonnier(difference: Tensor, epsilon: float = 1e-2) -> Tensor:
    """sqrt(|x|^2 + epsilon^2) - epsilon along dimension 1, smooth at zero (Charbonnier et al. 1994)."""
    return (difference.float().square().sum(dim=1) + epsilon**2).sqrt() - epsilon
