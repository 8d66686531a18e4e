"""How transformers' models attend here: by `hlrp.transformer.attend`, and over all images of a batch at once."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hlrp.transformer import attend

PLAIN = "hlrp"  # names by which transformers knows the two functions below
PACKED = "hlrp_flash"  # with "flash" in it, for which Qwen packs the images of a batch behind each other


def use_attention(model: nn.Module) -> None:
    """Changes what computes the attention of one of transformers' models, and Qwen's patch embedding, in place."""
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
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
    out = attend(query, key, value, attention_mask, scaling, dropout, is_causal)
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
    """Attention inside each of the parts that lie one behind the other, from one of cu_seq_lens_q (parts + 1,) to the
    next: images, or windows of them, which are of several sizes where they do not divide an image.

    query, key, value: (1, heads, n, d); returns (1, n, heads, d). max_length_q: the longest part.
    """
    num_parts = len(cu_seq_lens_q) - 1
    if num_parts * max_length_q == query.shape[2]:
        parts = (rearrange(x, "1 h (b n) d -> b h n d", b=num_parts) for x in (query, key, value))
        return rearrange(attend(*parts, None, scaling, dropout), "b h n d -> 1 (b n) h d"), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part, None, scaling, dropout) for part in parts], dim=2).transpose(1, 2), None


class PatchProjection(nn.Conv3d):
    """A Conv3d whose kernel is as large as its input, computed as the matrix product that it is."""

    @classmethod
    def of(cls, conv: nn.Conv3d) -> "PatchProjection":
        is_biased, size = conv.bias is not None, conv.kernel_size
        projection = cls(conv.in_channels, conv.out_channels, size, size, bias=is_biased, device="meta")
        projection.weight, projection.bias = conv.weight, conv.bias
        return projection

    def forward(self, patches: Tensor) -> Tensor:
        """(n, c, t, p, q) -> (n, d)"""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
