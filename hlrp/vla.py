"""VLA: a vision-language model that predicts the next latent actions from the image and the instruction.

Latent action pretraining of a VLA: LAPA (Ye et al. 2024, arXiv:2410.11758, Sec. 3.2), UniVLA (Bu et al. 2025,
arXiv:2505.06111). A head turns hidden states into latent actions; a new one is one class here and one line of `HEADS`.

    tokens    codes, one after another, each given the codes before it
    parallel  codes, all at once: a query for each stands behind the prompt (OpenVLA-OFT, arXiv:2502.19645)
    flow      vectors, by flow matching: an expert reads the prompt (pi0, arXiv:2410.24164)
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tyro.conf import Fixed, Suppress

from hlrp.action_expert import ActionExpert, ExpertBlock, mean_over_steps
from hlrp.checkpoints import load_config, load_weights, save_pretrained
from hlrp.images import regrid
from hlrp.quantizers import RunningNorm
from hlrp.transformer import ActionReadout, masked_mean
from hlrp.vlm import VLM, Encoded, VLMConfig

NUM_DRAWS = 16  # sequences of codes that an expectation is estimated from
POINT_BINS = 8  # into which each axis of the image is divided


@dataclass
class LatentSpace:
    """The latent actions of stage 1."""

    delta: float  # time that a latent action spans [s]
    num_tokens: int  # indices of a latent action, 0 where it is continuous
    codebook_size: int  # values of an index
    vector_dim: int  # dimensions of a latent action as a vector
    image_size: int  # of the frames that the LAQ reads [pixel]
    fingerprint: str  # of the LAQ
    num_views: int = 1  # cameras in these frames


class Predicted(NamedTuple):
    """Latent actions (b, chunk_size, ...) that a head predicts: its codes, or its vectors."""

    indices: Tensor | None  # int64 (b, t, m)
    vectors: Tensor | None  # (b, t, e)


class Scored(NamedTuple):
    """How well a head predicts the true latent actions."""

    errors: Tensor  # (b,): the loss of each sample
    prompt: Encoded  # the VLM's hidden states of images and instruction; no latent action has reached them
    metrics: dict[str, Tensor]
    queries: Encoded | None = None  # and those from which a head reads its codes, where no latent action reaches them


class Head(nn.Module):
    """What a head provides: `forward` scores the true latent actions `latents` (batch[self.target]), `generate` draws
    latent actions, and `expected` gives their mean. Each calls the VLM by itself, as it needs it."""

    target = "latent_indices"  # or "latent_vectors"

    def forward(self, vlm: VLM, images: Tensor, tasks: Sequence[str], latents: Tensor, is_pad: Tensor | None) -> Scored:
        """images uint8 (b, v, c, h, w), b tasks, latents (b, t, m) or (b, t, e), is_pad bool (b, t)."""
        raise NotImplementedError

    def generate(self, vlm: VLM, images: Tensor, tasks: Sequence[str], temperature: float) -> Predicted:
        """See `VLA.generate`."""
        raise NotImplementedError

    def expected(self, vlm: VLM, images: Tensor, tasks: Sequence[str]) -> Tensor:
        """See `VLA.expected`."""
        raise NotImplementedError


class CodeHead(Head):
    """A row of weights for each code at each position of a latent action; no other code can be predicted there."""

    def __init__(self, dim: int, space: LatentSpace, config: "VLAConfig"):
        super().__init__()
        if not space.num_tokens:
            raise ValueError(f"head={config.head} predicts codes, and this LAQ has none; expected head=flow")
        self.num_tokens, self.chunk_size = space.num_tokens, config.chunk_size
        self.length = self.num_tokens * self.chunk_size
        self.rows = nn.Parameter(torch.randn(space.num_tokens, space.codebook_size, dim) * dim**-0.5)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (b, n, d) at the positions of codes -> (b, n, k); n may end within a latent action."""
        rows = self.rows.repeat(self.chunk_size, 1, 1)[: hidden.shape[1]]  # n k d
        return torch.einsum("bnd,nkd->bnk", hidden.float(), rows.float())

    def score(
        self, logits: Tensor, targets: Tensor, prompt: Encoded, is_pad: Tensor | None, vocab_size: int = 0
    ) -> Scored:
        """logits (b, n, v + k), of which the first vocab_size are words; targets (b, n); is_pad bool (b, t)."""
        labels = (targets + vocab_size).flatten()  # b n -> (b n)
        errors = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view_as(targets)  # b n
        hits = (logits[..., vocab_size:].argmax(-1) == targets).float()  # b n
        errors, hits = (x.unflatten(1, (self.chunk_size, -1)).mean(-1) for x in (errors, hits))  # b t
        accuracy = mean_over_steps(hits, is_pad).mean()
        return Scored(mean_over_steps(errors, is_pad), prompt, {"accuracy": accuracy})

    def unfold(self, x: Tensor) -> Tensor:
        """(b, (t m), ...) -> (b, t, m, ...)."""
        return x.unflatten(1, (self.chunk_size, self.num_tokens))


class TokensHead(CodeHead):
    """Autoregressive: next-token prediction at the positions of codes."""

    def __init__(self, dim: int, space: LatentSpace, config: "VLAConfig"):
        super().__init__(dim, space, config)
        self.in_vocabulary, self.code_dropout = config.token_rows == "vocabulary", config.code_dropout
        self.embeddings = nn.Parameter(torch.randn_like(self.rows) * 0.02)  # the scale of word embeddings

    def embed(self, indices: Tensor, first: int = 0) -> Tensor:
        """indices (b, n) at the positions first, first + 1, ... -> (b, n, d)."""
        places = (first + torch.arange(indices.shape[1], device=indices.device)) % self.num_tokens
        return self.embeddings[places, indices]

    def forward(self, vlm: VLM, images: Tensor, tasks: Sequence[str], latents: Tensor, is_pad: Tensor | None) -> Scored:
        targets = latents.flatten(1)  # b n
        suffix = self.embed(targets[:, :-1])  # b (n - 1) d
        if self.training and self.code_dropout:
            any_code = self.embeddings.mean(1).repeat(self.chunk_size, 1)[: self.length - 1]  # n d
            is_dropped = torch.rand(len(targets), 1, 1, device=suffix.device) < self.code_dropout
            suffix = torch.where(is_dropped, any_code, suffix)
        encoded = vlm(images, tasks, vlm.embed_scale * suffix)
        hidden, prompt = encoded.hidden[:, -self.length :], encoded.without(self.length - 1)  # b n d
        if not self.in_vocabulary:
            return self.score(self.logits(hidden), targets, prompt, is_pad)
        words = vlm.vocab_logits(hidden)  # b n v
        codes = torch.einsum("bnd,mkd->bnmk", hidden.float(), self.rows.float()).flatten(2)  # b n (m k)
        codes = vlm.cap_logits(codes)  # as the logits of words are
        place = torch.arange(self.length, device=targets.device) % self.num_tokens
        logits, targets = torch.cat([words, codes], dim=-1), targets + place * self.rows.shape[1]
        return self.score(logits, targets, prompt, is_pad, words.shape[-1])

    def generate(self, vlm: VLM, images: Tensor, tasks: Sequence[str], temperature: float) -> Predicted:
        indices, _ = self.continue_(vlm, vlm(images, tasks, use_cache=self.length > 1), temperature)
        return Predicted(self.unfold(indices), None)

    def expected(self, vlm: VLM, images: Tensor, tasks: Sequence[str]) -> Tensor:
        """The mean over sampled sequences. The likeliest sequence alone would tell little about the others."""
        encoded = vlm(images, tasks, use_cache=self.length > 1)
        num_draws = NUM_DRAWS if self.length > 1 else 1
        draws = [self.continue_(vlm, encoded, temperature=1.0)[1] for _ in range(num_draws)]
        return self.unfold(reduce(torch.add, draws) / num_draws)

    def continue_(self, vlm: VLM, encoded: Encoded, temperature: float) -> tuple[Tensor, Tensor]:
        """Codes int64 (b, n) that follow a prompt, and the probabilities (b, n, k) of each, given the codes before."""
        indices, probabilities = [], []
        for i in range(self.length):
            if i:
                encoded = vlm.extend(encoded, vlm.embed_scale * self.embed(indices[-1], i - 1))
            logits = encoded.hidden[:, -1:].float() @ self.rows[i % self.num_tokens].float().T  # b 1 k
            if self.in_vocabulary:
                logits = vlm.cap_logits(logits)
            indices.append(draw(logits, temperature))
            probabilities.append(logits.softmax(-1))
        return torch.cat(indices, dim=1), torch.cat(probabilities, dim=1)


class ParallelHead(CodeHead):
    """One query per code stands behind the prompt: a single forward pass."""

    def __init__(self, dim: int, space: LatentSpace, config: "VLAConfig"):
        super().__init__(dim, space, config)
        self.queries = nn.Parameter(torch.randn(self.length, dim) * 0.02)

    def encode(self, vlm: VLM, images: Tensor, tasks: Sequence[str]) -> Encoded:
        queries = vlm.embed_scale * self.queries.expand(len(images), -1, -1)  # n d -> b n d
        return vlm(images, tasks, queries)

    def forward(self, vlm: VLM, images: Tensor, tasks: Sequence[str], latents: Tensor, is_pad: Tensor | None) -> Scored:
        encoded = self.encode(vlm, images, tasks)
        queries = encoded.last(self.length)
        scored = self.score(self.logits(queries.hidden), latents.flatten(1), encoded.without(self.length), is_pad)
        return scored._replace(queries=queries)

    def generate(self, vlm: VLM, images: Tensor, tasks: Sequence[str], temperature: float) -> Predicted:
        logits = self.logits(self.encode(vlm, images, tasks).hidden[:, -self.length :])
        return Predicted(self.unfold(draw(logits, temperature)), None)

    def expected(self, vlm: VLM, images: Tensor, tasks: Sequence[str]) -> Tensor:
        return self.unfold(self.logits(self.encode(vlm, images, tasks).hidden[:, -self.length :]).softmax(-1))


class FlowHead(Head):
    """Flow matching on the vectors of latent actions, scaled to zero mean and unit variance over the data."""

    target = "latent_vectors"

    def __init__(self, dim: int, space: LatentSpace, config: "VLAConfig"):
        super().__init__()
        self.size, self.num_steps = (config.chunk_size, space.vector_dim), config.num_inference_steps
        self.num_draws = config.flow_draws
        self.norm = RunningNorm(space.vector_dim)
        self.expert = ActionExpert({"latent": space.vector_dim}, dim, config.expert_dim, config.expert_depth)

    def forward(self, vlm: VLM, images: Tensor, tasks: Sequence[str], latents: Tensor, is_pad: Tensor | None) -> Scored:
        targets = self.norm(latents.float().flatten(0, 1)).view(latents.shape)  # b t e
        encoded = vlm(images, tasks)
        context = self.expert.read(encoded.hidden, encoded.mask)
        errors = self.expert.errors("latent", targets, context, is_pad, self.num_draws)
        return Scored(errors, encoded, {})

    def generate(self, vlm: VLM, images: Tensor, tasks: Sequence[str], temperature: float) -> Predicted:
        encoded = vlm(images, tasks)
        noise = temperature * torch.randn(len(images), *self.size, device=encoded.hidden.device)
        context = self.expert.read(encoded.hidden, encoded.mask)
        return Predicted(None, self.norm.inverse(self.expert.sample("latent", noise, context, self.num_steps)))

    def expected(self, vlm: VLM, images: Tensor, tasks: Sequence[str]) -> Tensor:
        encoded = vlm(images, tasks)
        context = self.expert.read(encoded.hidden, encoded.mask)
        return self.norm.inverse(self.expert.mean("latent", (len(images), *self.size), context))


def draw(logits: Tensor, temperature: float) -> Tensor:
    """Draws indices (b, n) from logits (b, n, k); at temperature 0 the likeliest ones."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probabilities.flatten(0, 1), 1).view(logits.shape[:-1])


# name on the command line -> the head for (width of the VLM, latent space, config)
HEADS: dict[str, Callable[[int, LatentSpace, "VLAConfig"], Head]] = {
    "tokens": TokensHead,
    "parallel": ParallelHead,
    "flow": FlowHead,
}
if TYPE_CHECKING:
    HeadName = str
else:
    HeadName = Literal[*HEADS]  # the choices of --head


@dataclass
class VLAConfig:
    head: HeadName = "parallel"  # how the latent action leaves the model
    chunk_size: int = 1  # latent actions predicted, one after another in time
    # with --head tokens: a softmax over the codes alone, or over all words and codes
    token_rows: Literal["codes", "vocabulary"] = "codes"
    # with --head tokens: share of the training samples that predict each code without the codes before it
    # (word dropout, Bowman et al. 2016, arXiv:1511.06349), so that the model learns earlier to look and to read
    code_dropout: float = 0.0
    expert_dim: int = 256  # with --head flow: width of the expert
    expert_depth: int = 4  # with --head flow: transformer blocks of the expert
    num_inference_steps: int = 10  # with --head flow: integration steps of a prediction
    flow_draws: int = 4  # with --head flow: times and noises that each sample trains with in a step

    # weight of the LAQ's features of the image, which the image tokens predict; None: 1 for a tiny vlm, 0 for others
    feature_weight: float | None = None
    feature_dim: Suppress[Fixed[int]] = 0  # set from the LAQ when feature_weight > 0

    # weight of the place in the image that the instruction names, where samples have such a `point`; a model from
    # scratch learns by it which word stands for which thing
    point_weight: float = 0.0

    action_weight: float = 0.0  # weight of the true actions as a target, where a sample has them
    # set from the data when action_weight > 0: dimensions of an action, and action spaces, one readout each
    action_dim: Suppress[Fixed[int]] = 0
    action_sources: Suppress[Fixed[int]] = 0

    vlm: VLMConfig = field(default_factory=VLMConfig)

    @classmethod
    def from_dict(cls, values: dict, **changes) -> "VLAConfig":
        """values: as `asdict` gives them; changes: other settings of the VLM."""
        settings: dict[str, Any] = values | {"vlm": VLMConfig(**values["vlm"] | changes)}
        return cls(**settings)

    def resolved(self, space: LatentSpace) -> "VLAConfig":
        """Fills in what follows from stage 1 and from the kind of VLM, where it is not given.

        Raises ValueError for settings that contradict each other.
        """
        check(self)
        is_tiny, weight = self.vlm.vlm == "tiny", self.feature_weight
        image_size = space.image_size if is_tiny and self.vlm.image_size is None else self.vlm.image_size
        weight = float(is_tiny) if weight is None else weight
        return replace(self, vlm=replace(self.vlm, image_size=image_size), feature_weight=weight)


class VLA(nn.Module):
    """`forward(batch) -> (loss, metrics)` trains it; `generate(images, tasks)` predicts latent actions."""

    def __init__(self, config: VLAConfig, space: LatentSpace, vlm: VLM):
        super().__init__()
        check(config)
        self.config, self.space, self.vlm = config, space, vlm
        self.head = HEADS[config.head](vlm.dim, space, config)
        if vlm.lm_head is not None and config.token_rows != "vocabulary":
            vlm.lm_head.requires_grad_(False)  # nothing reads it
        if config.feature_weight:
            self.to_features = nn.Linear(vlm.dim, config.feature_dim)
        if config.point_weight:
            self.to_point = nn.Linear(vlm.dim, 2 * POINT_BINS)
        if config.action_weight and not config.action_dim:
            raise ValueError(f"action_weight={config.action_weight}, but no source in the data has actions")
        if config.action_weight:
            self.to_action = ActionReadout(vlm.dim, config.action_sources, config.action_dim)

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch:
        images uint8 (b, v, c, h, w), task (list of b)
        latent_indices int64 (b, t, m) or latent_vectors (b, t, e): the latent actions, from frames that the model
            never sees; latent_is_pad bool (b, t) marks the ones past the end of the episode
        features (b, n, f) of the last view, with feature_weight
        point (b, 2), nan where unknown, with point_weight
        action (b, chunk, a), action_is_pad, source, with action_weight
        """
        scored = self.scored(batch)
        loss = scored.errors.mean()
        metrics = {"latent_loss": loss.detach(), **scored.metrics}
        if self.config.feature_weight:
            hidden = self.vlm.at_image(scored.prompt, batch["task"], batch["images"].shape[1])  # b n d
            targets = regrid(batch["features"], self.vlm.num_image_tokens)  # b n f
            term = F.mse_loss(self.to_features(hidden).float(), targets)
            loss = loss + self.config.feature_weight * term
            metrics["feature_loss"] = term.detach()
        if self.config.point_weight:
            term = self.point_loss(scored.prompt.hidden[:, -1], batch)
            loss = loss + self.config.point_weight * term
            metrics["point_loss"] = term.detach()
        if self.config.action_weight:
            term = self.to_action.loss(scored.prompt.hidden[:, -1], batch)
            loss = loss + self.config.action_weight * term
            metrics["action_loss"] = term.detach()
        return loss, metrics

    def point_loss(self, hidden: Tensor, batch: dict) -> Tensor:
        """Cross-entropy of the bins of the point that the instruction names, a mean over the samples that have one.

        hidden (b, d) at the last word, which has read image and instruction. batch: point (b, 2), nan where unknown;
        absent where no sample has one; num_points: `masked_mean`'s count.
        """
        logits = self.to_point(hidden).float().unflatten(1, (2, POINT_BINS))  # b 2 k
        place = batch.get("point", hidden.new_full((len(hidden), 2), torch.nan))
        bins = ((place + 1) / 2 * POINT_BINS).nan_to_num().long().clamp(0, POINT_BINS - 1)
        errors = F.cross_entropy(logits.flatten(0, 1), bins.flatten(), reduction="none").view(-1, 2)
        return masked_mean(errors.mean(1), place.isfinite().all(1), batch.get("num_points"))

    def block_classes(self) -> set[type[nn.Module]]:
        """The repeated layers, which are compiled one by one. Only the VLM's are sharded one by one: the expert's have
        two methods that need their weights."""
        return self.vlm.block_classes() | {ExpertBlock}

    def hidden_classes(self) -> set[type[nn.Module]]:
        """Classes of the modules whose matrices Muon trains: the whole VLM, and the expert's blocks."""
        return {type(self.vlm.model), ExpertBlock}

    @torch.no_grad()
    def score(self, batch: dict) -> Tensor:
        """The loss (b,) of each sample's latent actions: negative log-likelihood of a code, or the flow's error."""
        return self.scored(batch).errors

    def scored(self, batch: dict) -> Scored:
        latents = batch[self.head.target]
        is_pad = batch.get("latent_is_pad")
        if is_pad is not None:  # padding counts for nothing, but must hold some latent action
            latents = torch.where(is_pad[..., None], latents[:, :1], latents)
        return self.head(self.vlm, batch["images"], batch["task"], latents, is_pad)

    @torch.no_grad()
    def generate(self, images: Tensor, tasks: Sequence[str], temperature: float = 0.0) -> Predicted:
        """images uint8 (b, v, c, h, w), b instructions -> latent actions (b, chunk_size, ...).

        temperature: 0 gives the likeliest codes, or a flow's result from noise of zero; 1 draws a sample.
        """
        return self.head.generate(self.vlm, images, tasks, temperature)

    @torch.no_grad()
    def expected(self, images: Tensor, tasks: Sequence[str]) -> Tensor:
        """The mean over all latent actions that may follow: for codes the probability of each at its position
        (b, t, m, k), for a flow the mean vectors (b, t, e). Head `tokens` estimates it from 16 sampled sequences."""
        return self.head.expected(self.vlm, images, tasks)

    def save_pretrained(self, folder: Path, weights: dict[str, Tensor] | None = None, **provenance) -> None:
        """Writes config.json, model.safetensors and vlm/: architecture, tokenizer and image processor of the VLM."""
        config = {"type": "vla", "hlrp_version": version("lerobot_policy_hlrp")}
        config |= {"vla": asdict(self.config), "latent_space": asdict(self.space)}
        (folder / "vlm").mkdir()
        self.vlm.save_parts(folder / "vlm")
        save_pretrained(folder, self, config | provenance, weights)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **changes) -> "VLA":
        """Rebuilds a model, in evaluation mode, from its checkpoint folder alone.

        changes: settings of the VLM to replace, such as freeze.

        Raises ValueError where the folder is not a VLA's, and where a tensor is missing or unexpected.
        """
        saved = load_config(folder, "vla", VLAConfig)
        config = VLAConfig.from_dict(saved["vla"], **changes)
        vlm = VLM.from_folder(Path(folder) / "vlm", config.vlm)
        model = cls(config, LatentSpace(**saved["latent_space"]), vlm)
        load_weights(folder, model)
        return model.eval()


def check(config: VLAConfig) -> None:
    """Raises ValueError for settings that contradict each other."""
    if config.head not in HEADS:
        raise ValueError(f"head={config.head!r}; expected one of {', '.join(HEADS)}")
    if config.token_rows not in ("codes", "vocabulary"):
        raise ValueError(f"token_rows={config.token_rows!r}; expected one of codes, vocabulary")
    if config.token_rows == "vocabulary" and config.head != "tokens":
        raise ValueError(f"token_rows='vocabulary' is a form of head=tokens; head={config.head} has none")
    for name in ("chunk_size", "num_inference_steps", "flow_draws", "expert_dim", "expert_depth"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}; expected 1 or more")
    if not 0 <= config.code_dropout <= 1 or (config.code_dropout and config.head != "tokens"):
        raise ValueError(f"code_dropout={config.code_dropout}; expected 0 to 1, above 0 with head=tokens alone")
    if config.expert_dim % 4:
        raise ValueError(f"expert_dim={config.expert_dim}; expected a multiple of 4, its number of heads")
    for name in ("action_weight", "feature_weight", "point_weight"):
        if (getattr(config, name) or 0) < 0:
            raise ValueError(f"{name}={getattr(config, name)}; expected 0 or more")
