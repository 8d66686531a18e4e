"""TAR files as `webdataset` has them: members that share a name up to its first dot are a sample, here one episode.

Members of an episode, by what follows the dot; all but the frames are optional:
    json              an object: fps; task, or instruction, text or caption; task_changes, [[0, TASK],
                      [FRAME, TASK], ...], if the task changes at a frame; facts, an object of whatever else is known
    txt               the task, if the JSON has none
    NAME.npy          state and action (t, n), timestamp (t,) [s], or any other array (t, ...)
    *.jpg, *.png, *.webp, *.yuv.npy   the frames, in the order of the numbers in their names; YUV 4:2:0 as in
                      `hlrp.images`
    mp4, webm, ...    or a video of all frames, as video2dataset writes it, which tells the frame rate
No pickle is read, not even inside an NPY: it is an error. So is any other member, unless the caller ignores it.
"""

import io
import json
import re
import tarfile
import tokenize
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from operator import itemgetter
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from hlrp.clips import SAMPLE_KEYS
from hlrp.contract import Indices
from hlrp.streams import VideoFrames

TAR: Any = tarfile  # with modes and errors that its types leave out
END = bytes(2 * tarfile.BLOCKSIZE)  # of a TAR
PICKLES = ("pickle", "pkl", "pyd", "pth", "pt")  # what webdataset would unpickle
IMAGES = ("jpg", "jpeg", "png", "webp")
VIDEOS = ("mp4", "m4v", "mov", "webm", "mkv")  # those whose packets tell their frames
YUV = "yuv.npy"


class Member(NamedTuple):
    name: str
    start: int  # of its data in the file [byte]
    data: bytes


@dataclass
class Sample:
    """One episode of a TAR, its members not decoded yet."""

    path: str
    key: str
    members: dict[str, Member] = field(default_factory=dict)  # what follows the key and a dot -> the member

    @cached_property
    def video(self) -> VideoFrames | None:
        """All frames of its video, where it has one in place of images."""
        videos = [member for suffix, member in self.members.items() if suffix.rpartition(".")[2] in VIDEOS]
        if not videos:
            return None
        if len(videos) > 1 or any(map(is_image, self.members)):
            found = f"{', '.join(self.members)}; ?ignore={videos[0].name.rpartition('.')[2]} leaves it out"
            raise ValueError(f"{self.path}: {self.key}: expected images or one video, got {found}")
        return VideoFrames(videos[0].data, f"{self.path}: {videos[0].name}")

    @property
    def num_frames(self) -> int:
        return sum(map(is_image, self.members)) if self.video is None else len(self.video)

    def frames(self) -> list[Member]:
        """The images by number: 10 comes after 9. Raises ValueError if there is none, or more than one kind."""
        suffixes = [suffix for suffix in self.members if is_image(suffix)]
        kinds = sorted({re.sub(r"\d+", "#", suffix) for suffix in suffixes})
        if not suffixes:
            raise ValueError(f"{self.path}: {self.key}: an episode without frames; expected .jpg, .png or .{YUV}")
        if len(kinds) > 1:
            raise ValueError(f"{self.path}: {self.key}: images of several kinds, {', '.join(kinds)}; expected one")
        numbers = {suffix: [int(number) for number in re.findall(r"\d+", suffix)] for suffix in suffixes}
        return [self.members[suffix] for suffix in sorted(suffixes, key=lambda suffix: numbers[suffix])]

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The arrays (t, ...) by name; state and action as float32 (t, n)."""
        num_frames, columns = self.num_frames, {}
        for suffix, member in self.members.items():
            if is_image(suffix) or not suffix.endswith(".npy"):
                continue
            name, place = suffix.removesuffix(".npy"), f"{self.path}: {member.name}"
            if name in SAMPLE_KEYS - {"state", "action"}:
                raise ValueError(f"{place}: a sample has its own {name}; expected an array of another name")
            array = to_array(member.data, place)
            if array.ndim == 0 or len(array) != num_frames:
                raise ValueError(f"{place}: of shape {array.shape}, but the episode has {num_frames} frames")
            columns[name] = as_column(name, array, place)
        return columns

    @cached_property
    def header(self) -> dict:
        """The JSON member, an object."""
        if "json" not in self.members:
            return {}
        place = f"{self.path}: {self.members['json'].name}"
        header = to_object(self.members["json"].data, place)
        facts_of(header, place)
        check_changes(header.get("task_changes"), place)
        return header

    @property
    def task(self) -> str | list[str]:
        """One task for the whole episode, or a list of one for each frame."""
        text = self.members.get("txt", Member("", 0, b""))
        num_frames = self.num_frames if "task_changes" in self.header else 1
        tasks = tasks_of(self.header, text.data, f"{self.path}: {text.name}", range(num_frames))
        return tasks if len(tasks) > 1 else tasks[0]

    def fps(self, default: float | None = None) -> float:
        """The frame rate of its video; or else in the JSON; or else of the time stamps, which must be regular to half a
        frame; or else the default [1/s]."""
        if self.video is not None:
            return self.video.fps
        fps, times = self.header.get("fps"), self.columns.get("timestamp", [])
        if fps is None and len(times) > 1:
            place = f"{self.path}: {self.members['timestamp.npy'].name}"
            fps = (len(times) - 1) / float(times[-1] - times[0]) if times[-1] > times[0] else 1.0
            if not np.abs(times - times[0] - np.arange(len(times)) / fps).max() <= 0.5 / fps:  # nan is not, either
                raise ValueError(f"{place}: not the times of a regular frame rate; expected fps in the JSON")
        fps = default if fps is None else fps
        if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < float("inf"):
            name = self.members["json"].name if "json" in self.members else f"{self.key}.json"
            given = "without a frame rate" if fps is None else f"fps={fps!r}"
            raise ValueError(f"{self.path}: {name}: {given}; expected fps there, {self.key}.timestamp.npy or ?fps=10")
        return float(fps)


def is_image(suffix: str) -> bool:
    return suffix.endswith((*IMAGES, YUV))


def as_column(name: str, array: np.ndarray, place: str) -> np.ndarray:
    """An array as it is; state and action as float32 (t, n). Raises ValueError if one of these is not finite."""
    if name not in ("state", "action"):
        return array
    with np.errstate(over="ignore"):
        array = array.reshape(len(array), -1).astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        frame = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(f"{place}: {name} of frame {frame}: expected finite numbers, got {array[frame].tolist()}")
    return array


def to_object(data: bytes, name: str) -> dict:
    """Parses a JSON object, which is cached: do not change it. Raises ValueError that begins with `name`."""
    try:
        content = _json(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: a JSON {type(content).__name__}; expected an object")
    return content


@lru_cache(maxsize=256)
def _json(data: bytes):
    return json.loads(data)


def facts_of(header: dict, name: str) -> dict:
    """The `facts` in a header, the JSON member `name`. Raises ValueError if they are no object, or use a name that
    means something else in a sample."""
    facts = header.get("facts", {})
    if not isinstance(facts, dict):
        raise ValueError(f"{name}: facts={facts!r}; expected an object")
    if taken := sorted(SAMPLE_KEYS & facts.keys()):
        raise ValueError(f"{name}: facts has {', '.join(taken)}, which a sample has itself; expected names of its own")
    return facts


def check_changes(changes, name: str) -> None:
    """Raises ValueError if the `task_changes` in the JSON member `name` cannot be used."""
    if changes is None:
        return
    is_list = isinstance(changes, list) and all(isinstance(change, list) and len(change) == 2 for change in changes)
    is_sound = is_list and all(type(frame) is int and isinstance(task, str) for frame, task in changes)
    frames = [frame for frame, _ in changes] if is_sound else []
    if not frames or frames[0] != 0 or frames != sorted(set(frames)):
        raise ValueError(f"{name}: expected task_changes [[0, TASK], [FRAME, TASK], ...], got {str(changes)[:200]}")


def changes_of(tasks: Sequence[str]) -> dict:
    """The tasks of all frames of an episode as keys of its JSON: `task`, and `task_changes` if it changes."""
    changes = [[i, task] for i, task in enumerate(tasks) if i == 0 or task != tasks[i - 1]]
    return {"task": tasks[0]} | ({"task_changes": changes} if len(changes) > 1 else {})


def tasks_of(header: dict, text: bytes, name: str, frames: Indices) -> list[str]:
    """The instruction at each of these frames, from the JSON or else the text member `name`; "" if both have none."""
    if changes := header.get("task_changes"):
        return [changes[bisect_right(changes, frame, key=itemgetter(0)) - 1][1] for frame in frames]
    return [task_of(header, text, name)] * len(frames)


def task_of(header: dict, text: bytes, name: str) -> str:
    for key in ("task", "instruction", "text", "caption"):
        if isinstance(header.get(key), str):
            return header[key]
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not a text in UTF-8: {error}") from error


def to_array(data: bytes, name: str) -> np.ndarray:
    """Reads an NPY array; it cannot be written to. Raises ValueError that begins with `name`, also for an array of
    Python objects."""
    size = 10 + int.from_bytes(data[8:10], "little")
    if not data.startswith(b"\x93NUMPY\x01") or len(data) < size:
        raise ValueError(f"{name}: not an NPY array of version 1")
    try:
        shape, order, dtype = _npy_header(data[:size])
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            what = "Python objects, a pickle, which can run any code" if dtype.hasobject else f"{dtype} values"
            raise ValueError(f"it holds {what}; expected numbers")
        count = prod(shape)
        if len(data) != size + count * dtype.itemsize:
            raise ValueError(f"{len(data) - size} bytes, but {dtype} {shape} has {count * dtype.itemsize}")
        array = np.frombuffer(data, dtype, count, size).reshape(shape, order=order)
    except (ValueError, SyntaxError, TypeError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"{name}: not a readable NPY array: {error}") from error
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


@lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, "F" if is_fortran else "C", dtype


def read_samples(file: BinaryIO, path: str, ignore: Sequence[str] = (), mode: str = "r:") -> Iterator[Sample]:
    """The episodes of a TAR, in their order.

    ignore: extensions of members to leave out. mode: as for `tarfile.open`; "r|*" is a stream, also a compressed one.
    Raises ValueError, naming file and member, for a member that is unknown, a pickle, or there twice.
    """
    sample, keys = None, set()
    for member in read_members(file, path, mode):
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        extension = suffix.rpartition(".")[2]
        if extension.lower() in PICKLES:
            raise ValueError(f"{path}: {member.name} is a pickle, which can run any code; expected NPY or JSON")
        if extension in ignore or (stem.startswith("__") and stem.endswith("__")):  # webdataset's own notes
            continue
        if not stem or extension not in (*IMAGES, *VIDEOS, "json", "txt", "npy"):
            raise ValueError(f"{path}: {member.name} is no part of an episode; ?ignore={extension} leaves it out")
        key = folder + slash + stem
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in keys:
                raise ValueError(f"{path}: {member.name}: the members of {key} are not together")
            keys.add(key)
            sample = Sample(path, key)
        if suffix in sample.members:
            raise ValueError(f"{path}: {member.name} is there twice")
        sample.members[suffix] = member
    if sample is None:
        raise ValueError(f"{path}: no episode in it")
    yield sample


def read_members(file: BinaryIO, path: str, mode: str = "r:") -> Iterator[Member]:
    """The files in a TAR. `tarfile` itself would take a broken header, or the end of the file, for the end of the TAR.

    Raises ValueError, naming file and byte, if the TAR is broken, cut off, or goes on past its end.
    """
    offset = 0
    try:
        tar = TAR.open(fileobj=file, mode=mode, bufsize=2**20)  # who opened the file closes it
        info = tar.firstmember
        while info is not None:
            offset = info.offset
            if not info.isdir():
                if not info.isreg() or info.issparse() or info.size < 0:
                    raise ValueError(f"{path}: {info.name} is no plain file; expected a TAR of plain files")
                tar.fileobj.seek(info.offset_data)
                data = tar.fileobj.read(info.size)
                if len(data) < info.size:
                    raise ValueError(f"{path}: cut off in {info.name}, at byte {info.offset_data + len(data)}")
                yield Member(info.name, info.offset_data, data)
            offset = tar.offset
            tar.fileobj.seek(offset)
            info = next_member(tar)
        while rest := tar.fileobj.read(2**20):
            if rest.count(0) < len(rest):
                at = tar.fileobj.tell() - len(rest)
                raise ValueError(f"{path}: goes on past the end of the TAR, at byte {at}")
    except (TAR.EmptyHeaderError, TAR.TruncatedHeaderError) as error:
        raise ValueError(f"{path}: cut off at byte {offset}, where the next member or the end should be") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, OverflowError) as error:
        raise ValueError(f"{path}: not a readable TAR at byte {offset}: {error}") from error


def next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next header; None at the block of zeros that ends a TAR."""
    try:
        return tar.tarinfo.fromtarfile(tar)
    except TAR.EOFHeaderError:
        return None
    except (ValueError, IndexError) as error:  # of extended headers
        raise tarfile.ReadError(str(error)) from error


def member_bytes(name: str, data: bytes) -> bytes:
    """A member as a TAR stores it: header, data, and zeros up to a whole number of blocks."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def array_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of an NPY file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()
