"""Loss terms that more than one model uses."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean of `values` over the samples that `mask` marks on all ranks; zero where there are none.

    values: (b,), mask: bool (b,). Gradients are averaged over ranks, and over the batches accumulated in a step,
    afterwards. So each divides its own sum by its share of the global count: the average is then exact, however
    unevenly the marked samples lie. count: that share; without it, of this batch on all ranks.
    """
    if count is None:
        count = mask.sum().to(values.dtype)
        if dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
    values = torch.where(mask, values, 0.0)  # not values * mask: a masked value may be infinite
    return values.sum() / torch.where(count > 0, count, 1.0)


def mean_action(action: Tensor, action_is_pad: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over a chunk (b, t, a) of the actions that are none of padding: (b, a); and who has any: bool (b,)."""
    taken = ~action_is_pad
    action = action.masked_fill(action_is_pad[..., None], 0.0)
    mean = action.sum(1) / taken.sum(1, keepdim=True).clamp(min=1)
    return mean, taken.any(1)


class ActionReadout(nn.Module):
    """Linear from features to the mean action over a span, in the action space of each source."""

    def __init__(self, dim: int, num_sources: int, action_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_sources, dim, action_dim))
        self.register_buffer("mean", torch.zeros(num_sources, action_dim))
        self.register_buffer("std", torch.ones(num_sources, action_dim))

    def set_statistics(self, statistics: list[tuple[Tensor, Tensor]]) -> None:
        """Mean and standard deviation (a,) of each source's actions, which errors are scaled by."""
        for source, (mean, std) in enumerate(statistics):
            self.mean[source, : len(mean)] = mean
            self.std[source, : len(std)] = std

    def forward(self, features: Tensor, source: Tensor) -> Tensor:
        """features (b, d), source int64 (b,) -> actions (b, a) in their own units."""
        standardised = torch.einsum("bd,bda->ba", features.float(), self.weight[source])
        return standardised * self.std[source] + self.mean[source]

    def loss(self, features: Tensor, batch: dict) -> Tensor:
        """Squared error over the labelled samples alone.

        batch: action (b, t, a), action_is_pad, source; num_labelled as `masked_mean`'s count.
        """
        target, is_labelled = mean_action(batch["action"], batch["action_is_pad"])
        source = batch["source"]
        errors = (self(features, source) - target) / self.std[source]
        return masked_mean(errors.square().mean(-1), is_labelled, batch.get("num_labelled"))
