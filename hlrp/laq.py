"""LAQ: a quantised latent action, the change between two frames that lie delta seconds apart.

Latent action pretraining: LAPA (Ye et al. 2024, arXiv:2410.11758), Genie (Bruce et al. 2024, arXiv:2402.15391).

    change = encode(o[t + delta]) - encode(o[t])         each frame encoded once, alone
    codes  = quantize(read(change))                      num_tokens queries read it: the latent action
    loss   = |decode(o[t], codes) - target(o[t + delta])|^2 + quantizer loss

The decoder sees the first frame through layers of its own, so only the codes tell it about the future. A frame of
several cameras is their squares one below the other: one latent action tells what changes in all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tyro.conf import Fixed, Suppress

from hlrp.checkpoints import Frozen, load_config, load_weights, save_pretrained, weights_hash
from hlrp.quantizers import QuantizerName, make_quantizer
from hlrp.transformer import ActionReadout, Transformer, patchify, unpatchify

if TYPE_CHECKING:
    from hlrp.backbones import FlowTeacher, FrozenEncoder, TextEncoder


class Decoder(nn.Module):
    """Predicts the change of each patch from the first frame and the codes, for each target; it starts from zero.

    The codes scale and shift what every block reads (FiLM, Perez et al. 2017, arXiv:1709.07871; in a transformer:
    Peebles and Xie 2022, arXiv:2212.09748, Sec. 3.2). Context tokens stand before the patches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int,
        num_tokens: int,
        grid: tuple[int, int],
        inputs: dict[str, int],
        outputs: dict[str, int],
    ):
        """inputs, outputs: name -> numbers per patch."""
        super().__init__()
        self.from_codes = nn.Linear(num_tokens * dim, dim)
        self.to_modulations = nn.ModuleList(nn.Linear(dim, 4 * dim, bias=False) for _ in range(depth))
        self.from_inputs = nn.ModuleDict({name: nn.Linear(size, dim) for name, size in inputs.items()})
        self.transformer = Transformer(dim, depth, num_heads, grid)
        heads = {name: nn.Linear(dim, size) for name, size in outputs.items()}
        for head in heads.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.to_outputs = nn.ModuleDict(heads)

    def forward(self, inputs: dict[str, Tensor], codes: Tensor, context: Tensor | None) -> dict[str, Tensor]:
        patches = sum(layer(inputs[name]) for name, layer in self.from_inputs.items())  # b n d
        condition = self.from_codes(codes.flatten(1))  # b n d -> b d
        modulations = [layer(condition)[:, None] for layer in self.to_modulations]  # b 1 (4 d) each
        patches = patches + condition[:, None]
        hidden = self.transformer(patches, context, modulations)[:, -patches.shape[1] :]  # b n d, without the context
        return {name: head(hidden).float() for name, head in self.to_outputs.items()}  # b n output


class Size(NamedTuple):
    dim: int
    num_heads: int
    encoder_depth: int
    change_depth: int
    decoder_depth: int
    image_size: int  # [pixel]
    patch_size: int  # [pixel]


SIZES = {
    "tiny": Size(128, 4, 2, 2, 4, 64, 8),  # a CPU trains it in minutes
    "small": Size(384, 6, 6, 4, 6, 128, 16),
    "base": Size(1024, 16, 8, 8, 8, 256, 32),  # about the size of LAPA's
}


@dataclass
class LAQConfig:
    delta: float = 0.2  # time between the two frames of a pair [s]
    size: Literal["tiny", "small", "base"] = "tiny"  # width and depth: 2, 34 or 350 million parameters
    image_size: int | None = None  # height and width of a frame [pixel]; None: 64, 128 or 256 by --size
    patch_size: int | None = None  # height and width of a patch of the frame [pixel]; None: 8, 16 or 32 by --size
    num_views: Suppress[Fixed[int]] = 1  # cameras of a frame, set from the data
    # with several cameras: how often one of them shows no change in training, so that the others tell it
    view_dropout: float = 0.0

    num_tokens: int = 32  # discrete tokens per latent action
    codebook_size: int = 64  # codes that each token chooses from
    quantizer: QuantizerName = "fsq"  # how a token becomes one of the codes; gaussian and none are continuous

    features: str | None = None  # hub id or folder of a frozen image encoder: DINOv2, DINOv3, SigLIP2, V-JEPA 2
    encoder: Literal["pixels", "features"] = "pixels"  # what the latent action is encoded from
    pixel_weight: float = 1.0  # weight of the second frame's pixels as a target
    feature_weight: float = 0.0  # weight of the second frame's frozen --features as a target
    flow_weight: float = 0.0  # weight of the optical flow between the frames as a target
    flow_teacher: str = "C_T_V2"  # what computes the flow: weights of torchvision's RAFT-small, or a safetensors file
    flow_warmup_steps: int = 1000  # optimizer steps in which --flow-weight grows linearly from 0
    mean_flow_weight: float = 0.1  # weight of the frame's mean flow within the flow's loss

    action_weight: float = 0.0  # weight of the true actions as a target, where a sample has them
    # set from the data when action_weight > 0: dimensions of an action, and action spaces, one readout each
    action_dim: Suppress[Fixed[int]] = 0
    action_sources: Suppress[Fixed[int]] = 0

    language: str | None = None  # hub id or folder of a text encoder: the decoder then reads the instruction too
    # LAQ that was trained with --language: the decoder gets its codes too, so that new ones hold the rest
    task_irrelevant: str | None = None

    def resolved(self) -> "LAQConfig":
        """With the image and patch size that `size` stands for, where none are given."""
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r}; expected one of {', '.join(SIZES)}")
        size = SIZES[self.size]
        return replace(
            self,
            image_size=size.image_size if self.image_size is None else self.image_size,
            patch_size=size.patch_size if self.patch_size is None else self.patch_size,
        )

    def with_views(self, num_views: int) -> "LAQConfig":
        """For frames of so many cameras."""
        return replace(self, num_views=num_views)

    def with_actions(self, action_dim: int, action_sources: int) -> "LAQConfig":
        """With a readout of actions for each of so many sources, which `action_weight` > 0 needs."""
        return replace(self, action_dim=action_dim, action_sources=action_sources)


class Observed(NamedTuple):
    """Frames as the model reads them."""

    images: Tensor  # (b, t, c, h, w), standardised
    features: Tensor | None  # (b, t, n, f)


class LatentActions(NamedTuple):
    """Latent actions as the next stage learns them."""

    vectors: Tensor  # (..., num_tokens, e): in the e dimensions of the quantizer, see `LAQ.expand`
    indices: Tensor | None  # int64 (..., m), None if continuous

    def map(self, change: Callable[[Tensor], Tensor]) -> "LatentActions":
        """The same change of both."""
        return LatentActions(change(self.vectors), None if self.indices is None else change(self.indices))


def standardise(frames: Tensor) -> Tensor:
    """uint8 frames to floats of about zero mean and unit variance."""
    return (frames.float() / 255 - 0.5) / 0.25


class LAQ(nn.Module):
    """Latent action quantizer. `forward(batch) -> (loss, metrics)` trains it; `encode` and `decode` use it.

    image_size: height and width of a camera's frame [pixel];  patch_size: of a patch [pixel]
    num_views: cameras in a frame, which is h = num_views * image_size high and w = image_size wide
    grid: rows and columns of patches in a frame
    """

    features: "Frozen[FrozenEncoder] | None"
    flow_teacher: "Frozen[FlowTeacher] | None"
    text_encoder: "Frozen[TextEncoder] | None"
    irrelevant: "Frozen[LAQ] | None"

    def __init__(self, config: LAQConfig):
        super().__init__()
        self.config = config = config.resolved()
        assert config.image_size is not None and config.patch_size is not None
        size, image_size = SIZES[config.size], config.image_size
        weights = {"pixels": config.pixel_weight, "features": config.feature_weight, "flow": config.flow_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        check(config, self.weights)

        self.features = self.flow_teacher = self.text_encoder = self.irrelevant = None
        patch_size, grid = config.patch_size, (image_size // config.patch_size, image_size // config.patch_size)
        self.num_views = config.num_views
        inputs = {"pixels": 3 * patch_size**2}
        outputs = {"pixels": 3 * patch_size**2, "flow": 2 * patch_size**2}
        if config.features:
            from hlrp.backbones import FrozenEncoder

            encoder = FrozenEncoder(config.features)
            self.features = Frozen(encoder)
            inputs["features"] = outputs["features"] = encoder.dim
            grid = encoder.grid
            patch_size = image_size // grid[0]
            if (patch_size * grid[0], patch_size * grid[1]) != (image_size, image_size):
                raise ValueError(
                    f"image_size={image_size} is no multiple of the {grid[0]} x {grid[1]} patches of "
                    f"features={config.features!r}; expected for example {14 * grid[0]} or {16 * grid[0]}"
                )
            inputs["pixels"] = outputs["pixels"] = 3 * patch_size**2
            outputs["flow"] = 2 * patch_size**2
        grid = (self.num_views * grid[0], grid[1])
        self.image_size, self.patch_size, self.grid = image_size, patch_size, grid

        self.from_input = nn.Linear(inputs[config.encoder], size.dim)
        self.encoder = Transformer(size.dim, size.encoder_depth, size.num_heads, grid)
        self.to_change = nn.Linear(size.dim, size.dim, bias=False)
        self.no_change = nn.Parameter(torch.randn(size.dim))  # a patch that stays; changes add to it
        self.change = Transformer(size.dim, size.change_depth, size.num_heads, grid)
        self.queries = nn.Parameter(torch.randn(config.num_tokens, size.dim) * size.dim**-0.5)  # become the codes
        self.quantizer = make_quantizer(config.quantizer, size.dim, config.codebook_size, config.num_tokens)
        predicted = {name: outputs[name] for name in self.weights}
        depth, num_tokens = size.decoder_depth, config.num_tokens
        self.decoder = Decoder(size.dim, size.num_heads, depth, num_tokens, grid, inputs, predicted)

        if config.action_weight:
            latent_dim = config.num_tokens * size.dim
            self.to_action = ActionReadout(latent_dim, config.action_sources, config.action_dim)
        if config.language:
            from hlrp.backbones import TextEncoder

            text_encoder = TextEncoder(config.language)
            self.text_encoder = Frozen(text_encoder)
            self.from_text = nn.Linear(text_encoder.dim, size.dim)
        if config.task_irrelevant:
            irrelevant = LAQ.from_pretrained(config.task_irrelevant)
            self.irrelevant = Frozen(irrelevant)
            self.from_irrelevant = nn.Linear(SIZES[irrelevant.config.size].dim, size.dim)

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: frames uint8 (b, 2, c, h, w); action (b, chunk, a) with action_is_pad and source where
        action_weight is set; task (list of b) where language is; step (optimizer step, for the flow's warm-up)."""
        frames = batch["frames"]  # b 2 c h w
        observed = self.observe(frames)
        first, second = self.embed(observed).unbind(1)  # b n d each
        if self.training and self.config.view_dropout:
            second = self.without_one_view(first, second)
        codes, _, quantizer_loss = self.quantizer(self.latents(first, second))  # b tokens d
        predictions = self.decoder(self.inputs(observed), codes, self.context(frames, batch.get("task")))  # b n output
        targets = self.targets(observed, frames)  # b n output

        loss, metrics = quantizer_loss, {"quantizer_loss": quantizer_loss.detach()}
        for name, weight in self.weights.items():
            term = self.term(name, predictions[name], targets[name])
            if name == "flow":
                weight = weight * min(1.0, (batch["step"] + 1) / max(1, self.config.flow_warmup_steps))
            loss = loss + weight * term
            metrics[f"{name}_loss"] = term.detach()
        if self.config.action_weight:
            term = self.to_action.loss(codes.flatten(1), batch)
            loss = loss + self.config.action_weight * term
            metrics["action_loss"] = term.detach()
        return loss, metrics

    @torch.no_grad()
    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """frames uint8 (b, 2, c, h, w) -> codes (b, num_tokens, d), indices int64 (b, num_tokens), None if continuous.

        Deterministic in evaluation mode.
        """
        actions = self.label(frames)
        return self.expand(actions.vectors[:, 0]), None if actions.indices is None else actions.indices[:, 0]

    @torch.no_grad()
    def label(self, frames: Tensor) -> LatentActions:
        """frames uint8 (b, t, c, h, w), delta apart -> the latent actions (b, t - 1, ...) between them.

        Each frame is encoded once, and nothing is decoded.
        """
        return self.between_all(self.embed(self.observe(frames)))

    @torch.no_grad()
    def between_all(self, embedded: Tensor) -> LatentActions:
        """The latent actions (b, t - 1, ...) between embedded frames (b, t, n, d)."""
        actions = self.between(embedded[:, :-1].flatten(0, 1), embedded[:, 1:].flatten(0, 1))
        return actions.map(lambda x: x.unflatten(0, (len(embedded), -1)))

    @torch.no_grad()
    def between(self, first: Tensor, second: Tensor) -> LatentActions:
        """The latent actions (b, ...) between embedded frames (b, n, d)."""
        vectors, indices, _ = self.quantizer.quantize(self.latents(first, second))
        return LatentActions(vectors, indices)

    def expand(self, vectors: Tensor) -> Tensor:
        """Vectors (..., num_tokens, e), as `label` gives them -> codes (..., num_tokens, d), as `decode` reads them."""
        return self.quantizer.expand(vectors)

    @torch.no_grad()
    def decode(
        self, first: Tensor, codes: Tensor, task: list[str] | None = None, second: Tensor | None = None
    ) -> dict[str, Tensor]:
        """first uint8 (b, c, h, w), codes (b, num_tokens, d) -> the predicted second frame by target:
        pixels (b, c, h, w) in [0, 1], features (b, n, f), flow (b, 2, h, w) [pixel].

        second: the frame from which the task-irrelevant codes are read, where the LAQ has such codes (default: the
        first frame, so they say that nothing changes). Other LAQs ignore it.
        """
        frames = torch.stack([first, first if second is None else second], dim=1)
        observed = self.observe(frames)
        predictions = self.decoder(self.inputs(observed), codes, self.context(frames, task))
        return {name: self.picture(name, predictions[name], observed) for name in self.weights}

    @torch.no_grad()
    def errors(
        self, frames: Tensor, variants: Sequence[Tensor | None], task: list[str] | None = None
    ) -> list[dict[str, Tensor]]:
        """Mean squared error (b,) of each target, for each variant of the codes; None is a copy of the first frame."""
        observed = self.observe(frames)
        targets, inputs, context = (self.targets(observed, frames), self.inputs(observed), self.context(frames, task))
        nothing = {name: torch.zeros_like(target) for name, target in targets.items()}
        errors = []
        for codes in variants:
            predictions = nothing if codes is None else self.decoder(inputs, codes, context)
            squares = {name: (predictions[name] - targets[name]).square() for name in targets}
            errors.append({name: square.flatten(1).mean(1) for name, square in squares.items()})
        return errors

    def observe(self, frames: Tensor) -> Observed:
        expected = (3, self.num_views * self.image_size, self.image_size)
        if frames.ndim != 5 or frames.shape[2:] != expected or frames.dtype != torch.uint8:
            raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}; expected uint8 (b, t, {expected})")
        features = None
        if self.features is not None:
            features = self.features(rearrange(frames, "b t c (v h) w -> (b t v) c h w", v=self.num_views))
            features = rearrange(features, "(b t v) n f -> b t (v n) f", b=len(frames), v=self.num_views)
        return Observed(standardise(frames), features)

    def embed(self, observed: Observed) -> Tensor:
        """Encodes each frame by itself: (b, t, n, d)."""
        if self.config.encoder == "features":
            patches = rearrange(observed.features, "b t n f -> (b t) n f")
        else:
            patches = patchify(rearrange(observed.images, "b t c h w -> (b t) c h w"), self.patch_size)
        encoded = self.encoder(self.from_input(patches))
        return rearrange(encoded, "(b t) n d -> b t n d", b=len(observed.images))

    def latents(self, first: Tensor, second: Tensor) -> Tensor:
        """The change between two embedded frames (b, n, d), before quantisation: (b, num_tokens, d)."""
        change = self.no_change + self.to_change(second - first)
        queries = self.queries.expand(len(change), -1, -1)  # n d -> b n d
        return self.change(change, prefix=queries)[:, : self.config.num_tokens]

    def without_one_view(self, first: Tensor, second: Tensor) -> Tensor:
        """The second of two embedded frames (b, n, d), in some samples with one view of the first."""
        shape = (len(first), self.num_views, 1, 1)
        view = torch.randint(self.num_views, (len(first),), device=first.device)
        is_hidden = F.one_hot(view, self.num_views).bool().view(shape)
        is_hidden = is_hidden & (torch.rand(len(first), 1, 1, 1, device=first.device) < self.config.view_dropout)
        by_view = "b (v n) d -> b v n d"
        kept = torch.where(is_hidden, *(rearrange(x, by_view, v=self.num_views) for x in (first, second)))
        return kept.flatten(1, 2)

    def inputs(self, observed: Observed) -> dict[str, Tensor]:
        """The first frame as the decoder reads it: name -> (b, n, input)."""
        inputs = {"pixels": patchify(observed.images[:, 0], self.patch_size)}
        if observed.features is not None:
            inputs["features"] = observed.features[:, 0]
        return inputs

    def context(self, frames: Tensor, task: list[str] | None) -> Tensor | None:
        """Tokens (b, m, d) that the decoder reads beside the first frame and the codes; None where there are none."""
        context = []
        if self.text_encoder is not None:
            features, mask = self.text_encoder(task)
            context.append(self.from_text(features) * mask[..., None])
        if self.irrelevant is not None:
            given, _ = self.irrelevant.module.encode(frames)
            context.append(self.from_irrelevant(given))
        return torch.cat(context, dim=1) if context else None

    def targets(self, observed: Observed, frames: Tensor) -> dict[str, Tensor]:
        """The targets (b, n, output) of each patch: the change of pixels, the change of features, the flow."""
        targets = {}
        if "pixels" in self.weights:
            targets["pixels"] = patchify(observed.images[:, 1] - observed.images[:, 0], self.patch_size)
        if "features" in self.weights:
            assert observed.features is not None
            targets["features"] = (observed.features[:, 1] - observed.features[:, 0]).float()
        if "flow" in self.weights:
            targets["flow"] = patchify(self.flow(frames) / self.patch_size, self.patch_size)
        return targets

    def flow(self, frames: Tensor) -> Tensor:
        """The teacher's optical flow (b, 2, h, w) [pixel]. The teacher is loaded here: encoding does not need it."""
        if self.flow_teacher is None:
            from hlrp.backbones import FlowTeacher

            self.flow_teacher = Frozen(FlowTeacher(self.config.flow_teacher)).to(frames.device)
        flow = self.flow_teacher(rearrange(frames, "b t c (v h) w -> (b v) t c h w", v=self.num_views))
        return rearrange(flow, "(b v) c h w -> b c (v h) w", v=self.num_views)

    def term(self, name: str, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of one target, a scalar."""
        if name == "flow":
            from hlrp.backbones import flow_loss

            flow, true_flow = (unpatchify(x, self.patch_size, self.grid) for x in (prediction, target))
            return flow_loss(flow, true_flow, self.config.mean_flow_weight).mean()
        return (prediction - target).square().mean()

    def picture(self, name: str, prediction: Tensor, observed: Observed) -> Tensor:
        """A prediction per patch in the units of its target."""
        if name == "features":
            assert observed.features is not None
            return observed.features[:, 0] + prediction
        picture = unpatchify(prediction, self.patch_size, self.grid)
        if name == "flow":
            return picture * self.patch_size
        return ((observed.images[:, 0] + picture) * 0.25 + 0.5).clamp(0, 1)

    def save_pretrained(self, folder: Path, weights: dict[str, Tensor] | None = None, **provenance) -> None:
        """config.json + model.safetensors; `provenance` (data, report, step) goes into the config."""
        config = {"type": "laq", "hlrp_version": version("lerobot_policy_hlrp"), "laq": asdict(self.config)}
        config["frozen"] = self.fingerprints()
        save_pretrained(folder, self, config | provenance, weights)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "LAQ":
        """Rebuilds a model, in evaluation mode, from its checkpoint folder.

        Raises ValueError where the folder is not a LAQ's, where a tensor is missing or unexpected, and where the frozen
        features are not the ones it was trained with.
        """
        config = load_config(folder, "laq", LAQConfig)
        if (quantizer := config["laq"]["quantizer"]) in ("simvq", "lfq", "bsq", "residual-vq"):
            dropped = f"quantizer {quantizer!r} of hlrp 0.1.0 is no longer offered"
            raise ValueError(f"{folder}: {dropped}; hlrp 0.1.0 reads it")
        model = cls(LAQConfig(**config["laq"]))
        load_weights(folder, model)
        for name, fingerprint in model.fingerprints().items():
            if fingerprint != config["frozen"][name]:
                raise ValueError(
                    f"{name} of {folder} has changed: {fingerprint}, trained with {config['frozen'][name]}"
                )
        return model.eval()

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the frozen parts, which no checkpoint holds."""
        frozen = {"features": self.features, "language": self.text_encoder, "task_irrelevant": self.irrelevant}
        return {name: wrapper.module.fingerprint for name, wrapper in frozen.items() if wrapper is not None}

    @property
    def fingerprint(self) -> str:
        """A hash of all that its latent actions depend on; the paths of its frozen parts do not count. A setting that a
        version has added does not count where it says what was so before: older checkpoints keep their hash."""
        config = asdict(self.config)
        for place in ("features", "language", "task_irrelevant", "flow_teacher"):
            del config[place]
        for name, before in ADDED.items():
            if config[name] == before:
                del config[name]
        return weights_hash(self, config, self.fingerprints())


ADDED = {"num_views": 1, "view_dropout": 0.0}  # settings that came after others, and what was so before


def check(config: LAQConfig, weights: dict[str, float]) -> None:
    """Raises ValueError for settings that contradict each other."""
    assert config.image_size is not None and config.patch_size is not None  # resolved
    if config.image_size % config.patch_size:
        raise ValueError(f"image_size={config.image_size}; expected a multiple of patch_size={config.patch_size}")
    if config.num_tokens < 1:
        raise ValueError(f"num_tokens={config.num_tokens}; expected 1 or more")
    if not 0 <= config.view_dropout < 1:
        raise ValueError(f"view_dropout={config.view_dropout}; expected 0 or more, and less than 1")
    if config.view_dropout and config.num_views == 1:
        raise ValueError(f"view_dropout={config.view_dropout} with one camera; expected several, as by ?camera=A,B")
    if config.delta <= 0:
        raise ValueError(f"delta={config.delta}; expected a positive number of seconds")
    if not weights:
        raise ValueError("pixel_weight, feature_weight and flow_weight are all 0: there is nothing to predict")
    if min(weights.values()) < 0:
        raise ValueError(f"weights of the targets are {weights}; expected no negative one")
    if config.features is None and (config.encoder == "features" or "features" in weights):
        raise ValueError("encoder='features' and feature_weight need features=HUB_ID_OR_FOLDER")
    if config.language and config.task_irrelevant:
        raise ValueError("language and task_irrelevant are the first and the second run of the split: give one")
    if config.action_weight and not config.action_dim:
        raise ValueError(f"action_weight={config.action_weight}, but no source in the data has actions")
