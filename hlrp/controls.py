"""What latent actions are compared with: observations alone, an encoder that has learned nothing, one that has learned
from shuffled futures, and a model of the labels alone."""

from collections.abc import Callable
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from hlrp.data import Mixture, loader
from hlrp.laq import LAQ, LAQConfig
from hlrp.losses import mean_action
from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
from hlrp.transformer import Block


def principal_components(x: Tensor, is_fit: Tensor, num_components: int) -> Tensor:
    """Scores (b, k) of the rows (b, d) on the first components of the marked ones, at most `num_components`."""
    x = x.float()
    x = x - x[is_fit].double().mean(dim=0).float()
    num_components = min(num_components, x.shape[1], int(is_fit.sum()) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, components = torch.pca_lowrank(x[is_fit], q=min(num_components + 8, *x[is_fit].shape), niter=3)
    return x @ components[:, :num_components]


def untrained(config: LAQConfig, seed: int) -> LAQ:
    """A LAQ of the same architecture, as it begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LAQ(config).eval()


def train(
    model: nn.Module,
    clips: list,
    steps: int,
    batch_size: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    num_workers: int = 0,
    edit: Callable[[dict], dict] = lambda batch: batch,
) -> nn.Module:
    """Trains a model on batches of the clips, as `edit` gives them to it, and returns it in evaluation mode."""
    device = next(model.parameters()).device
    optimizer = make_optimizer("muon", model, {Block}, lr, weight_decay=0.05)
    mixture = Mixture(clips, seed=seed)
    batches = iter(loader(mixture, batch_size, num_workers=num_workers))
    model.train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for step in range(steps):
            set_lr(optimizer, cosine_lr(step, lr, max(1, min(100, steps // 8)), steps))
            batch = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in next(batches).items()}
            loss, _ = model(edit(batch | {"step": step}))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def with_shuffled_futures(batch: dict) -> dict:
    """Each pair with the second frame of another pair: no action leads from one to the other."""
    first, second = batch["frames"].unbind(1)
    return batch | {"frames": torch.stack([first, second.roll(1, dims=0)], dim=1)}


def trained_on_shuffled_futures(config: LAQConfig, clips: list, steps: int, device, **settings) -> LAQ:
    """A LAQ of the same architecture for which there is nothing to learn about actions."""
    config = replace(config, action_weight=0.0)
    laq = untrained(config, settings.get("seed", 0)).to(device)
    return train(laq, clips, steps, edit=with_shuffled_futures, **settings)


def with_mean_action(batch: dict) -> dict:
    return batch | {"action": mean_action(batch["action"], batch["action_is_pad"])[0][:, None]}


def trained_on_labels(image_size: int, clips, steps: int, device, statistics, **settings) -> nn.Module:
    """A model from two frames to the mean action between them, of the labelled clips alone."""
    from hlrp.inverse import InverseModel  # which loads LeRobot

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.get("seed", 0))
        model = InverseModel(image_size, len(statistics[0])).to(device)
    model.mean[:], model.std[:] = statistics
    return train(model, [clips], steps, edit=with_mean_action, **settings)


@torch.no_grad()
def predicted_actions(model: nn.Module, frames: Tensor) -> Tensor:
    """frames uint8 (b, 2, c, h, w) -> (b, a)."""
    return model.standardised(frames) * model.std + model.mean


def flat(frames: Tensor) -> Tensor:
    """uint8 frames (b, c, h, w) as rows of numbers in [0, 1]."""
    return rearrange(frames, "b c h w -> b (c h w)").float() / 255
