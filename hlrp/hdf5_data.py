"""Demonstrations in HDF5: `hdf5:FILE_OR_DIR?camera=KEY,KEY&state=KEY,KEY[:7]&action=KEY&task=KEY&fps=N`.

Two layouts, told apart by what a file holds:

    robomimic, LIBERO   data/demo_N/obs/KEY and data/demo_N/actions: several episodes a file. Attributes of `data` are
                        JSON: env_args has the control frequency, problem_info LIBERO's instruction. RoboCasa has it in
                        ep_meta of the demo. mask/NAME lists some of the demos.
    ALOHA, ACT          observations/images/CAMERA, observations/qpos and action: one episode a file

A camera is uint8 (t, h, w, 3), or a JPEG or PNG for each frame: rows padded with zeros to one length, or of lengths of
their own. ALOHA's compress_len is not needed, since neither format ends with a zero. Frames are given as they are
stored. LIBERO's stand on their heads, as robosuite draws them: `?flip=` turns them.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from hlrp.checkpoints import contents_hash
from hlrp.contract import Column, Indices, Source, parse_columns
from hlrp.images import JPEG, PNG, decode_all
from hlrp.video_index import unreadable
from hlrp.videos import files_in, read_task

logger = logging.getLogger(__name__)
SUFFIXES = (".hdf5", ".h5")
NUM_OPEN = 16  # files that a process keeps open
OBSERVATIONS = ("obs", "observations")  # group of what the robot sees in an episode
TEXTS = ("language_instruction", "instruction", "task")  # attributes that may hold the instruction
FLIPS = {None: (), "vertical": (2,), "horizontal": (3,), "both": (2, 3)}  # axes of frames (t, c, h, w)


class Episode(NamedTuple):
    path: Path
    group: str  # its group in the file
    length: int
    fps: float
    task: str
    numbers: dict[str, np.ndarray]  # state and action, float32 (t, n)

    def __str__(self) -> str:
        return str(self.path) if self.group == "/" else f"{self.path}, {self.group}"


class HDF5Data(Source):
    """One camera of the demonstrations in a file or a folder. Further ones are views for a policy.

    camera: keys by commas: whole paths in an episode, or the last parts of them. state, action: likewise, side by side,
    each with a range of its numbers or whole; "" for none. Without these, one thing must fit: one camera; `qpos`, or
    the only floats of the observations; `actions` or `action`.
    task: attribute or text that holds the instruction (default: NAME.txt beside NAME.hdf5, the attributes named above,
    or the name of a file NAME_demo.hdf5).
    mask: the demos that mask/NAME lists. flip: vertical, horizontal or both. bgr: whether red and blue are exchanged
    in its frames, which are then given as they should be.
    skip_broken: leave out files and episodes that cannot be read, log them and count them in `num_skipped`.
    Raises ValueError, which lists what is there, where a key fits nothing, or several things fit.
    """

    def __init__(
        self,
        location: str | Path,
        camera: str | None = None,
        state: str | None = None,
        action: str | None = None,
        task: str | None = None,
        fps: float | None = None,
        mask: str | None = None,
        flip: str | None = None,
        bgr: bool = False,
        uri: str | None = None,
        skip_broken: bool = False,
    ):
        path = Path(location).expanduser()
        self.uri, self.name = uri or f"hdf5:{location}", f"hdf5-{path.stem}"
        if fps is not None and not 0 < fps < float("inf"):
            raise ValueError(f"{self.uri}: expected fps above 0, got {fps:g}")
        if flip not in FLIPS:
            raise ValueError(f"{self.uri}: expected flip=vertical, horizontal or both, got {flip}")
        self.flip, self.is_bgr = FLIPS[flip], bgr
        self.keys: dict[str, list[Column]] = {}
        self.episodes: list[Episode] = []
        errors: list[ValueError] = []
        for file_path in find_files(self.uri, path):
            try:
                file, groups = open_demos(file_path, mask)
            except ValueError as error:
                errors.append(error)
                continue
            with file:
                for group in groups:
                    self.keys = self.keys or choose_keys(self.uri, file[group], camera, state, action)
                    try:
                        self.episodes.append(self._episode(file, file_path, group, task, fps))
                    except ValueError as error:
                        errors.append(error)
        if errors and (not skip_broken or not self.episodes):
            more = f"; {len(errors)} files or episodes are broken in all" if len(errors) > 1 else ""
            raise ValueError(f"{self.uri}, {errors[0]}{more}")
        for error in errors:
            logger.warning("skipped %s, %s", self.uri, error)
        self.num_skipped = len(errors)

        self.lengths = np.array([episode.length for episode in self.episodes])
        self.fps = np.array([episode.fps for episode in self.episodes])
        self.state_dim, self.action_dim = (
            self.episodes[0].numbers[kind].shape[1] if self.keys[kind] else 0 for kind in ("state", "action")
        )
        cameras = [column.path for column in self.keys["camera"]]
        if camera is not None:
            self.name += f"-{cameras[0].rpartition('/')[2]}"
        self._show(cameras[0])
        others = [copy(self)._show(key) for key in cameras[1:]]
        self.views = {view.camera: view for view in others}

        paths = list(dict.fromkeys(episode.path for episode in self.episodes))
        digest = hashlib.sha256(repr((contents_hash(paths), self.keys, self.flip, self.is_bgr)).encode())
        for episode in self.episodes:
            digest.update(repr((paths.index(episode.path), *episode[1:5])).encode())
            for array in episode.numbers.values():
                digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def _show(self, key: str) -> "HDF5Data":
        """Makes this the source of the camera `key`, named as LeRobot names cameras."""
        self.key, self.camera = key, f"observation.images.{key.rpartition('/')[2]}"
        return self

    def _episode(self, file: h5py.File, path: Path, name: str, task: str | None, fps: float | None) -> Episode:
        episode = Episode(path, name, 0, 0.0, "", {})
        group: Any = file[name]
        numbers = {}
        with naming(episode):
            lengths = {}
            for column in (column for columns in self.keys.values() for column in columns):
                if not is_column(group.get(column.path)):
                    raise ValueError(f"expected {column.path}, got {', '.join(datasets(group)) or 'nothing'}")
                lengths[column.path] = len(group[column.path])
            length = max(lengths.values())
            if length != min(lengths.values()) or not length:
                raise ValueError(f"expected one row or more, of each as many, got {lengths}")
            for kind in ("state", "action"):
                if self.keys[kind]:
                    numbers[kind] = read_numbers(group, self.keys[kind])
                    expected = (self.episodes[0].numbers if self.episodes else numbers)[kind].shape[1]
                    if numbers[kind].shape[1] != expected:
                        found = numbers[kind].shape[1]
                        raise ValueError(f"expected {expected} numbers of {kind} as in {self.episodes[0]}, got {found}")
            fps = frame_rate(file) if fps is None else fps
            return Episode(path, name, length, fps, instruction(file, path, name, task), numbers)

    def read(self, episode: int, indices: Indices) -> dict:
        at, indices = self.episodes[episode], np.asarray(indices)
        if indices.min() < 0 or indices.max() >= at.length:
            raise ValueError(f"{at}: expected frame numbers below {at.length}, got {indices.min()} to {indices.max()}")
        wanted, position = np.unique(indices, return_inverse=True)
        with naming(at):
            file: Any = open_file(at.path)
            dataset = file[at.group][self.key]
            if dataset.ndim == 4:
                frames = np.empty((len(wanted), *dataset.shape[1:]), dtype=np.uint8)  # t h w c
                for i, number in enumerate(wanted.tolist()):
                    dataset.read_direct(frames, np.s_[number], np.s_[i])
                frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
            else:
                encoded = [image_bytes(dataset[number]) for number in wanted.tolist()]
                frames = decode_all(encoded, lambda i: f"{self.key}, frame {wanted[i]}")
        if self.is_bgr:
            frames = frames.flip(1)
        frames = frames.flip(self.flip)
        read = {"frames": frames if np.array_equal(wanted, indices) else frames[position], "task": at.task}
        if self.state_dim:
            read["state"] = self.states(episode, indices)
        return read

    def instructions(self, episode: int, indices: Indices) -> list[str]:
        return [self.episodes[episode].task] * len(indices)

    def actions(self, episode: int, indices: Indices) -> Tensor:
        return torch.from_numpy(self.episodes[episode].numbers["action"][np.asarray(indices)])

    def states(self, episode: int, indices: Indices) -> Tensor:
        return torch.from_numpy(self.episodes[episode].numbers["state"][np.asarray(indices)])

    def place(self, episode: int) -> str:
        return str(self.episodes[episode])


@contextmanager
def naming(episode: Episode) -> Iterator[None]:
    """Errors of what a file holds become ValueErrors that name file and episode."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, KeyError) as error:  # h5py raises any of them for a damaged file
        raise ValueError(f"{episode}: {error}") from error


def open_file(path: Path) -> h5py.File:
    """Opens a file once in each process."""
    return _open(path, os.getpid())


@lru_cache(maxsize=NUM_OPEN)
def _open(path: Path, process: int) -> h5py.File:
    """The process is part of the key: a forked one must not share the open files of its parent."""
    return h5py.File(path, "r", locking="best-effort")  # some file systems of clusters have no locks


def find_files(uri: str, path: Path) -> list[Path]:
    if path.is_file():
        return [path.resolve()]
    files = sorted(p for p in files_in(path.resolve()) if p.suffix in SUFFIXES and p.name[0] != ".")
    if not files:
        what = "folder without such files" if path.is_dir() else "no file or folder"
        raise ValueError(f"{uri}: expected a file or a folder of {' or '.join(SUFFIXES)}, got a {what}")
    return files


def open_demos(path: Path, mask: str | None) -> tuple[Any, list[str]]:
    """An open file, and the groups of its episodes. Raises ValueError where there is none."""
    try:
        file = h5py.File(path, "r", locking="best-effort")
        groups = demos(file, mask)
    except (OSError, RuntimeError, KeyError) as error:
        raise unreadable(path, "HDF5 file", error) from error
    if not groups:
        found = ", ".join(file) or "nothing"
        file.close()
        expected = "data/demo_0/obs, as robomimic and LIBERO have it, or observations and action, as ALOHA has it"
        raise ValueError(f"{path}: expected {expected}, got {found}")
    return file, groups


def demos(file: Any, mask: str | None) -> list[str]:
    if any(name in file for name in OBSERVATIONS):
        return ["/"]
    data, masks = file.get("data"), file.get("mask", {})
    if not isinstance(data, h5py.Group):
        return []
    if mask is not None and mask not in masks:
        raise ValueError(f"{file.filename}: mask={mask}; its masks: {', '.join(masks) or 'none'}")
    names = [str(name) for name in data if isinstance(data[name], h5py.Group)]
    chosen = names if mask is None else {to_text(name) for name in masks[mask][()]}
    numbers = {name: [int(number) for number in re.findall(r"\d+", name)] for name in names}
    return [f"data/{name}" for name in sorted(names, key=numbers.__getitem__) if name in chosen]


def is_column(thing) -> bool:
    return isinstance(thing, h5py.Dataset) and thing.ndim > 0


def datasets(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """The columns of an episode by their paths, without robomimic's copy of the observations one step later."""
    found = {}
    group.visititems(lambda path, thing: found.update({path: thing}) if is_column(thing) else None)
    return {path: dataset for path, dataset in found.items() if not path.startswith("next_obs/")}


def is_camera(dataset: h5py.Dataset) -> bool:
    """Whether a column is of RGB frames of 8 bits, encoded or not."""
    if dataset.dtype == np.uint8 and dataset.ndim == 4:
        return dataset.shape[-1] == 3
    has_rows = dataset.dtype.kind == "S" or h5py.check_vlen_dtype(dataset.dtype) == np.uint8
    if not len(dataset) or not (has_rows if dataset.ndim == 1 else dataset.ndim == 2 and dataset.dtype == np.uint8):
        return False
    return image_bytes(dataset[0]).startswith((JPEG, PNG))


def image_bytes(row: np.ndarray | bytes) -> bytes:
    """An encoded frame without the zeros behind it: neither JPEG nor PNG ends with one."""
    return (row if isinstance(row, bytes) else row.tobytes()).rstrip(b"\0")


def choose_keys(
    uri: str, group: h5py.Group, camera: str | None, state: str | None, action: str | None
) -> dict[str, list[Column]]:
    """The columns of cameras, state and action, by what an episode holds."""
    columns = datasets(group)
    cameras = {path for path, dataset in columns.items() if is_camera(dataset)}
    numbers = {p: d for p, d in columns.items() if p not in cameras and d.dtype.kind in "fiub"}
    seen = [p for p, d in numbers.items() if p.split("/")[0] in OBSERVATIONS and d.dtype.kind == "f" and d.ndim <= 2]
    known = {
        "camera": sorted(cameras),
        "state": [path for path in seen if path.endswith("/qpos")] or seen,
        "action": [path for path in ("actions", "action") if path in numbers],
    }
    chosen = {}
    for kind, keys in (("camera", camera), ("state", state), ("action", action)):
        there = sorted(cameras if kind == "camera" else numbers)
        listed = ", ".join(f"{p} {list(columns[p].shape[1:])}" for p in there) or "none"
        if keys is None:
            if len(known[kind]) > 1 or (kind == "camera" and not cameras):
                none = "" if kind == "camera" else f", or ?{kind}= for none"
                raise ValueError(f"{uri}: expected ?{kind}=KEY, or several by commas{none}; it has {listed}")
            chosen[kind] = [Column(path, slice(None)) for path in known[kind]]
            continue
        chosen[kind] = []
        for column in parse_columns(uri, kind, keys):
            found = [p for p in there if p == column.path] or [p for p in there if f"/{p}".endswith(f"/{column.path}")]
            if len(found) != 1 or (kind == "camera" and column.range != slice(None)):
                several = " is the end of several names" if len(found) > 1 else ""
                raise ValueError(f"{uri}: {kind}={column}{several}; expected one of {listed}")
            chosen[kind].append(Column(found[0], column.range))
    if not chosen["camera"]:
        raise ValueError(f"{uri}: expected a camera, got none; it has {', '.join(sorted(cameras)) or 'none'}")
    return chosen


def read_numbers(group: Any, columns: Sequence[Column]) -> np.ndarray:
    """Columns side by side, float32 (t, n). Raises ValueError where they are not finite."""
    parts = []
    for path, numbers in columns:
        part = group[path][()]
        with np.errstate(over="ignore"):
            part = part.reshape(len(part), -1)[:, numbers].astype(np.float32)
        if not part.shape[1]:
            raise ValueError(f"{Column(path, numbers)}: expected one number or more, got none")
        for row in np.flatnonzero(~np.isfinite(part).all(axis=1))[:1].tolist():
            raise ValueError(f"{path}, row {row}: expected finite numbers, got {part[row].tolist()}")
        parts.append(part)
    return np.concatenate(parts, axis=1)


def to_text(value) -> str:
    """An attribute, or a text in a file, as h5py gives it."""
    value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    return value.decode() if isinstance(value, bytes) else str(value)


def to_json(attributes, name: str) -> dict:
    """A JSON object among attributes; empty where there is none."""
    try:
        content = json.loads(to_text(attributes.get(name, "{}")))
    except ValueError as error:
        raise ValueError(f"{name}: not readable as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def frame_rate(file: h5py.File) -> float:
    arguments = to_json(file["data"].attrs, "env_args") if "data" in file else {}
    rate = (arguments.get("env_kwargs") or {}).get("control_freq")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < float("inf"):
        raise ValueError(f"expected control_freq in env_args, or ?fps=20 or another rate, got {rate}")
    return float(rate)


def instruction(file: h5py.File, path: Path, name: str, key: str | None) -> str:
    """The instruction of an episode; "" where there is none."""
    places = [file[name], *([file["data"]] if "data" in file else []), file]
    if key is not None:
        for place in places:
            if key in place.attrs or is_text(place.get(key)):
                return to_text(place.attrs[key] if key in place.attrs else place[key][()]).strip()
        known = [name for place in places for name in (*place.attrs, *(k for k in place if is_text(place.get(k))))]
        raise ValueError(f"task={key}; expected one of {', '.join(dict.fromkeys(known)) or 'none'}")
    found = [read_task(path.with_suffix(".txt"))]
    for place in places:
        found += [to_text(place.attrs[text]) for text in TEXTS if text in place.attrs]
        found += [to_json(place.attrs, "ep_meta").get("lang"), problem(place)]
    text = next((text.strip() for text in found if isinstance(text, str) and text.strip()), "")
    of_file = re.fullmatch(r"(?:[A-Z_]+_SCENE\d+_)?(.+)_demo", path.stem)
    return text or (of_file[1].replace("_", " ") if of_file else "")


def problem(place: h5py.Group) -> str:
    text = to_json(place.attrs, "problem_info").get("language_instruction", "")
    return text if isinstance(text, str) else " ".join(map(str, text))


def is_text(thing) -> bool:
    return isinstance(thing, h5py.Dataset) and thing.size == 1 and thing.dtype.kind in "SO"
