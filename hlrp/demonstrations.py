"""What a LeRobot policy learns from, and its settings: demonstrations and other video, their features, statistics and
batches, how far its actions are from the true ones, and the flags of finetune_policy.py.

Validation compares the actions of a policy on held-out demonstrations with the mean action, and with its own under
another instruction and a grey image. `hlrp.policy.HLRPConfig` inherits from `PolicySettings`. Nothing here imports
LeRobot's policies, which take seconds: --help does not need them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
import yaml
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE
from torch import Tensor

from hlrp.action_expert import mean_over_steps
from hlrp.clips import Clips
from hlrp.contract import EpisodeRange, SampleSet, Stream, choose_demonstrations, split_episodes
from hlrp.data import Mixture, choose_clips, whole_column
from hlrp.distributed import first_alone
from hlrp.idle import busy_frames
from hlrp.inverse import FACTS, PseudoLabelled, infer
from hlrp.inverse import Args as InverseArgs
from hlrp.laq import LAQ
from hlrp.laq_validation import Share
from hlrp.metrics import column_statistics, normalisable
from hlrp.streams import clips_of
from hlrp.vla_validation import CONDITIONS, label, under


@dataclass
class Part:
    """One source of a policy's data."""

    source: Any  # what the policy learns from: `truth`, or the same with pseudo-actions
    truth: Any  # the source itself, which validation compares with
    weight: float
    train: np.ndarray | EpisodeRange  # episodes to learn from
    val: np.ndarray | EpisodeRange  # and those held out
    demonstrations: np.ndarray  # training episodes whose actions are learned

    @property
    def video(self) -> np.ndarray | EpisodeRange:
        """The training episodes without actions, which show latent actions alone."""
        return self.train if isinstance(self.source, Stream) else np.setdiff1d(self.train, self.demonstrations)


def choose_parts(args, sources: Sequence, weights: Sequence[float]) -> list[Part]:
    """A part for each source. args: `val_fraction`, `seed`, `demonstrations`, `episodes`, `pseudo_actions` are read.

    Raises ValueError for settings that are of one source, where there are several, and where none has demonstrations.
    """
    for name in ("episodes", "pseudo_actions"):
        if (value := getattr(args, name)) not in (None, "auto") and len(sources) > 1:
            uris = ", ".join(source.uri for source in sources)
            raise ValueError(f"{name}={value}; expected one source, got {len(sources)}: {uris}")
    parts = []
    for source, weight in zip(sources, weights, strict=True):
        train, val = split_episodes(source, args.val_fraction, args.seed)
        if args.episodes is None:
            demonstrations = choose_demonstrations(source, train, args.demonstrations, args.seed)
        else:
            demonstrations = check_episodes(args.episodes, source, train)
        parts.append(Part(source, source, weight, train, val, demonstrations))
    if not any(len(part.demonstrations) for part in parts):
        unread = [f"; {s.uri} has {s.unread}, which are not read: ?action=KEY chooses one" for s in sources if s.unread]
        raise ValueError(
            "no source has actions that can be read at random; a policy needs some labelled demonstrations, and "
            f"python -m hlrp.shards makes them of a stream{''.join(unread)}"
        )
    return parts


def gets_labels(args, config, parts: Sequence[Part]) -> bool:
    """Whether the other video gets pseudo-actions. With "auto" it does where the policy starts from stage 2, and one
    source has both demonstrations and other episodes."""
    if args.pseudo_actions != "auto":
        return args.pseudo_actions is not None
    has_stage2 = config.vla is not None or config.stage2 is not None
    return has_stage2 and len(parts) == 1 and len(parts[0].video) > 0 and args.video_batch_size != 0


def give_labels(args, part: Part, config) -> None:
    """Lets a part learn from pseudo-actions too: those of the folder `args.pseudo_actions`, or with "auto" those in the
    run's own folder, which are made here if they are not there yet.

    Raises ValueError where the LAQ in `args.laq` is not the one that stage 2 learned from, and where the run's folder
    holds labels of other settings.
    """
    folder = args.pseudo_actions
    if folder == "auto":
        assert not isinstance(part.train, EpisodeRange) and not isinstance(part.val, EpisodeRange)
        folder = args.output_dir / "pseudo_actions"
        names = ("laq", "val_fraction", "seed", "shuffle_latents")
        settings = InverseArgs(part.truth.uri, folder, **{name: getattr(args, name) for name in names})
        teacher = config.stage2["latent_space"]["fingerprint"]
        with first_alone():  # which labels what is not there yet
            if not folder.exists():
                laq = load_teacher(args.laq, config)
                try:
                    infer(settings, part.truth, laq, part.train, part.val, part.demonstrations)
                except ValueError as error:
                    raise ValueError(f"{error}. --pseudo-actions None learns the other video without labels") from error
        made = json.loads((folder / FACTS).read_text())
        if made["laq"] != teacher or any(made["args"][name] != getattr(args, name) for name in names[1:]):
            raise ValueError(f"{folder} was made with another LAQ, {', '.join(names[1:])}; delete it to make it anew")
    part.source = PseudoLabelled(part.truth, folder, part.demonstrations)


def check_episodes(episodes: Sequence[int], source, train: np.ndarray | EpisodeRange) -> np.ndarray:
    """The given episodes, sorted. Raises ValueError if one of them is held out or does not exist."""
    if isinstance(train, EpisodeRange):
        raise ValueError(f"episodes={list(episodes)}, but {source.uri} is a stream; expected an indexed source")
    if strangers := sorted(set(episodes) - set(train.tolist())):
        raise ValueError(
            f"episodes={strangers} are held out or do not exist in {source.uri}; expected some of its training "
            f"episodes, {train.tolist()[:8]}..., which follow from --val-fraction and --seed"
        )
    return np.sort(np.array(episodes))


def robots_of(parts: Sequence[Part], config) -> list[Clips]:
    """The clips that a policy of this config learns from demonstrations, for each source that has some."""
    sizes = {"min_times": 1, "chunk_size": config.chunk_size, "num_images": config.n_obs_steps}
    return [
        Clips(part.truth, part.demonstrations, (0.0,), labelled_episodes=part.demonstrations, **sizes)
        for part in parts
        if len(part.demonstrations)
    ]


def mix(args, parts: Sequence[Part], times: Sequence[float], with_video: bool, cached: dict | None, **sizes):
    """The mixture of demonstrations and other video; name of a source -> its held-out samples; and the batch size:
    `args.batch_size` samples of demonstrations and, if there is other video, `args.video_batch_size` samples of it.

    times: times of the frames in a sample [s]. with_video: whether anything learns from video without actions. cached:
    the latent space of cached latent actions. sizes: settings of all `Clips`. args: also `idle`, `val_samples`, `seed`
    and `skip_broken`.
    """
    labelled, video, val = [], [], {}
    for i, part in enumerate(parts):
        settings = {"times": times, "source_index": i, "min_times": 1, **sizes}
        learned = {"latent_space": cached, "frames": None, **settings}
        if args.idle.is_set():
            learned["frames"] = busy_frames(part.source, args.idle)
        if len(part.demonstrations):
            labelled.append((part.weight, Clips(part.source, part.demonstrations, **learned)))
            assert not isinstance(part.val, EpisodeRange)  # no stream has demonstrations
            held_out = Clips(part.truth, part.val, **settings)
            val[part.source.name] = choose_clips(held_out, args.val_samples, args.seed, args.skip_broken)
        if len(part.video) and args.video_batch_size != 0 and with_video:
            learned |= {"labelled_episodes": () if part.source is part.truth else part.video, "seed": args.seed}
            clips = clips_of(part.source, part.video, **learned, name=f"{part.source.name}-video")
            video.append((part.weight, clips))
    batch_sizes = [args.batch_size, args.batch_size if args.video_batch_size is None else args.video_batch_size]
    clips, weights = [], []
    for batch_size, group in zip(batch_sizes, (labelled, video), strict=True):
        total = sum(weight for weight, _ in group)
        weights += [batch_size * weight / total for weight, _ in group]
        clips += [part for _, part in group]
    mixture = Mixture(clips, weights, args.seed, args.skip_broken)
    return mixture, val, sum(size for size, group in zip(batch_sizes, (labelled, video), strict=True) if group)


def robot_features(clips: Sequence[Clips], with_state: bool) -> tuple[dict, dict]:
    """Inputs and outputs of a policy that learns from labelled clips: cameras, the state if they have one; actions.

    Raises ValueError if sources differ in action or state.
    """
    from lerobot.configs import FeatureType, PolicyFeature

    sources = [c.source for c in clips]
    first = sources[0]
    for source in sources[1:]:
        if (source.action_dim, source.state_dim) != (first.action_dim, first.state_dim):
            raise ValueError(
                f"{source.uri}: expected actions of {first.action_dim} and states of {first.state_dim} numbers as in "
                f"{first.uri}, since a policy is for one robot, got {source.action_dim} and {source.state_dim}"
            )
    shape = tuple(first.read(int(clips[0].episodes[0]), [0])["frames"].shape[1:])
    cameras = sorted([first.camera or OBS_IMAGE, *first.views])
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, shape) for camera in cameras}
    if with_state and first.state_dim:
        inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (first.state_dim,))
    return inputs, {ACTION: PolicyFeature(FeatureType.ACTION, (first.action_dim,))}


def refuse_other_cameras(sources: list, config) -> None:
    """Raises ValueError for a source with more or fewer cameras than the policy, and for a robot's whose frames are cut
    where the policy's are not."""
    for source in sources:
        if source.action_dim and source.crop != config.crop:
            wanted, found = ("with" if crop else "without" for crop in (config.crop, source.crop))
            raise ValueError(f"{source.uri}: expected it {wanted} ?crop=center, as the policy sees, got it {found}")
        cameras, expected = [source.camera, *source.views], sorted(config.image_features)
        if len(cameras) != len(expected):
            raise ValueError(
                f"{source.uri}: expected the {len(expected)} cameras that the policy sees, {', '.join(expected)}, got "
                f"{len(cameras)}; ?camera=top,wrist chooses some of a LeRobot dataset"
            )


def statistics(clips: Sequence[Clips], with_state: bool) -> dict[str, dict[str, np.ndarray]]:
    """LeRobot's statistics of the actions and states in the labelled episodes alone, after `normalisable`. Raises
    ValueError, which names the episode, for a number that is not finite."""

    def of(name: str) -> dict[str, np.ndarray]:
        parts = [whole_column(c.source, name, c.labelled_episodes) for c in clips]
        return normalisable(column_statistics(np.concatenate(parts)))

    features = {ACTION: of("actions")}
    if with_state and clips[0].source.state_dim:
        features[OBS_STATE] = of("states")
    return features


def to_lerobot(batch: dict, config) -> dict[str, Tensor | list[str]]:
    """Turns a batch of `Clips` into what LeRobot's preprocessor of the policy takes."""
    cameras, images = sorted(config.image_features), batch["images"]  # b (cameras t) c h w
    observation = {"task": batch["task"]}
    for camera, frames in zip(cameras, (images.float() / 255).chunk(len(cameras), dim=1), strict=True):
        observation[camera] = frames if config.n_obs_steps > 1 else frames[:, 0]
    if config.robot_state_feature is not None:
        observation[OBS_STATE] = batch["state"][:, : config.robot_state_feature.shape[0]]
    if "action" in batch:
        observation[ACTION] = batch["action"][..., : config.action_feature.shape[0]]
        observation["action_is_pad"] = batch["action_is_pad"]
    return observation


def teacher_of(policy, folder: Path) -> LAQ | None:
    """The LAQ whose latent actions a policy predicts beside its actions; None if it predicts none.

    Raises ValueError if the LAQ in `folder` is not the one that stage 2 learned from.
    """
    config = policy.config
    if policy.latent_head is None or not config.latent_weight:
        return None
    return load_teacher(folder, config)


def load_teacher(folder: Path, config) -> LAQ:
    """Raises ValueError if the LAQ in `folder` is not the one that stage 2 learned from."""
    laq = LAQ.from_pretrained(folder).requires_grad_(False).to(config.device)
    if laq.fingerprint != config.stage2["latent_space"]["fingerprint"]:
        hint = "--pseudo-actions None --policy.latent-weight 0 needs none"
        raise ValueError(f"laq={folder} is not the one that stage 2 learned from; {hint}")
    return laq


@torch.no_grad()
def evaluate(
    policy,
    preprocessor,
    laq,
    sets: Mapping[str, SampleSet],
    rank: int = 0,
    num_ranks: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, dict]:
    """The report of each source; the arguments are as in `hlrp.laq_validation.evaluate`.

    laq: the LAQ whose latent actions the policy predicts beside its actions, or None. An error is the mean absolute
    error over the steps of a chunk that are not padding, in standard deviations of an action:
        samples, episodes, tasks
        action_loss, latent_loss                           as in training
        action_error, action_error_shuffled_text, action_error_blank_image
        action_error_mean                                  error of the mean action of the demonstrations
    """
    share = Share(rank, num_ranks, batch_size, num_workers, next(policy.parameters()).device)
    was_training = policy.training
    policy.eval()
    report = {}
    for name, dataset in sets.items():
        if len(dataset) < num_ranks:
            raise ValueError(f"{name} has {len(dataset)} samples for {num_ranks} ranks: give it more episodes")
        tasks = share.tasks(dataset)
        rows, losses, episodes = [], [], []
        for _, batch in share.batches(dataset):
            truth = preprocessor(to_lerobot(batch, policy.config))
            errors = [absolute_error(torch.zeros_like(truth["action"]), truth)]
            for condition in CONDITIONS:
                seen = under(condition, batch, tasks, seed)
                torch.manual_seed(seed)  # the flow's noise: the same at every validation
                chunk = policy.predict_action_chunk(preprocessor(to_lerobot(seen, policy.config)))
                errors.append(absolute_error(chunk, truth))
            rows.append(torch.stack(errors, dim=1))
            torch.manual_seed(seed)
            labelled = {"latent_is_pad": batch["latent_is_pad"]} | label(laq, batch["frames"]) if laq else {}
            counts = {"num_labelled": (~truth["action_is_pad"]).any(1).sum()}  # here, and not of all ranks
            if labelled:
                counts["num_latent"] = (~batch["latent_is_pad"]).any(1).sum()
            _, metrics = policy(truth | labelled | counts)
            losses.append(torch.tensor([list(metrics.values())] * len(batch["task"]), device=share.device))
            episodes.append(batch["episode"])
        means = share.gather(torch.cat(rows)).double().mean(0).tolist()
        figures = {"samples": len(dataset), "episodes": len(share.gather(torch.cat(episodes)).unique())}
        figures["tasks"] = len(tasks)
        figures |= dict(zip(metrics, share.gather(torch.cat(losses)).mean(0).tolist(), strict=True))
        figures |= {"action_error_mean": means[0]}
        figures |= {f"action_error{c}": mean for c, mean in zip(CONDITIONS, means[1:], strict=True)}
        report[name] = figures
    policy.train(was_training)
    return report


def absolute_error(chunk: Tensor, truth: dict) -> Tensor:
    """The mean error (b,) of normalised actions (b, t, a) over the steps that are not padding."""
    return mean_over_steps((chunk - truth["action"]).abs().mean(-1), truth["action_is_pad"])


def alarms(report: dict[str, dict]) -> list[str]:
    """A sentence for each figure which shows that the policy has not learned its task."""
    sentences = []
    for name, figures in report.items():
        error = figures["action_error"]
        if error >= figures["action_error_mean"]:
            sentences.append(
                f"{name}: the policy's actions are off by {error:.2f} standard deviations, the mean action by "
                f"{figures['action_error_mean']:.2f}."
            )
        for condition, fault in (("_shuffled_text", "read the text"), ("_blank_image", "look at the image")):
            other = figures[f"action_error{condition}"]
            if other <= error and (condition != "_shuffled_text" or figures["tasks"] > 1):
                sentences.append(
                    f"{name}: the policy does not {fault}: its error is {error:.2f}, and {other:.2f} with "
                    f"{condition[1:].replace('_', ' ')}."
                )
    return sentences


def findings(report: dict[str, dict]) -> list[tuple[str, str, str, str, str]]:
    """What a report says in words, a row each: source, figure, value, control, verdict."""
    rows = []
    for name, figures in report.items():
        error, mean = figures["action_error"], figures["action_error_mean"]
        text, image = (figures[f"action_error_{condition}"] for condition in ("shuffled_text", "blank_image"))
        control = f"the mean action {mean:.2f}, another text {text:.2f}, blank image {image:.2f}"
        verdict = "better than the mean action" if error < mean else "no better than the mean action"
        rows.append((name, "error of the actions in standard deviations", f"{error:.2f}", control, verdict))
    return rows


NormalizationName = Literal["MIN_MAX", "MEAN_STD", "IDENTITY", "QUANTILES", "QUANTILE10"]


class Normalization(TypedDict):
    """How the inputs and outputs of a policy are normalised, in LeRobot's names."""

    VISUAL: NormalizationName  # how pixels are normalised
    STATE: NormalizationName  # how the robot's state is normalised
    ACTION: NormalizationName  # how actions are normalised


@dataclass
class PolicySettings:
    # checkpoint of stage 2 to start from; None: the bare --policy.vlm, for behaviour cloning
    vla: str | None = "outputs/vla/checkpoints/last/pretrained_model"
    vlm: str = "tiny"  # without stage 2: hub id or folder of the vision-language model; tiny: from scratch
    image_size: int | None = None  # without stage 2: side of the image that the vlm sees [pixel]
    freeze: list[str] = field(default_factory=list)  # parts of the vlm that are not trained: vision, language
    freeze_layers: int = 0  # first layers of the language model that are not trained
    lora_rank: int = 0  # rank of adapters (peft) that are trained in place of the vlm; 0: none
    gradient_checkpointing: bool = False  # save memory, for about a third more compute

    n_obs_steps: int = 1  # frames of each camera that the policy sees, one step apart; the last is now
    chunk_size: int = 16  # actions that are predicted together
    n_action_steps: int = 8  # actions of a chunk that are executed before the next prediction
    action_repeat: int = 1  # environment steps that an action is held for, where the data have a lower rate
    # regression of the chunk, flow matching (for demonstrations that do the same in several ways), or bins
    action_head: Literal["l1", "flow", "bins"] = "l1"
    num_bins: int = 256  # with --policy.action-head bins: values of an action dimension
    num_inference_steps: int = 10  # with --policy.action-head flow: integration steps of a prediction
    expert_dim: int = 256  # width of the action expert, where stage 2 brings none
    expert_depth: int = 4  # transformer blocks of the action expert, where stage 2 brings none
    # what the action expert reads: the hidden states of image and instruction, those from which stage 2 reads its
    # latent actions, or both (UniVLA, arXiv:2505.06111); the latter two need a stage 2 of head parallel
    action_context: Literal["prompt", "latents", "both"] = "prompt"
    # weight of the loss of the latent actions, where the batch has them; None: 0.1, and 0 beside pseudo-actions
    latent_weight: float | None = None
    normalization_mapping: Normalization = field(
        default_factory=lambda: Normalization(VISUAL="IDENTITY", STATE="MEAN_STD", ACTION="MEAN_STD")
    )

    push_to_hub: bool = False  # upload the policy to the Hugging Face hub when training ends
    repo_id: str | None = None  # where to upload the policy: USER/NAME
    private: bool | None = None  # make the uploaded repository private; None: as your account on the hub has it
    tags: list[str] | None = None  # tags of the uploaded policy
    license: str | None = None  # license of the uploaded policy


def dicts(argv: list[str]) -> list[str]:
    """Rewrites each dictionary on a command line, --name={"a": "b"}, as its keys and values: --name a b.

    Raises ValueError for a dictionary that does not map texts to texts.
    """
    result, tokens = [], [*argv]
    while tokens:
        token = tokens.pop(0)
        flag, _, value = token.partition("=") if token.startswith("--") else ("", "", token)
        if not value.startswith("{"):
            result.append(token)
            continue
        while not value.endswith("}") and tokens:  # a shell has split it at its spaces
            value += f" {tokens.pop(0)}"
        try:
            pairs = yaml.safe_load(value)
        except yaml.YAMLError:
            pairs = None
        if not isinstance(pairs, dict) or not all(isinstance(x, str) for pair in pairs.items() for x in pair):
            raise ValueError(f'{flag or result[-1]}={value}; expected a dictionary such as \'{{"a": "b"}}\'')
        result += [*filter(None, [flag]), *(part for pair in pairs.items() for part in pair)]
    return result


def lerobot_flags(argv: list[str]) -> list[str]:
    """Rewrites flags in the spelling of LeRobot's commands as flags of finetune_policy.py. Other flags stay.

    Raises ValueError for a flag of LeRobot that has no meaning here.
    """
    renamed = {"policy.path": "policy-path", "wandb.enable": "wandb", "dataset.episodes": "episodes"}
    renamed |= {"rename_map": "env.rename-map"}
    renamed |= {"peft.r": "policy.lora-rank", "policy.optimizer_lr": "lr"}
    renamed |= {"policy.optimizer_weight_decay": "weight-decay", "policy.optimizer_grad_clip_norm": "grad-clip"}
    renamed |= {"policy.scheduler_warmup_steps": "warmup-steps"}
    refused = {  # LeRobot's flag -> what sets it here
        "policy.optimizer_betas": "--optimizer, --lr",
        "policy.scheduler_decay_steps": "--steps",
        "policy.device": "the variable CUDA_VISIBLE_DEVICES",
        "policy.use_amp": "--mixed-precision",
        "policy.pretrained_path": "--policy.path",
        "policy.stage2": "--policy.vla",
        "wandb.project": "the variable WANDB_PROJECT",
        "job_name": "the variable WANDB_NAME",
    }
    fixed = {"policy.type": "hlrp", "resume": "true", "peft.method_type": "LORA"}  # they need no flag
    result, dataset = [], {}
    tokens = [part for token in dicts(argv) for part in (token.split("=", 1) if token.startswith("--") else [token])]
    while tokens:
        flag = tokens.pop(0)
        if not flag.startswith("--"):
            result.append(flag)
            continue
        name, values = flag[2:], []
        while tokens and not tokens[0].startswith("--"):
            values.append(tokens.pop(0))
        if len(values) == 1 and values[0].startswith("["):
            values = [value.strip(" '\"") for value in values[0][1:-1].split(",")]
        name = name.replace("-", "_") if name.replace("-", "_") in {*renamed, *refused, *fixed} else name
        if name in refused:
            raise ValueError(f"--{name} has no meaning here; {refused[name]} sets what it stands for")
        if name in fixed:
            if values != [fixed[name]]:
                raise ValueError(f"--{name}={' '.join(values)}; expected {fixed[name]}")
            continue
        if name in ("dataset.repo_id", "dataset.root"):
            (dataset[name],) = values
            continue
        name = renamed.get(name, name)
        if values == ["false"]:
            *prefix, last = name.split(".")
            name = ".".join([*prefix, f"no-{last}"])
        values = ["None" if value == "null" else value for value in values]
        result += [f"--{name}", *(value for value in values if value not in ("true", "false"))]
    if dataset:
        result += ["--data", f"lerobot:{dataset.get('dataset.root', dataset.get('dataset.repo_id'))}"]
    return result


def settings_given(argv: list[str]) -> frozenset[str]:
    """The names of the policy's settings that a command line gives, whatever their values."""
    flags = [token.removeprefix("--policy.") for token in argv if token.startswith("--policy.")]
    return frozenset(flag.split(".")[0].removeprefix("no-").replace("-", "_") for flag in flags)
