"""Inverse dynamics from few demonstrations: a model of two frames -> action, and its actions for all other video.

    python -m hlrp.inverse --data 'metaworld:mt10?episodes=100' --demonstrations 5 --output-dir outputs/inverse
    python finetune_policy.py --pseudo-actions outputs/inverse --demonstrations 5 ...

This is the rival that latent actions have to beat: a model learned from the same demonstrations labels the video (VPT,
Baker et al. 2022, arXiv:2206.11795). It writes actions.safetensors, one row for each frame of each episode in their
order, and inverse.json, which names the data and says how good the actions are on held-out episodes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import trange

from hlrp.checkpoints import save_tensors, whole_folder, write_json
from hlrp.cli import tell_mistakes
from hlrp.clips import Clips
from hlrp.contract import Source, Stream, choose_demonstrations, split_episodes
from hlrp.data import Mixture, action_statistics, loader
from hlrp.images import fit
from hlrp.laq import standardise
from hlrp.metrics import r2_per_dim
from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
from hlrp.sources import open_source, parse_uri
from hlrp.training import seed_step
from hlrp.transformer import Block, Transformer, patchify

ACTIONS, FACTS = "actions.safetensors", "inverse.json"


@dataclass
class Args:
    data: str  # a source with actions, as for train_laq.py
    output_dir: Path  # folder to write; it must not exist yet
    demonstrations: int = 5  # episodes of each task whose actions are learned
    val_fraction: float = 0.1  # share of the episodes that is held out; take the one of finetune_policy.py
    seed: int = 0  # of the split, the demonstrations and the training; take the one of finetune_policy.py
    image_size: int = 64  # side of the frames that the model sees [pixel]
    steps: int = 600  # optimizer steps of the training
    batch_size: int = 32  # pairs of frames in an optimizer step
    lr: float = 3e-3  # highest learning rate
    num_workers: int = 0  # processes that load data; 0: this one


class InverseModel(nn.Module):
    """Predicts the action (b, a) between two consecutive frames, uint8 (b, 2, c, h, w)."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, action_dim: int, patch_size: int = 8, dim: int = 128, depth: int = 4):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size}; expected a multiple of {patch_size}")
        self.image_size, self.patch_size = image_size, patch_size
        self.from_patches = nn.Linear(6 * patch_size**2, dim)
        self.query = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        side = image_size // patch_size
        self.transformer = Transformer(dim, depth, 4, (side, side))
        self.to_action = nn.Linear(dim, action_dim)
        self.register_buffer("mean", torch.zeros(action_dim))
        self.register_buffer("std", torch.ones(action_dim))

    def standardised(self, frames: Tensor) -> Tensor:
        """The action (b, a) in standard deviations from its mean."""
        images = standardise(frames)  # b 2 c h w
        first_and_change = torch.cat([images[:, 0], images[:, 1] - images[:, 0]], dim=1)  # b (2 c) h w
        patches = self.from_patches(patchify(first_and_change, self.patch_size))  # b n d
        query = self.query.expand(len(frames), -1, -1)  # b 1 d
        return self.to_action(self.transformer(patches, prefix=query)[:, 0])  # b a

    def forward(self, batch: dict) -> tuple[Tensor, dict]:
        target = (batch["action"][:, 0] - self.mean) / self.std  # b a
        return F.mse_loss(self.standardised(batch["frames"]), target), {}

    @torch.no_grad()
    def label(self, source: Source, episode: int) -> Tensor:
        """The actions (t, a) of an episode. The last frame repeats the action of the frame before it. An episode of one
        frame gets the mean action."""
        if source.lengths[episode] == 1:
            return self.mean[None].clone()
        frames = fit(source.read(episode, range(source.lengths[episode]))["frames"], self.image_size)
        pairs = torch.stack([frames[:-1], frames[1:]], dim=1)
        actions = torch.cat([self.standardised(part) for part in pairs.split(64)]) * self.std + self.mean
        return torch.cat([actions, actions[-1:]])


def main(args: Args) -> None:
    if args.output_dir.exists():
        raise ValueError(f"output_dir={args.output_dir} exists already; delete it or choose another folder")
    for name in ("demonstrations", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}; expected 1 or more")
    source = open_source(parse_uri(args.data).uri)
    if isinstance(source, Stream):
        raise ValueError(f"{source.uri} is a stream; make a source with python -m hlrp.shards --data '{source.uri}'")
    if not source.action_dim:
        raise ValueError(
            f"data={args.data} has no actions; expected a source with actions, from which an inverse model learns"
        )
    train, val = split_episodes(source, args.val_fraction, args.seed)
    if source.lengths[val].max() < 2:
        raise ValueError(f"data={args.data}: no held-out episode has two frames; expected a larger --val-fraction")
    demonstrations = choose_demonstrations(source, train, args.demonstrations, args.seed)
    clips = Clips(source, demonstrations, (0.0, 1 / float(source.fps[0])), args.image_size)
    torch.manual_seed(args.seed)
    model = InverseModel(args.image_size, source.action_dim)
    model.mean[:], model.std[:] = action_statistics(clips)
    optimizer = make_optimizer("muon", model, {Block}, args.lr, 0.05)
    mixture = Mixture([clips], seed=args.seed)
    batches = iter(loader(mixture, args.batch_size, num_workers=args.num_workers))
    for step in trange(args.steps, unit="step", disable=None):
        set_lr(optimizer, cosine_lr(step, args.lr, min(50, args.steps), args.steps))
        seed_step(args.seed, step, 0)
        loss, _ = model(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    labels = [model.label(source, episode) for episode in range(len(source.lengths))]
    truth = torch.cat([source.actions(int(i), np.arange(source.lengths[i] - 1)) for i in val])
    score = r2_per_dim(torch.cat([labels[i][:-1] for i in val]), truth)
    with whole_folder(args.output_dir) as folder:
        save_tensors(folder / ACTIONS, {"actions": torch.cat(labels)})
        facts = {
            "fingerprint": source.fingerprint,
            "demonstrations": demonstrations.tolist(),
            "action_r2": float(score.mean()),
        }
        write_json(folder / FACTS, facts | {"args": asdict(args) | {"output_dir": str(args.output_dir)}})
    print(f"{args.output_dir}: actions of {len(source.lengths)} episodes; R2 on held-out ones {score.mean():.2f}")


class PseudoLabelled(Source):
    """A source with the actions of an inverse model. The demonstrations keep their own actions.

    Raises ValueError if the folder was made from other data or other demonstrations.
    """

    def __init__(self, source: Source, folder: Path, demonstrations: np.ndarray):
        if not (folder / FACTS).is_file():
            raise ValueError(f"pseudo_actions={folder} holds no {FACTS}; python -m hlrp.inverse makes it")
        facts = json.loads((folder / FACTS).read_text())
        if facts["fingerprint"] != source.fingerprint:
            raise ValueError(f"pseudo_actions={folder} are of other data than {source.uri}")
        if facts["demonstrations"] != demonstrations.tolist():
            raise ValueError(
                f"pseudo_actions={folder} are of other demonstrations; expected the same --demonstrations, --seed and "
                "--val-fraction as in its making"
            )
        self.source, self.demonstrations = source, set(facts["demonstrations"])
        self.pseudo_actions = load_file(folder / ACTIONS)["actions"].split(source.lengths.tolist())
        content = source.fingerprint.encode() + (folder / ACTIONS).read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

        self.uri, self.name, self.camera, self.views = source.uri, source.name, source.camera, source.views
        self.lengths, self.fps, self.uneven = source.lengths, source.fps, source.uneven
        self.action_dim, self.state_dim, self.latent_space = source.action_dim, source.state_dim, source.latent_space

    def actions(self, episode: int, indices: Sequence[int]) -> Tensor:
        if episode in self.demonstrations:
            return self.source.actions(episode, indices)
        return self.pseudo_actions[episode][torch.as_tensor(np.asarray(indices))]

    def read(self, episode: int, indices: Sequence[int]) -> dict:
        return self.source.read(episode, indices)

    def instructions(self, episode: int, indices: Sequence[int]) -> list[str]:
        return self.source.instructions(episode, indices)

    def states(self, episode: int, indices: Sequence[int]) -> Tensor:
        return self.source.states(episode, indices)

    def labels(self, episode: int, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.source.labels(episode, indices)

    def place(self, episode: int) -> str:
        return self.source.place(episode)


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
