"""Actions for all video from few demonstrations: two frames Δ apart -> the actions between them.

    python -m hlrp.inverse --data 'metaworld:mt10?episodes=100' --demonstrations 5 --output-dir outputs/inverse
    python finetune_policy.py --pseudo-actions outputs/inverse --demonstrations 5 ...

    laq      small networks on a LAQ's latent action and on the first frame (LAPO+, arXiv:2602.02762)
    pca      the same networks on principal components of the pixels, which need no learning
    pixels   a transformer that sees the two frames and learns from the demonstrations alone (VPT, arXiv:2206.11795)

pca and pixels are the rivals that latent actions have to beat. An action is the mean of what all pairs around it say.
Writes actions.safetensors, one row for each frame of each episode in their order, and inverse.json, which names the
data and says how good the actions are on held-out episodes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm, trange

from hlrp.checkpoints import save_tensors, whole_folder, write_json
from hlrp.cli import tell_mistakes
from hlrp.clips import Clips, read_frames
from hlrp.contract import Indices, Source, Stream, choose_demonstrations, split_episodes
from hlrp.data import Mixture, action_statistics, loader
from hlrp.laq import LAQ, standardise
from hlrp.metrics import few_shot, principal_axes, r2_per_dim
from hlrp.optimizers import cosine_lr, make_optimizer, set_lr
from hlrp.sources import open_source, parse_uri
from hlrp.training import seed_step
from hlrp.transformer import Block, Transformer, patchify

ACTIONS, FACTS = "actions.safetensors", "inverse.json"
NUM_COMPONENTS = 32  # of the first frame, and with pca of the change
NUM_EPISODES = 256  # whose frames the components are found in


@dataclass
class Args:
    data: str  # a source with actions, as for train_laq.py
    output_dir: Path  # folder to write; it must not exist yet
    features: Literal["laq", "pca", "pixels"] = "laq"  # what the actions are read from
    # with --features laq: checkpoint of stage 1
    laq: Path = Path("outputs/laq/checkpoints/last/pretrained_model")
    # time between the two frames [s]; None: that of the LAQ, or 0.2
    delta: float | None = None
    demonstrations: int = 5  # episodes of each task whose actions are learned
    val_fraction: float = 0.1  # share of the episodes that is held out; take the one of finetune_policy.py
    seed: int = 0  # of the split, the demonstrations and the training; take the one of finetune_policy.py
    image_size: int = 64  # with pca and pixels: side of the frames that the model sees [pixel]
    shuffle_latents: bool = False  # with laq and pca, a control: give each pair the latent action of another one

    steps: int = 600  # with --features pixels: optimizer steps of the training
    batch_size: int = 32  # with --features pixels: pairs of frames in an optimizer step
    lr: float = 3e-3  # with --features pixels: highest learning rate
    num_workers: int = 0  # processes that load data; 0: this one


class InverseModel(nn.Module):
    """Predicts the actions (b, t, a) between two frames, uint8 (b, 2, c, h, w)."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_size: int,
        action_dim: int,
        num_steps: int,
        num_views: int = 1,
        patch_size: int = 8,
        dim: int = 128,
        depth: int = 4,
    ):
        """num_steps: actions between the two frames. num_views: cameras in a frame, one below the other."""
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size}; expected a multiple of {patch_size}")
        self.image_size, self.patch_size, self.num_steps = image_size, patch_size, num_steps
        self.from_patches = nn.Linear(6 * patch_size**2, dim)
        self.query = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        side = image_size // patch_size
        self.transformer = Transformer(dim, depth, 4, (num_views * side, side))
        self.to_actions = nn.Linear(dim, num_steps * action_dim)
        self.register_buffer("mean", torch.zeros(action_dim))
        self.register_buffer("std", torch.ones(action_dim))

    def standardised(self, frames: Tensor) -> Tensor:
        """The actions (b, t, a) in standard deviations from their mean."""
        images = standardise(frames)  # b 2 c h w
        first_and_change = torch.cat([images[:, 0], images[:, 1] - images[:, 0]], dim=1)  # b (2 c) h w
        patches = self.from_patches(patchify(first_and_change, self.patch_size))  # b n d
        query = self.query.expand(len(frames), -1, -1)  # b 1 d
        return self.to_actions(self.transformer(patches, prefix=query)[:, 0]).unflatten(1, (self.num_steps, -1))

    def forward(self, batch: dict) -> tuple[Tensor, dict]:
        target = (batch["action"] - self.mean) / self.std  # b t a
        return F.mse_loss(self.standardised(batch["frames"]), target), {}

    @torch.no_grad()
    def label(self, frames: Tensor) -> Tensor:
        """uint8 (t, c, h, w) -> the actions (pairs, n, a) between all frames that lie n steps apart."""
        if len(frames) <= self.num_steps:
            return torch.zeros(0, self.num_steps, len(self.mean))
        pairs = torch.stack([frames[: -self.num_steps], frames[self.num_steps :]], dim=1)
        return torch.cat([self.standardised(part) for part in pairs.split(64)]) * self.std + self.mean


def main(args: Args) -> None:
    check(args)
    source = open_source(parse_uri(args.data).uri)
    if isinstance(source, Stream):
        raise ValueError(f"{source.uri} is a stream; make a source with python -m hlrp.shards --data '{source.uri}'")
    if not source.action_dim:
        raise ValueError(
            f"data={args.data} has no actions; expected a source with actions, from which an inverse model learns"
        )
    laq = LAQ.from_pretrained(args.laq).requires_grad_(False) if args.features == "laq" else None
    train, val = split_episodes(source, args.val_fraction, args.seed)
    infer(args, source, laq, train, val, choose_demonstrations(source, train, args.demonstrations, args.seed))


def infer(
    args: Args, source: Source, laq: LAQ | None, train: np.ndarray, val: np.ndarray, demonstrations: np.ndarray
) -> None:
    """Writes the actions of all episodes of a source, learned from its demonstrations.

    args: without those that the others stand for."""
    delta = args.delta or (laq.config.delta if laq else 0.2)
    if laq and delta != laq.config.delta:
        raise ValueError(f"delta={delta}, but laq={args.laq} has {laq.config.delta}; leave it out")
    num_views = 1 + len(source.views) if laq is None else laq.num_views
    num_steps = actions_between(source, delta)
    if source.lengths[val].max() <= num_steps:
        raise ValueError(
            f"data={args.data}: no held-out episode lasts {delta:g} s; expected a larger --val-fraction "
            "or a smaller --delta"
        )
    if args.features == "pixels":
        label = learned(args, source, demonstrations, delta, num_steps, num_views)
        pairs = [label(frames_of(source, i, args.image_size, num_views)) for i in every_episode(source)]
    else:
        pairs = read_off(args, source, laq, train, demonstrations, num_steps, num_views)
    mean = torch.cat([source.actions(int(i), np.arange(int(source.lengths[i]))) for i in demonstrations]).mean(0)
    labels = [actions_of(part, int(source.lengths[i]), mean) for i, part in enumerate(pairs)]

    truth = [source.actions(int(i), np.arange(int(source.lengths[i]) - 1)) for i in val]
    score = r2_per_dim(torch.cat([labels[i][:-1] for i in val]), torch.cat(truth))
    between = [part.unfold(0, num_steps, 1).mean(-1) for part in truth if len(part) >= num_steps]  # pairs a
    over_delta = r2_per_dim(torch.cat([pairs[i].mean(1) for i in val if len(pairs[i])]), torch.cat(between))
    with whole_folder(args.output_dir) as folder:
        save_tensors(folder / ACTIONS, {"actions": torch.cat(labels)})
        facts = {
            "fingerprint": source.fingerprint,
            "demonstrations": demonstrations.tolist(),
            "laq": laq and laq.fingerprint,
            "action_r2": float(score.mean()),
            "action_r2_per_dim": score.tolist(),
            "mean_action_r2": float(over_delta.mean()),  # of the mean action between two frames
            "mean_action_r2_per_dim": over_delta.tolist(),
        }
        write_json(folder / FACTS, facts | {"args": json.loads(json.dumps(asdict(args), default=str))})
    print(
        f"{args.output_dir}: actions of {len(source.lengths)} episodes; R2 on held-out ones {score.mean():.2f}, of the "
        f"mean action over {delta:g} s {over_delta.mean():.2f}"
    )


def check(args: Args) -> None:
    if args.output_dir.exists():
        raise ValueError(f"output_dir={args.output_dir} exists already; delete it or choose another folder")
    for name in ("demonstrations", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}; expected 1 or more")
    if args.delta is not None and args.delta <= 0:
        raise ValueError(f"delta={args.delta}; expected a positive number of seconds")


def actions_between(source: Source, delta: float) -> int:
    """The number of actions between two frames that lie delta [s] apart. Raises ValueError where it differs."""
    numbers = np.unique(np.maximum(np.rint(source.fps * delta), 1).astype(int))
    if len(numbers) > 1:
        raise ValueError(
            f"{source.uri} has episodes of {source.fps.min():g} to {source.fps.max():g} frames a second; expected one "
            "rate, since the actions between two frames are learned together"
        )
    return int(numbers[0])


def every_episode(source: Source) -> Iterable[int]:
    return tqdm(range(len(source.lengths)), unit="episode", disable=None)


def frames_of(source: Source, episode: int, size: int, num_views: int) -> Tensor:
    """uint8 (t, c, num_views * size, size)"""
    return read_frames(source, episode, np.arange(source.lengths[episode]), size, num_views)


def learned(
    args: Args, source: Source, demonstrations: np.ndarray, delta: float, num_steps: int, num_views: int
) -> Callable[[Tensor], Tensor]:
    """Trains the model of pixels and returns its `label`."""
    clips = Clips(source, demonstrations, (0.0, delta), args.image_size, chunk_size=num_steps, num_views=num_views)
    torch.manual_seed(args.seed)
    model = InverseModel(args.image_size, source.action_dim, num_steps, num_views)
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
    return model.eval().label


def read_off(
    args: Args,
    source: Source,
    laq: LAQ | None,
    train: np.ndarray,
    demonstrations: np.ndarray,
    num_steps: int,
    num_views: int,
) -> list[Tensor]:
    """The actions (pairs, n, a) between the frames of each episode, by networks on features of all pairs."""
    size = args.image_size if laq is None else laq.image_size
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if laq is not None:
        laq.to(device)
    chosen = np.random.default_rng(0).permutation(train)[:NUM_EPISODES].tolist()
    sample = [pixels(frames_of(source, i, size, num_views)) for i in chosen]
    to_first = principal_axes(torch.cat(sample), NUM_COMPONENTS)
    to_change = None
    if laq is None:
        moves = torch.cat([part[num_steps:] - part[:-num_steps] for part in sample if len(part) > num_steps])
        to_change = principal_axes(moves, NUM_COMPONENTS)

    changes, firsts = [], []  # of each episode: (pairs, d)
    for episode in every_episode(source):
        frames = frames_of(source, episode, size, num_views)
        flat, num_pairs = pixels(frames), max(len(frames) - num_steps, 0)
        if to_change is not None:
            changes.append(to_change(flat[len(flat) - num_pairs :] - flat[:num_pairs]))
        elif laq is not None:
            observed = (laq.observe(part[None].to(device)) for part in frames.split(64))
            embedded = torch.cat([laq.embed(part)[0] for part in observed])  # t n d
            pairs = zip(embedded[:num_pairs].split(64), embedded[len(flat) - num_pairs :].split(64), strict=True)
            changes.append(torch.cat([laq.between(*pair).vectors.flatten(1) for pair in pairs]).cpu())
        firsts.append(to_first(flat[:num_pairs]))
    lengths = [len(part) for part in firsts]
    change = torch.cat(changes)
    if args.shuffle_latents:
        change = change[torch.randperm(len(change), generator=torch.Generator().manual_seed(args.seed))]
    features = torch.cat([change, torch.cat(firsts)], dim=1)

    of_episode = features.split(lengths)
    inputs = [of_episode[i] for i in demonstrations]
    actions = [source.actions(int(i), np.arange(int(source.lengths[i]) - 1)) for i in demonstrations]
    between = [part.unfold(0, num_steps, 1).movedim(-1, 1).flatten(1) for part in actions if len(part) >= num_steps]
    predicted = few_shot(torch.cat(inputs), torch.cat(between), features, args.seed).float()
    return list(predicted.unflatten(1, (num_steps, -1)).split(lengths))


def pixels(frames: Tensor) -> Tensor:
    """uint8 (t, c, h, w) -> (t, c h w)."""
    return standardise(frames).flatten(1)


def actions_of(pairs: Tensor, length: int, mean: Tensor) -> Tensor:
    """The actions (length, a) of an episode: for each frame the mean of what the pairs (p, n, a) that hold it say. The
    last frame repeats the action before it. An episode without a pair gets the mean action (a,)."""
    if not len(pairs):
        return mean.repeat(length, 1)
    num_pairs, num_steps, _ = pairs.shape
    place = torch.arange(num_pairs)[:, None] + torch.arange(num_steps)  # pairs n
    total = torch.zeros(length, pairs.shape[2]).index_add_(0, place.flatten(), pairs.flatten(0, 1))
    count = torch.zeros(length).index_add_(0, place.flatten(), torch.ones(place.numel()))
    actions = total[:-1] / count[:-1, None]
    return torch.cat([actions, actions[-1:]])


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
        self.lengths, self.fps, self.uneven, self.crop = source.lengths, source.fps, source.uneven, source.crop
        self.action_dim, self.state_dim, self.latent_space = source.action_dim, source.state_dim, source.latent_space

    def actions(self, episode: int, indices: Indices) -> Tensor:
        if episode in self.demonstrations:
            return self.source.actions(episode, indices)
        return self.pseudo_actions[episode][torch.as_tensor(np.asarray(indices))]

    def read(self, episode: int, indices: Indices) -> dict:
        return self.source.read(episode, indices)

    def instructions(self, episode: int, indices: Indices) -> list[str]:
        return self.source.instructions(episode, indices)

    def states(self, episode: int, indices: Indices) -> Tensor:
        return self.source.states(episode, indices)

    def labels(self, episode: int, indices: Indices) -> dict[str, Tensor]:
        return self.source.labels(episode, indices)

    def place(self, episode: int) -> str:
        return self.source.place(episode)


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
