"""The LeRobot policy `hlrp`: it turns what a VLA sees into a chunk of robot actions.

LeRobot's commands find it once hlrp is installed: `lerobot-train --policy.type=hlrp`, `lerobot-eval --policy.path=...`.

    prompt  = vlm(images, instruction)                    as in stage 2; computed once for a chunk
    actions = expert(prompt, state)                       regression; or flow matching, or bins of each dimension;
                                                          with action_context: | the queries of latent actions, too
    loss    = error(actions) + latent_weight * error(latent actions | prompt)

The head of stage 2 gives the second term, for every sample that has latent actions, with or without actions.
"""

import json
import shutil
import tempfile
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, snapshot_download
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc import RTCConfig, RTCProcessor
from lerobot.policies.utils import populate_queues
from lerobot.processor import make_default_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from hlrp.action_expert import ActionExpert, Context, ExpertBlock, mean_over_steps
from hlrp.checkpoints import load_config, write_json
from hlrp.demonstrations import PolicySettings
from hlrp.images import fit
from hlrp.metrics import normalisable
from hlrp.transformer import masked_mean
from hlrp.vla import VLA, FlowHead, Head, LatentSpace, ParallelHead, VLAConfig
from hlrp.vlm import VLM, Encoded, VLMConfig

INSTRUCTIONS = "instructions.json"  # in a checkpoint folder


@PreTrainedConfig.register_subclass("hlrp")
@dataclass
class HLRPConfig(PolicySettings, PreTrainedConfig):
    """The policy's settings as LeRobot's commands take them. finetune_policy.py makes one of its `PolicySettings`."""

    vla: str | None = None
    latent_weight: float = 0.1
    push_to_hub: bool = True
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )
    rtc_config: RTCConfig | None = None

    optimizer_lr: float = 1e-4
    optimizer_weight_decay: float = 0.05
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 500
    scheduler_decay_steps: int = 20_000

    crop: bool = False  # cut frames to their middle square in place of letterboxing them, as ?crop=center does
    stage2: dict[str, Any] | None = None  # configs of the checkpoint of stage 2 that it started from; hlrp sets it

    def __post_init__(self):
        if self.device is None:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            self.device = "cpu" if accelerator is None else accelerator.type
        super().__post_init__()
        self.normalization_mapping = {key: NormalizationMode(mode) for key, mode in self.normalization_mapping.items()}
        for name in ("n_obs_steps", "chunk_size", "n_action_steps", "action_repeat", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 or more")
        if self.n_action_steps > self.chunk_size:
            raise ValueError(f"n_action_steps={self.n_action_steps} is more than chunk_size={self.chunk_size}")
        if self.action_context not in ("prompt", "latents", "both"):
            raise ValueError(f"action_context={self.action_context!r}; expected one of prompt, latents, both")
        if self.action_head not in ("flow", "l1", "bins"):
            raise ValueError(f"action_head={self.action_head!r}; expected one of flow, l1, bins")
        if self.latent_weight is None:  # as `PolicySettings` leaves it
            self.latent_weight = type(self).latent_weight
        if self.latent_weight < 0:
            raise ValueError(f"latent_weight={self.latent_weight}; expected 0 or more")
        bounded = (NormalizationMode.MIN_MAX, NormalizationMode.QUANTILES)
        if self.action_head == "bins" and self.normalization_mapping["ACTION"] not in bounded:
            raise ValueError(
                f"action_head=bins with normalization_mapping ACTION={self.normalization_mapping['ACTION'].value}; "
                "expected MIN_MAX or QUANTILES, since the bins lie between -1 and 1"
            )

    def validate_features(self) -> None:
        if not self.image_features:
            raise ValueError(f"no camera among the inputs {sorted(self.input_features or {})}; hlrp needs one")
        if self.action_feature is None:
            raise ValueError(f"no {ACTION!r} among the outputs {sorted(self.output_features or {})}")

    @property
    def latent_chunk_size(self) -> int:
        """How many latent actions the policy predicts, one after another in time."""
        return 0 if self.stage2 is None else self.stage2["vla"]["chunk_size"]

    @property
    def observation_delta_indices(self) -> list[int]:
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.optimizer_lr / 10,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )


class Rtc(TypedDict, total=False):
    """What real-time chunking gives to a prediction."""

    inference_delay: int | None  # actions of the last chunk that the robot executes meanwhile
    prev_chunk_left_over: Tensor | None  # the actions of the last chunk that are not executed yet, normalised
    execution_horizon: int | None  # actions over which the new chunk follows the last one


class HLRPPolicy(PreTrainedPolicy):
    """`forward(batch) -> (loss, metrics)`; `predict_action_chunk` and `select_action` for a robot.

    A batch is LeRobot's, after the policy's preprocessor:

        each of config.image_features     float (b, c, h, w) or (b, t, c, h, w) in [0, 1]
        observation.state                 float (b, s), if the policy reads the state
        task                              list of b instructions
        action, action_is_pad             float (b, chunk_size, a), bool (b, chunk_size); in training
        latent_indices or latent_vectors  (b, t, n) or (b, t, d); in training, if they are known
        latent_is_pad                     bool (b, t): which latent actions lie past the end of the episode

    A sample whose actions are all padding has no action loss.
    """

    config: HLRPConfig
    config_class: type[HLRPConfig] = HLRPConfig
    name: str = "hlrp"
    latent_head: Head | None
    expert: ActionExpert | None
    from_state: nn.Linear | None

    def __init__(
        self,
        config: HLRPConfig,
        folder: Path | None = None,
        dataset_meta=None,
        instructions: Sequence[str] = (),
        **kwargs,
    ):
        """folder: a checkpoint of this policy, which describes the vlm; the caller loads its weights.
        instructions: a vlm from scratch learns its tokenizer from them; by default the tasks of dataset_meta."""
        super().__init__(config)
        config.validate_features()
        if dataset_meta is not None and not instructions:
            instructions = list(dataset_meta.tasks.index)
        if not instructions and folder is not None and (folder / INSTRUCTIONS).is_file():
            instructions = json.loads((folder / INSTRUCTIONS).read_text())
        self.instructions = list(instructions)  # of the demonstrations, which a roll-out tells the policy
        if dataset_meta is not None and dataset_meta.stats is not None:
            # lerobot-train gives these to the preprocessor of a checkpoint itself
            dataset_meta.stats = numbers_normalisable(config, dataset_meta.stats)
        self.vlm, self.latent_head = parts(config, folder, instructions)
        if config.action_context != "prompt" and not isinstance(self.latent_head, ParallelHead):
            raise ValueError(
                f"action_context={config.action_context!r}; expected prompt, since only a stage 2 of head parallel has "
                "hidden states from which it reads all codes at once"
            )
        shared = isinstance(self.latent_head, FlowHead)  # then one trunk serves both action spaces
        self.expert = None if shared else ActionExpert({}, self.vlm.dim, config.expert_dim, config.expert_depth)
        if self.latent_head is not None and not config.latent_weight:
            self.latent_head.requires_grad_(False)
            if isinstance(self.latent_head, ParallelHead) and config.action_context != "prompt":
                self.latent_head.queries.requires_grad_(True)
        action_dim = self.action_dim
        self.trunk.requires_grad_(True)
        if shared and not config.latent_weight:
            for layers in (self.trunk.from_space, self.trunk.to_space):
                layers["latent"].requires_grad_(False)
        tells_words = config.latent_weight and getattr(self.latent_head, "in_vocabulary", False)
        if self.vlm.lm_head is not None and not tells_words:
            self.vlm.lm_head.requires_grad_(False)  # nothing reads it
        num_bins = config.num_bins if config.action_head == "bins" else 1
        self.trunk.add_space("action", action_dim, action_dim * num_bins)
        state = config.robot_state_feature
        self.from_state = None if state is None else nn.Linear(state.shape[0], self.vlm.dim)
        self.init_rtc_processor()
        self.reset()

    def train(self, mode: bool = True):
        super().train(mode)
        if isinstance(self.latent_head, FlowHead):
            self.latent_head.norm.eval()  # it keeps the statistics of stage 2
        return self

    @property
    def trunk(self) -> ActionExpert:
        if self.expert is not None:
            return self.expert
        assert isinstance(self.latent_head, FlowHead)
        return self.latent_head.expert

    @property
    def action_dim(self) -> int:
        feature = self.config.action_feature
        assert feature is not None  # `validate_features` has seen it
        return feature.shape[0]

    def forward(self, batch: dict, reduction: str = "mean", as_tensors: bool = False) -> tuple[Tensor, dict]:
        """The loss, with reduction "none" (b,) of each sample; and its parts: floats, or tensors without host sync."""
        images, tasks = self.images(batch), batch["task"]  # b v c h w, b
        latents, latent_errors = None if self.latent_head is None else batch.get(self.latent_head.target), None
        if self.latent_head is not None and self.config.latent_weight and latents is not None:
            is_absent = batch.get("latent_is_pad")
            if is_absent is None:
                is_absent = torch.zeros(latents.shape[:2], dtype=torch.bool, device=latents.device)
            latents = torch.where(is_absent[..., None], 0, latents)  # b t n, or b t d
            predicted = self.latent_head(self.vlm, images, tasks, latents, is_absent)
            seen = self.chosen(predicted.prompt, predicted.queries)
            latent_errors, has_latents = predicted.errors, (~is_absent).any(1)
        else:
            seen = self.see(images, tasks)
        actions, is_pad = batch[ACTION], batch.get("action_is_pad")  # b t a, b t
        if is_pad is None:
            is_pad = torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)
        errors, is_labelled = self.action_errors(actions, is_pad, self.context(seen, batch)), (~is_pad).any(1)
        losses = errors if latent_errors is None else errors + self.config.latent_weight * latent_errors
        action_loss = masked_mean(errors, is_labelled, batch.get("num_labelled"))
        loss, metrics = action_loss, {"action_loss": action_loss.detach()}
        if latent_errors is not None:
            latent_loss = masked_mean(latent_errors, has_latents, batch.get("num_latent"))
            loss = loss + self.config.latent_weight * latent_loss
            metrics["latent_loss"] = latent_loss.detach()
        metrics = metrics if as_tensors else {name: part.item() for name, part in metrics.items()}
        return losses if reduction == "none" else loss, metrics

    def action_errors(self, actions: Tensor, is_pad: Tensor, context: Context) -> Tensor:
        """The loss (b,) of normalised actions (b, t, a); 0 for a sample whose actions are all padding."""
        if self.config.action_head == "flow":
            return self.trunk.errors("action", actions, context, is_pad)
        predicted = self.trunk.regress("action", actions.shape[1], context)
        actions = actions.masked_fill(is_pad[..., None], 0.0)
        if self.config.action_head == "l1":
            return mean_over_steps((predicted - actions).abs().mean(-1), is_pad)
        logits = predicted.unflatten(-1, (-1, self.config.num_bins)).movedim(-1, 1)  # b k t a
        bins = ((actions.clamp(-1, 1) + 1) / 2 * self.config.num_bins).long().clamp(max=self.config.num_bins - 1)
        return mean_over_steps(F.cross_entropy(logits, bins, reduction="none").mean(-1), is_pad)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict, noise: Tensor | None = None, **rtc: Unpack[Rtc]) -> Tensor:
        """Normalised actions (b, chunk_size, a), the first for now."""
        seen = self.see(self.images(batch), batch["task"])
        context, config = self.context(seen, batch), self.config
        if config.action_head != "flow":
            predicted = self.trunk.regress("action", config.chunk_size, context)
            if config.action_head == "l1":
                return predicted
            bins = predicted.unflatten(-1, (-1, config.num_bins)).argmax(-1)  # b t a
            return (bins + 0.5) / config.num_bins * 2 - 1
        if noise is None:
            shape = len(seen.hidden), config.chunk_size, self.action_dim
            noise = torch.randn(shape, device=seen.hidden.device)

        def denoise(x: Tensor, time: Tensor) -> Tensor:  # LeRobot's time is 1 at noise
            return -self.trunk.velocity("action", x, 1 - time, context)

        return euler_integrate(
            denoise,
            noise,
            config.num_inference_steps,
            rtc_processor=self.rtc_processor,
            rtc_enabled=self.rtc_processor is not None,
            **rtc,
        )

    @torch.no_grad()
    def select_action(self, batch: dict, noise: Tensor | None = None) -> Tensor:
        """The next action (b, a). A new chunk is predicted when n_action_steps of the last one are executed."""
        if self.rtc_processor is not None:
            raise ValueError("rtc_config.enabled=True with select_action; call predict_action_chunk instead")
        if self.config.n_obs_steps > 1:
            keys = {key: batch[key] for key in self.config.image_features}
            self._queues = populate_queues(self._queues, keys)
            seen = {key: [*self._queues[key]][:: self.config.action_repeat] for key in keys}
            batch = batch | {key: torch.stack(frames, dim=1) for key, frames in seen.items()}
        if not self._action_queue:
            chunk = self.predict_action_chunk(batch, noise)[:, : self.config.n_action_steps]
            self._action_queue.extend(chunk.repeat_interleave(self.config.action_repeat, dim=1).unbind(1))
        return self._action_queue.popleft()

    def reset(self) -> None:
        """Forgets the observations and actions of the last episode."""
        self._action_queue: deque[Tensor] = deque()
        length = (self.config.n_obs_steps - 1) * self.config.action_repeat + 1
        self._queues = {key: deque(maxlen=length) for key in self.config.image_features}

    def init_rtc_processor(self) -> None:
        """Real-time chunking (Black et al. 2025, arXiv:2506.07339), as `config.rtc_config` has it now."""
        rtc = self.config.rtc_config
        if rtc is not None and rtc.enabled and not self.supports_rtc():
            raise ValueError(f"rtc_config.enabled=True with action_head={self.config.action_head}; expected flow")
        self.rtc_processor = RTCProcessor(rtc) if rtc is not None and rtc.enabled else None

    def supports_rtc(self) -> bool:
        return self.config.action_head == "flow"

    def images(self, batch: dict) -> Tensor:
        """uint8 (b, v, c, h, w): the cameras in the order of their names, the older frames of each camera first."""
        views = []
        for key in sorted(self.config.image_features):
            if key not in batch:
                cameras = ", ".join(sorted(name for name in batch if name.startswith("observation.image"))) or "none"
                raise ValueError(f"the policy sees {key}, the batch has {cameras}; --rename_map maps other names")
            frames = batch[key] if batch[key].ndim == 5 else batch[key][:, None]  # b t c h w
            if frames.shape[1] != self.config.n_obs_steps:
                raise ValueError(
                    f"{key} has {frames.shape[1]} frames; expected {self.config.n_obs_steps}, one step apart"
                )
            pixels = (frames * 255).round().clamp(0, 255).to(torch.uint8)
            pixels = fit(pixels.flatten(0, 1), self.vlm.image_size, self.config.crop)
            views.append(pixels.unflatten(0, frames.shape[:2]))
        return torch.cat(views, dim=1)

    def see(self, images: Tensor, tasks: Sequence[str]) -> Encoded:
        """The hidden states that the actions are read from."""
        if self.config.action_context == "prompt":
            return self.vlm(images, tasks)
        assert isinstance(self.latent_head, ParallelHead)
        encoded, length = self.latent_head.encode(self.vlm, images, tasks), self.latent_head.length
        return self.chosen(encoded.without(length), encoded.last(length))

    def chosen(self, prompt: Encoded, queries: Encoded | None) -> Encoded:
        """Those that `action_context` names."""
        if self.config.action_context == "prompt":
            return prompt
        assert queries is not None  # the head is parallel
        return queries if self.config.action_context == "latents" else prompt.followed_by(queries)

    def context(self, seen: Encoded, batch: dict) -> Context:
        """What the expert attends to: what is seen, and the state as one more position."""
        hidden, mask = seen.hidden, seen.mask
        if self.from_state is not None:
            if OBS_STATE not in batch:
                raise ValueError(f"the policy reads {OBS_STATE}, but the batch has none")
            state = batch[OBS_STATE]
            state = state[:, -1] if state.ndim == 3 else state
            hidden = torch.cat([hidden, self.from_state(state)[:, None].to(hidden.dtype)], dim=1)
            mask = F.pad(mask, (0, 1), value=True)
        return self.trunk.read(hidden, mask)

    def hidden_classes(self) -> set[type[nn.Module]]:
        """The modules whose matrices Muon trains: the VLM and the blocks of the expert."""
        return {type(self.vlm.model), ExpertBlock}

    def get_optim_params(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save_pretrained(save_directory, state_dict)
        write_json(save_directory / INSTRUCTIONS, self.instructions)
        (save_directory / "vlm").mkdir(exist_ok=True)
        self.vlm.save_parts(save_directory / "vlm")

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, revision=None, **kwargs
    ) -> "HLRPPolicy":
        """The policy of a folder or a hub id, in evaluation mode. Raises if a weight is missing or is one too many."""
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(pretrained_name_or_path), revision=revision))
        config = PreTrainedConfig.from_pretrained(folder) if config is None else config
        kwargs.update(config=config, folder=folder, strict=True)
        return super().from_pretrained(folder, **kwargs)


def parts(config: HLRPConfig, folder: Path | None, instructions: Sequence[str]) -> tuple[VLM, Head | None]:
    """The vision-language model, and the head of stage 2 (None: the policy did not start from stage 2).

    A new policy gets the weights of stage 2, and `config.stage2` gets its configs.
    """
    chosen = {name: getattr(config, name) for name in ("freeze_layers", "lora_rank", "gradient_checkpointing")}
    chosen["freeze"] = tuple(config.freeze)
    if folder is None and config.vla is not None:
        vla = VLA.from_pretrained(config.vla, gradient_checkpointing=config.gradient_checkpointing)
        vla.vlm.choose_trainable(replace(vla.config.vlm, **chosen))
        if config.image_size not in (None, vla.vlm.image_size):
            raise ValueError(
                f"image_size={config.image_size}, but vla={config.vla} sees {vla.vlm.image_size} pixels; leave it out"
            )
        config.stage2 = {"vla": asdict(vla.config), "latent_space": asdict(vla.space)}
        return vla.vlm, vla.head
    if config.stage2 is not None:
        vla_config = VLAConfig.from_dict(config.stage2["vla"], **chosen)
        assert folder is not None  # what started from stage 2 is saved
        vlm = VLM.from_folder(folder / "vlm", vla_config.vlm)
        return vlm, VLA(vla_config, LatentSpace(**config.stage2["latent_space"]), vlm).head
    vlm_config = VLMConfig(config.vlm, config.image_size, **chosen)
    if folder is not None:
        return VLM.from_folder(folder / "vlm", vlm_config), None
    if config.vlm == "tiny" and not instructions:
        raise ValueError("vlm=tiny learns its tokenizer from the instructions of a dataset, and there is none")
    return VLM.from_config(vlm_config, instructions), None


def make_hlrp_pre_post_processors(config: HLRPConfig, dataset_stats: dict | None = None, dataset_meta=None):
    """LeRobot's standard pipelines: rename, batch, device, normalise; and back.

    Raises ValueError if statistics are missing or have other sizes than the policy.
    """
    dataset_stats = None if dataset_stats is None else numbers_normalisable(config, dataset_stats)
    for key, feature in features_of(config).items():
        mode = config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        if dataset_stats is None or mode is NormalizationMode.IDENTITY:
            continue
        if key not in dataset_stats:
            raise ValueError(f"no statistics of {key} among those of {', '.join(sorted(dataset_stats))}")
        shapes = {tuple(np.shape(x)) for name, x in dataset_stats[key].items() if name != "count"}
        if shapes != {tuple(feature.shape)}:
            raise ValueError(f"statistics of {key} are of shape {sorted(shapes)}, the policy's is {feature.shape}")
    return make_default_pre_post_processors(config, dataset_stats)


def features_of(config: HLRPConfig) -> dict[str, PolicyFeature]:
    """The inputs and outputs of a policy."""
    return {**(config.input_features or {}), **(config.output_features or {})}


def numbers_normalisable(config: HLRPConfig, dataset_stats: dict) -> dict:
    """The statistics after `normalisable`, for states and actions. Raises ValueError if one of them is not finite."""
    mended = dict(dataset_stats)
    for key, feature in features_of(config).items():
        if feature.type is FeatureType.VISUAL or key not in dataset_stats:
            continue
        for name, value in dataset_stats[key].items():
            if not np.isfinite(np.asarray(value, dtype=np.float64)).all():
                raise ValueError(
                    f"statistics of {key}: {name} is {np.asarray(value).tolist()}; expected finite numbers"
                )
        mended[key] = normalisable(dataset_stats[key])
    return mended


def start_from(folder: Path, given: PolicySettings, names: Collection[str], with_state: bool) -> HLRPConfig:
    """The config of a policy's checkpoint, with those settings of `given` that `names` lists or that are no defaults.

    Raises ValueError for a folder without an hlrp policy, and for a setting that contradicts its weights.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"policy.path={folder} holds no config.json: expected a policy's pretrained_model folder; run "
            "finetune_policy.py without --policy.path first, or give another one"
        )
    config = PreTrainedConfig.from_pretrained(folder)
    if not isinstance(config, HLRPConfig):
        raise ValueError(f"policy.path={folder} is a policy of type {config.type!r}; expected hlrp")
    fixed = {"vla", "vlm", "image_size", "lora_rank", "n_obs_steps", "chunk_size", "action_head", "num_bins"}
    fixed, default = fixed | {"expert_dim", "expert_depth", "action_context"}, PolicySettings()
    for name, value in ((f.name, getattr(given, f.name)) for f in fields(PolicySettings)):
        if value == getattr(default, name) and name not in names:
            continue
        if name in fixed and value != getattr(config, name):
            raise ValueError(
                f"policy.{name}={value}, but policy.path={folder} has {getattr(config, name)}; leave it out"
            )
        setattr(config, name, value)
    config.push_to_hub, config.repo_id = given.push_to_hub, given.repo_id  # what was uploaded once, is not unasked
    if not with_state and config.robot_state_feature is not None:
        raise ValueError(f"no-state, but policy.path={folder} reads the state; leave it out")
    config.__post_init__()
    return config


def data_of(config: HLRPConfig, policy_path: Path | None) -> tuple[str, ...]:
    """The sources from which the checkpoint learned that the policy starts from."""
    if policy_path is not None:
        file = policy_path / "provenance.json"
        if not file.is_file():
            raise ValueError(f"data is empty, and {policy_path} does not say what it learned from; give --data")
        return tuple(json.loads(file.read_text())["data"])
    if config.vla is None:
        raise ValueError("data is empty, and without policy.vla there is no stage 2 to take it from; give --data")
    return tuple(load_config(config.vla, "vla")["data"])


def push_to_hub(policy: HLRPPolicy, folder: Path, data: Sequence[str]) -> None:
    """Uploads a checkpoint with LeRobot's model card in one commit."""
    api, config = HfApi(), policy.config
    assert config.repo_id is not None  # `Args.check` of finetune_policy.py has seen it
    repo_id = api.create_repo(config.repo_id, private=config.private, exist_ok=True).repo_id
    card = policy.generate_model_card(", ".join(data), config.type, config.license, config.tags)
    with tempfile.TemporaryDirectory() as copy:
        whole = shutil.copytree(folder, Path(copy) / "policy")
        card.save(whole / "README.md")
        api.upload_folder(repo_id=repo_id, folder_path=whole, commit_message="Upload policy")
