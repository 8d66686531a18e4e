"""The decoder of LAQ: what the second frame looks like, by the first one and the latent action."""

from torch import Tensor, nn

from hlrp.transformer import Transformer


class Decoder(nn.Module):
    """The first frame, codes and further context -> one prediction a patch and target, "nothing changes" at first.

    The codes scale and shift what every block reads (FiLM, Perez et al. 2017, arXiv:1709.07871; in a transformer:
    Peebles and Xie 2022, arXiv:2212.09748, Sec. 3.2). Context tokens stand before the patches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int,
        num_tokens: int,
        grid: tuple[int, ...],
        inputs: dict[str, int],
        outputs: dict[str, int],
    ):
        """inputs, outputs: numbers a patch of each, by name."""
        super().__init__()
        self.from_codes = nn.Linear(num_tokens * dim, dim)
        self.to_modulations = nn.ModuleList(nn.Linear(dim, 4 * dim, bias=False) for _ in range(depth))
        self.from_inputs = nn.ModuleDict({name: nn.Linear(size, dim) for name, size in inputs.items()})
        self.transformer = Transformer(dim, depth, num_heads, grid)
        self.to_outputs = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in outputs.items()})
        for head in self.to_outputs.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, inputs: dict[str, Tensor], codes: Tensor, context: Tensor | None) -> dict[str, Tensor]:
        patches = sum(layer(inputs[name]) for name, layer in self.from_inputs.items())  # b n d
        condition = self.from_codes(codes.flatten(1))
        modulations = [layer(condition)[:, None] for layer in self.to_modulations]  # b 1 4d
        patches = patches + condition[:, None]
        hidden = self.transformer(patches, context, modulations)[:, -patches.shape[1] :]
        return {name: head(hidden).float() for name, head in self.to_outputs.items()}
