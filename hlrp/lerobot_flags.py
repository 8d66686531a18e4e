"""Flags as LeRobot's commands spell them, for `finetune_policy.py`."""

from dataclasses import fields
from typing import Annotated, TypedDict

from lerobot.configs import NormalizationMode
from tyro.conf import Fixed, Suppress, arg


class Normalization(TypedDict):
    """`normalization_mapping` of a policy."""

    VISUAL: NormalizationMode  # how pixels are normalised
    STATE: NormalizationMode  # how the robot's state is normalised
    ACTION: NormalizationMode  # how actions are normalised


NO_FLAGS = {  # settings of a policy that finetune_policy.py sets itself, or has under another name
    *("device", "use_amp", "use_peft", "pretrained_path", "pretrained_revision", "stage2"),
    *("input_features", "output_features", "optimizer_lr", "optimizer_weight_decay", "optimizer_betas"),
    *("optimizer_grad_clip_norm", "scheduler_warmup_steps", "scheduler_decay_steps"),
}
HELP = {  # where LeRobot's own says nothing, or something else
    "n_obs_steps": "frames of each camera that the policy sees, one step apart; the last is now",
    "push_to_hub": "upload the policy to the Hugging Face hub when training ends",
    "repo_id": "where to upload the policy: USER/NAME",
    "private": "make the uploaded repository private; None: as your account on the hub has it",
    "tags": "tags of the uploaded policy",
    "license": "license of the uploaded policy",
}


def make_flags(policy: type) -> None:
    """Has tyro make flags of a policy's config: it reads annotations, and LeRobot's parser the types of fields."""
    types = {field.name: field.type for field in fields(policy)}
    policy.__annotations__ |= {name: Suppress[Fixed[types[name]]] for name in NO_FLAGS}
    policy.__annotations__ |= {name: Annotated[types[name], arg(help=text)] for name, text in HELP.items()}
    mapping = types["normalization_mapping"]
    policy.__annotations__["normalization_mapping"] = Annotated[mapping, arg(constructor=Normalization)]


def lerobot_flags(argv: list[str]) -> list[str]:
    """Flags in the spelling of LeRobot's commands as those of this script; others stay as they are.

    Raises ValueError for one of LeRobot's that has no meaning here.
    """
    renamed = {"policy.path": "policy-path", "wandb.enable": "wandb", "dataset.episodes": "episodes"}
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
    tokens = [part for token in argv for part in (token.split("=", 1) if token.startswith("--") else [token])]
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


def policy_settings(argv: list[str]) -> frozenset[str]:
    """The names of the policy's settings that a command line gives, whatever their values."""
    flags = [token.removeprefix("--policy.") for token in argv if token.startswith("--policy.")]
    return frozenset(flag.split(".")[0].removeprefix("no-").replace("-", "_") for flag in flags)
