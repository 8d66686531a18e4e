"""The settings of a policy, and LeRobot's spelling of the flags that set them.

finetune_policy.py makes its flags of `PolicySettings`, and `hlrp.policy.HLRPConfig` inherits from it. This module
imports nothing of LeRobot: its policies take seconds to import, and --help does not need them.
"""

from dataclasses import dataclass, field
from typing import Literal, TypedDict

import yaml

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
    action_head: Literal["flow", "l1", "bins"] = "flow"  # flow matching, regression, or bins of each dimension
    num_bins: int = 256  # with --policy.action-head bins: values of an action dimension
    num_inference_steps: int = 10  # with --policy.action-head flow: integration steps of a prediction
    expert_dim: int = 256  # width of the action expert, where stage 2 brings none
    expert_depth: int = 4  # transformer blocks of the action expert, where stage 2 brings none
    latent_weight: float = 0.1  # weight of the loss of the latent actions, where the batch has them
    normalization_mapping: Normalization = field(
        default_factory=lambda: Normalization(VISUAL="IDENTITY", STATE="MEAN_STD", ACTION="MEAN_STD")
    )

    push_to_hub: bool = False  # upload the policy to the Hugging Face hub when training ends
    repo_id: str | None = None  # where to upload the policy: USER/NAME
    private: bool | None = None  # make the uploaded repository private; None: as your account on the hub has it
    tags: list[str] | None = None  # tags of the uploaded policy
    license: str | None = None  # license of the uploaded policy


def dicts(argv: list[str]) -> list[str]:
    """A command line on which each dictionary, --name={"a": "b"}, is the list of its keys and values: --name a b.

    Raises ValueError for what is no dictionary of texts.
    """
    found, tokens = [], [*argv]
    while tokens:
        token = tokens.pop(0)
        flag, _, value = token.partition("=") if token.startswith("--") else ("", "", token)
        if not value.startswith("{"):
            found.append(token)
            continue
        while not value.endswith("}") and tokens:  # which a shell has cut at its spaces
            value += f" {tokens.pop(0)}"
        try:
            pairs = yaml.safe_load(value)
        except yaml.YAMLError:
            pairs = None
        if not isinstance(pairs, dict) or not all(isinstance(x, str) for pair in pairs.items() for x in pair):
            raise ValueError(f'{flag or found[-1]}={value}; expected a dictionary such as \'{{"a": "b"}}\'')
        found += [*filter(None, [flag]), *(part for pair in pairs.items() for part in pair)]
    return found


def lerobot_flags(argv: list[str]) -> list[str]:
    """Flags in the spelling of LeRobot's commands as those of this script; others stay as they are.

    Raises ValueError for one of LeRobot's that has no meaning here.
    """
    renamed = {"policy.path": "policy-path", "wandb.enable": "wandb", "dataset.episodes": "episodes"}
    renamed |= {"rename_map": "env.rename-map"}
    renamed |= {"peft.r": "policy.lora-rank", "policy.optimizer_lr": "lr"}
    renamed |= {"policy.optimizer_weight_decay": "weight-decay", "policy.optimizer_grad_clip_norm": "grad-clip"}
    renamed |= {"policy.scheduler_warmup_steps": "warmup-steps"}
    refused = {  # and what sets it
        "policy.optimizer_betas": "--optimizer, --lr",
        "policy.scheduler_decay_steps": "--steps",
        "policy.device": "the variable CUDA_VISIBLE_DEVICES",
        "policy.use_amp": "--mixed-precision",
        "policy.pretrained_path": "--policy.path",
        "policy.stage2": "--policy.vla",
        "wandb.project": "the variable WANDB_PROJECT",
        "job_name": "the variable WANDB_NAME",
    }
    fixed = {"policy.type": "hlrp", "resume": "true", "peft.method_type": "LORA"}  # what holds without a flag
    found, dataset = [], {}
    tokens = [part for token in dicts(argv) for part in (token.split("=", 1) if token.startswith("--") else [token])]
    while tokens:
        flag = tokens.pop(0)
        if not flag.startswith("--"):
            found.append(flag)
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
        found += [f"--{name}", *(value for value in values if value not in ("true", "false"))]
    if dataset:
        found += ["--data", f"lerobot:{dataset.get('dataset.root', dataset.get('dataset.repo_id'))}"]
    return found


def settings_given(argv: list[str]) -> frozenset[str]:
    """The names of the policy's settings that a command line gives, whatever their values."""
    flags = [token.removeprefix("--policy.") for token in argv if token.startswith("--policy.")]
    return frozenset(flag.split(".")[0].removeprefix("no-").replace("-", "_") for flag in flags)
