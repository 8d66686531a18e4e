"""Loss terms that more than one model uses."""

import torch
import torch.distributed as dist
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over the samples that `mask` marks on all ranks; zero where there are none.

    values: (b,), mask: bool (b,). Gradients are averaged over ranks afterwards, so each rank divides its own sum
    by its share of the global count: the average is then exact, however unevenly the marked samples lie.
    """
    count = mask.sum().to(values.dtype)
    if dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    values = torch.where(mask, values, 0.0)  # not values * mask: a masked value may be infinite
    return values.sum() / torch.where(count > 0, count, 1.0)
