"""Robot data in RLDS, the published form of Open X-Embodiment: `rlds:DIR_OR_URL?split=train,val&camera=KEY&fps=N`.

The format is that of Ramos et al. 2021 (arXiv:2111.02767), as TensorFlow Datasets writes it: dataset_info.json lists
the files, features.json gives the type of each value, and a record of a file is a whole episode. A camera and a frame
rate must be known: from the URI, or from the table `DATASETS`, which has the data sets of the Octo mixture by name.

Keys in the table are names in a data set's features.json, as the TFDS catalogue lists them
(tensorflow.org/datasets/catalog). Cameras, states and actions are Octo's choice (Octo Model Team 2024,
arXiv:2405.12213; octo/data/oxe/oxe_{dataset_configs,standardization_transforms}.py), but the values stay as published:
no sign is turned, no gripper command is made absolute, nothing is padded. taco_play differs: Octo reads the gripper
from column 7 of its state, which is a joint; by its description the gripper is column 6.

fps: the control frequencies in the Open X-Embodiment Collaboration's sheet of data sets (arXiv:2310.08864), as RDT-1B
(arXiv:2410.07864, configs/dataset_control_freq.json) and openx2lerobot (oxe_utils/configs.py) both copied them. RLDS
files have no time stamps that could confirm them.

bgr: the cameras whose published frames have red and blue exchanged (kpertsch/rlds_dataset_mod, prepare_open_x.sh). That
script makes all frames 256 pixels square and mends the channels, so frames of that size count as mended.

share [%]: from Octo's model card (huggingface.co/rail-berkeley/octo-base-1.5), which has 25 data sets. NYU Door Opening
(0.1 %) is left out, since its only camera is in the hand; the card gives UCSD Kitchen as < 0.1. The weights in Octo's
oxe_dataset_mixes.py are something else: they are multiplied by the number of frames of a data set.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hlrp.checkpoints import contents_hash
from hlrp.contract import Column, Stream, parse_columns
from hlrp.images import decode
from hlrp.streams import Episode, LateFrames
from hlrp.tfrecord import (
    NUMBERS,
    Example,
    Feature,
    Record,
    open_file,
    parse_example,
    read_features,
    read_records,
    read_strings,
    read_tensor,
)

FOLDERS = {  # where a key is searched, in this order
    "camera": ("steps/observation/", "steps/", ""),
    "instruction": ("steps/", "steps/observation/", ""),
    "state": ("steps/observation/", "steps/", ""),
    "action": ("steps/action/", "steps/", "steps/observation/", ""),
}
DEFAULTS = {  # the first of these that exists
    "instruction": ("language_instruction", "natural_language_instruction"),
    "state": ("state", "proprio"),
    "action": ("action",),
}
MENDED = (256, 256)  # size of frames whose channels rlds_dataset_mod has exchanged back
FILE_NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class RLDS(Stream):
    """One camera of an RLDS dataset, as a stream (`hlrp.streams`). A shard is one file.

    The facts of an episode are its features that have one number or one text for the whole episode, by their paths,
    such as episode_metadata/file_path; a feature `success` without a group is episode/success.

    location: the folder with features.json, or the folder above it if that has only one version.
    split: names of splits, separated by commas. camera, instruction: keys of an observation, or whole paths.
    action, state: keys separated by commas, each whole or with a range of its numbers, `action[:7]`; "" for none.
    Default: those in `DATASETS`; for other data sets the feature of this name, and for an action made of several
    features all their floats, in the order of their names.
    bgr: whether red and blue are exchanged in the stored frames; a reader then gets them in the right order.
    skip_broken: whether a reader goes on behind a broken episode.
    Raises ValueError for a setting that the data set does not have, and for missing files.
    """

    def __init__(
        self,
        location: str | Path,
        split: str = "train",
        camera: str | None = None,
        instruction: str | None = None,
        fps: float | None = None,
        state: str | None = None,
        action: str | None = None,
        bgr: bool | None = None,
        uri: str | None = None,
        name: str | None = None,
        skip_broken: bool = False,
    ):
        self.uri, self.skip_broken = uri or f"rlds:{location}", skip_broken
        root, files = find_version(self.uri, str(location))
        info, features = (read_json(self.uri, f"{root}/{file}") for file in ("dataset_info.json", "features.json"))
        self.features = read_features(self.uri, features)
        known = DATASETS.get(info["name"])

        self.files, self.num_records = list_shards(self.uri, info, split, root, files)
        self.num_shards = len(self.files)
        self.camera_path = self._choose_camera(camera or (known and known.camera))
        self.camera = self.camera_path.removeprefix("steps/observation/")
        self.instruction_path = self._choose_instruction(instruction or (known and known.instruction))
        rate = known.fps if known and fps is None else fps
        if rate is None or not 0 < rate < math.inf:
            raise ValueError(
                f"{self.uri}: fps={fps}, and that of {info['name']} is not known; expected ?fps=10 or another rate"
            )
        self.fps = rate

        self.action = self._choose_columns("action", known.action if known and action is None else action)
        self.state = self._choose_columns("state", known.state if known and state is None else state)
        self.action_dim, self.state_dim = map(self._num_numbers, (self.action, self.state))
        size = self.features[self.camera_path].shape[:2]
        is_exchanged = bool(known and self.camera in known.bgr and size != MENDED)
        self.is_bgr = is_exchanged if bgr is None else bool(bgr)
        self.facts = [
            path
            for path, feature in self.features.items()
            if feature.depth == 0 and feature.shape == () and feature.dtype in (*NUMBERS, "string")
        ]

        self.name = name or f"rlds-{info['name'].removesuffix(EXTERNAL)}" + (f"-{camera}" if camera else "")
        chosen = (self.camera_path, self.instruction_path, self.fps, self.action, self.state, self.is_bgr, split)
        what = repr((info, features, chosen, contents_hash(self.files)))
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()[:16]

    def episodes(self, shard: int) -> Iterator[Episode]:
        """Raises ValueError at a broken episode; if its end is known, next() then gives the one behind it."""
        return map(self._episode, read_records(self.files[shard], self.num_records[shard]))

    def _episode(self, record: Record) -> Episode:
        data = record.verified()
        try:
            example = parse_example(data)
            parts = {
                "frames": self._frames(example, record.name),
                "task": self._task(example),
                "action": self._numbers(example, self.action),
                "state": self._numbers(example, self.state),
                "facts": {
                    path if "/" in path else f"episode/{path}": self._value(example, path)
                    for path in self.facts
                    if path in example
                },
            }
        except ValueError as error:
            raise ValueError(f"{record.name}: {error}") from error
        return Episode(name=record.name, fps=self.fps, **parts)

    def _frames(self, example: Example, name: str) -> Sequence[bytes]:
        feature = self.features[self.camera_path]
        if feature.kind == "tensor":
            return Encoded(read_tensor(example, self.camera_path, feature), self.is_bgr, name)
        frames = read_strings(example, self.camera_path)
        return Encoded(frames, self.is_bgr, name) if self.is_bgr else frames

    def _task(self, example: Example) -> str | list[str]:
        """The task of each step, or one for the episode. Numbers are the bytes of a text, padded with zeros, as in
        language_table."""
        path = self.instruction_path
        if not path:
            return ""
        feature = self.features[path]
        if feature.dtype == "string":
            texts = read_strings(example, path)
        else:
            steps = read_tensor(example, path, feature)
            texts = [bytes(step.ravel().tolist()).split(b"\0")[0] for step in (steps if feature.depth else [steps])]
        decoded = {text: text.decode() for text in set(texts)}
        return [decoded[text] for text in texts] if len(decoded) > 1 else next(iter(decoded.values()), "")

    def _numbers(self, example: Example, columns: Sequence[Column]) -> np.ndarray | None:
        if not columns:
            return None
        values = {path: read_tensor(example, path, self.features[path]) for path, _ in columns}
        lengths = {path: len(value) for path, value in values.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"steps of {lengths} differ in number")
        parts = [values[path].reshape(lengths[path], math.prod(values[path].shape[1:])) for path, _ in columns]
        parts = [part[:, column.range] for part, column in zip(parts, columns, strict=True)]  # t a
        with np.errstate(over="ignore"):
            numbers = np.concatenate(parts, axis=1).astype(np.float32)
        for step in np.flatnonzero(~np.isfinite(numbers).all(axis=1)).tolist():
            names = ", ".join(path for path, _ in columns)
            raise ValueError(f"{names}, step {step}: expected finite numbers, got {numbers[step].tolist()}")
        return numbers

    def _value(self, example: Example, path: str) -> str | int | float | bool:
        if self.features[path].dtype == "string":
            (value,) = read_strings(example, path)
            return value.decode(errors="replace")
        return read_tensor(example, path, self.features[path]).item()

    def _choose_camera(self, key: str | None) -> str:
        def is_camera(feature: Feature) -> bool:
            is_array = feature.kind == "tensor" and len(feature.shape) == 3 and min(feature.shape) > 0
            is_rgb = feature.dtype == "uint8" and feature.shape[-1:] == (3,)
            return is_rgb and feature.depth == 1 and (is_array or feature.kind == "image")

        cameras = [path for path, feature in self.features.items() if is_camera(feature)]
        names = ", ".join(path.removeprefix("steps/observation/") for path in cameras) or "none"
        if key is None:
            if len(cameras) != 1:
                raise ValueError(f"{self.uri}: several cameras; expected ?camera=KEY with one of {names}")
            return cameras[0]
        path = self._find("camera", key, names)
        if path not in cameras:
            raise ValueError(f"{self.uri}: camera={key} has no RGB frames of 8 bits; these have: {names}")
        return path

    def _choose_instruction(self, key: str | None) -> str:
        if key is None:
            paths = [folder + key for key in DEFAULTS["instruction"] for folder in FOLDERS["instruction"]]
            return next((path for path in paths if path in self.features), "")
        texts = [path for path, feature in self.features.items() if feature.dtype == "string"]
        path = self._find("instruction", key, ", ".join(texts) or "none")
        if self.features[path].dtype != "string":
            self._check_numbers("instruction", path)
        return path

    def _choose_columns(self, setting: str, keys: str | None) -> list[Column]:
        if keys is None:
            whole = [folder + key for key in DEFAULTS[setting] for folder in FOLDERS[setting]]
            inside = [
                path
                for path, feature in sorted(self.features.items())
                if path.startswith("steps/action/") and "float" in feature.dtype and setting == "action"
            ]
            paths = [path for path in whole if path in self.features][:1] or inside
            keys = ",".join(paths)
        return [self._column(setting, column) for column in parse_columns(self.uri, setting, keys)]

    def _column(self, setting: str, wanted: Column) -> Column:
        known = ", ".join(path for path, feature in self.features.items() if feature.dtype in NUMBERS)
        column = Column(self._find(setting, wanted.path, known), wanted.range)
        self._check_numbers(setting, column.path)
        if not self._num_numbers([column]):
            raise ValueError(
                f"{self.uri}: {setting}={wanted} of {self._num_numbers([Column(column.path, slice(None))])} numbers; "
                "expected a key, or a range of its numbers such as KEY[:7]"
            )
        return column

    def _num_numbers(self, columns: Sequence[Column]) -> int:
        return sum(len(range(math.prod(self.features[path].shape))[part]) for path, part in columns)

    def _check_numbers(self, setting: str, path: str) -> None:
        feature = self.features[path]
        is_constant = min(feature.shape, default=1) > 0
        if feature.dtype not in NUMBERS or feature.kind == "image" or feature.depth != 1 or not is_constant:
            raise ValueError(
                f"{self.uri}: {setting}={path} is a {feature.kind} of {feature.dtype or '?'} {list(feature.shape)}; "
                "expected numbers of a constant shape in each step"
            )

    def _find(self, setting: str, key: str, known: str) -> str:
        for folder in FOLDERS[setting]:
            if folder + key in self.features:
                return folder + key
        raise ValueError(f"{self.uri}: {setting}={key} is not in features.json; expected one of {known}")


def open_rlds(location: str, uri: str, skip_broken: bool, root: str | None = None, **options) -> RLDS:
    """Opens the data set of a URI. Raises ValueError for a mixture, which `hlrp.sources.expand` takes apart."""
    if location in MIXTURES or root is not None:
        parts = [part for part, _ in mixture(location, root)] if location in MIXTURES else [f"rlds:{location}"]
        raise ValueError(f"{uri}: a mixture of several sources; expected one of them, such as {parts[0]}")
    return RLDS(location, **options, uri=uri, skip_broken=skip_broken)


class Encoded(LateFrames):
    """Frames that are stored as arrays, or with red and blue exchanged. Each is encoded as a PNG when it is asked for.

    frames: encoded, or uint8 (t, h, w, c); is_bgr: whether red and blue are exchanged in them.
    """

    def __init__(self, frames: Sequence[bytes] | np.ndarray, is_bgr: bool, name: str):
        self.frames, self.is_bgr, self.name = frames, is_bgr, name
        self.nbytes = frames.nbytes if isinstance(frames, np.ndarray) else sum(map(len, frames))

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> bytes:
        frame = self.frames[index]
        if isinstance(frame, bytes):
            pixels = decode(frame, f"{self.name}, frame {index}")
        else:
            pixels = torch.from_numpy(frame).permute(2, 0, 1)  # h w c -> c h w
        if self.is_bgr:
            pixels = pixels.flip(0)
        from torchvision.io import encode_png

        return encode_png(pixels.contiguous(), compression_level=1).numpy().tobytes()


def find_version(uri: str, location: str) -> tuple[str, list[str]]:
    """The folder that has features.json, `location` or the only version below it, and the names of its files."""
    if "://" not in location:
        location = str(Path(location).expanduser())
    location = location.rstrip("/")
    files = list_folder(uri, location)
    if "features.json" in files:
        return location, files
    versions = [file for file in files if re.fullmatch(r"\d+\.\d+\.\d+", file)]
    known = DATASETS.get(location.rsplit("/", 1)[-1])
    if known and known.version in versions:
        versions = [known.version]
    if len(versions) != 1:
        names = ", ".join(sorted(versions or files)[:20]) or "nothing"
        raise ValueError(
            f"{uri}: expected a folder with features.json, or with a single version of it, got one with {names}"
        )
    location += f"/{versions[0]}"
    return location, list_folder(uri, location)


def list_folder(uri: str, location: str) -> list[str]:
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(location)
        return [file.rstrip("/").rsplit("/", 1)[-1] for file in filesystem.ls(path, detail=False)]
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"{uri}: {location} cannot be listed: {error!r}") from error


def read_json(uri: str, path: str) -> dict:
    try:
        with open_file(path) as file:
            return json.loads(file.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{uri}: {path} cannot be read: {error!r}") from error


def list_shards(uri: str, info: dict, split: str, root: str, files: Sequence[str]) -> tuple[list[str], list[int]]:
    """The files of the splits, whose names are separated by commas, and the number of records in each."""
    splits = {entry["name"]: entry for entry in info["splits"]}
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise ValueError(f"{uri}: files of format {file_format}; expected tfrecord")
    shards = {}
    for name in split.split(","):
        if name not in splits:
            raise ValueError(f"{uri}: split={name}; expected one of {', '.join(splits)}")
        lengths = splits[name]["shardLengths"]
        for number, length in enumerate(lengths):
            file = (splits[name].get("filepathTemplate") or FILE_NAME).format(
                DATASET=info["name"],
                SPLIT=name,
                FILEFORMAT=file_format,
                SHARD_INDEX=f"{number:05d}",
                NUM_SHARDS=f"{len(lengths):05d}",
                SHARD_X_OF_Y=f"{number:05d}-of-{len(lengths):05d}",
            )
            shards[file] = int(length)
    missing = sorted(shards.keys() - set(files))
    if missing:
        raise ValueError(f"{uri}: {len(missing)} of {len(shards)} files are missing in {root}, such as {missing[0]}")
    return [f"{root}/{file}" for file in shards], list(shards.values())


BUCKET = "gs://gresearch/robotics"  # where the collection is published


class OpenX(NamedTuple):
    fps: float  # control frequency [Hz]
    share: float  # in octo24 [%]
    camera: str
    instruction: str
    action: str  # keys by commas, each with a range of its numbers or without, such as action[:7]
    state: str  # likewise; "" where there is none
    bgr: tuple[str, ...] = ()
    version: str = "0.1.0"  # of several, the one that this describes


EXTERNAL = "_converted_externally_to_rlds"
TEXT, NATURAL = "language_instruction", "natural_language_instruction"
MOVE, GRIPPER = "world_vector,rotation_delta", "gripper_closedness_action"
POSE = "base_pose_tool_reached"

# fmt: off
DATASETS = {
    "fractal20220817_data": OpenX(3, 17.0, "image", NATURAL, f"{MOVE},{GRIPPER}", f"{POSE},gripper_closed"),
    "kuka": OpenX(10, 17.0, "image", NATURAL, f"{MOVE},{GRIPPER}", f"clip_function_input/{POSE},gripper_closed"),
    "bridge_dataset": OpenX(5, 17.0, "image_0", TEXT, "action", "state", version="1.0.0"),
    "bc_z": OpenX(
        10, 9.1, "image", NATURAL, "future/xyz_residual[:3],future/axis_angle_residual[:3],future/target_close[:1]",
        "present/xyz,present/axis_angle,present/sensed_close"),
    f"stanford_hydra_dataset{EXTERNAL}": OpenX(
        10, 6.0, "image", TEXT, "action", "state[:3],state[7:10],state[-3:-2]", bgr=("image", "wrist_image")),
    "language_table": OpenX(10, 5.9, "rgb", "instruction", "action", "effector_translation"),
    "taco_play": OpenX(15, 3.6, "rgb_static", NATURAL, "rel_actions_world", "robot_obs[:7]"),
    f"furniture_bench_dataset{EXTERNAL}": OpenX(10, 3.3, "image", TEXT, "action", "state[:7],state[-1:]"),
    "utaustin_mutex": OpenX(20, 3.0, "image", TEXT, "action", "state[:8]", bgr=("image", "wrist_image")),
    f"austin_sailor_dataset{EXTERNAL}": OpenX(20, 2.9, "image", TEXT, "action", "state"),
    "roboturk": OpenX(10, 2.8, "front_rgb", NATURAL, f"{MOVE},{GRIPPER}", ""),
    "toto": OpenX(30, 2.4, "image", NATURAL, f"{MOVE},open_gripper", "state"),
    f"austin_sirius_dataset{EXTERNAL}": OpenX(20, 2.3, "image", TEXT, "action", "state"),
    "berkeley_autolab_ur5": OpenX(
        5, 1.5, "image", NATURAL, f"{MOVE},{GRIPPER}", "robot_state[6:14]", bgr=("hand_image",)),
    f"iamlab_cmu_pickup_insert{EXTERNAL}": OpenX(20, 1.2, "image", TEXT, "action", "state[:8]"),
    "viola": OpenX(20, 1.2, "agentview_rgb", NATURAL, f"{MOVE},{GRIPPER}", "joint_states,gripper_states"),
    "berkeley_fanuc_manipulation": OpenX(
        10, 1.0, "image", TEXT, "action", "state[:7]", bgr=("image", "wrist_image")),
    f"nyu_franka_play_dataset{EXTERNAL}": OpenX(3, 0.9, "image", TEXT, "action[-8:-1]", "state[-6:]"),
    "jaco_play": OpenX(10, 0.6, "image", NATURAL, f"world_vector,{GRIPPER}", "end_effector_cartesian_pos"),
    "berkeley_cable_routing": OpenX(10, 0.3, "image", NATURAL, MOVE, "robot_state"),
    f"austin_buds_dataset{EXTERNAL}": OpenX(20, 0.3, "image", TEXT, "action", "state[:8]"),
    "cmu_stretch": OpenX(10, 0.2, "image", TEXT, "action[:7]", "state"),
    f"ucsd_kitchen_dataset{EXTERNAL}": OpenX(2, 0.1, "image", TEXT, "action[:7]", "state[:7]"),
    f"dlr_edan_shared_control{EXTERNAL}": OpenX(5, 0.1, "image", TEXT, "action", "state"),
}
# fmt: on

MIXTURES = {"octo24": {name: dataset.share for name, dataset in DATASETS.items()}}  # [%]

# bridge_dataset by the names that the bucket and OpenVLA give it, and its older release in the bucket
DATASETS["bridge_data_v2"] = DATASETS["bridge_orig"] = DATASETS["bridge_dataset"]
DATASETS["bridge"] = OpenX(5, 0, "image", NATURAL, f"{MOVE},open_gripper", "state")


def mixture(name: str, root: str | None) -> list[tuple[str, float]]:
    """The sources of a mixture: for each data set the URI of its folder in `root`, and its weight; weights sum to 1."""
    if name not in MIXTURES:
        raise ValueError(f"rlds:{name}: no mixture of this name; expected {', '.join(MIXTURES)}")
    if not root:
        raise ValueError(f"rlds:{name}: no folder of its data sets; expected ?root=DIR or ?root={BUCKET}")
    root, total = root.rstrip("/"), sum(MIXTURES[name].values())
    folders = {"bridge_dataset": "bridge_data_v2"} if root == BUCKET else {}  # tfds/robotics/rtx/rtx.py
    return [
        (f"rlds:{root}/{folders.get(dataset, dataset)}", share / total) for dataset, share in MIXTURES[name].items()
    ]
