"""Video files: the frames at given times, decoded by PyAV, and the source `videos:DIR?table=clips.csv`."""

import csv
import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, VideoReformatter
from torch import Tensor

from hlrp.checkpoints import contents_hash
from hlrp.contract import Indices, Source, tell_once
from hlrp.video_index import (
    TOLERANCE,
    UNKNOWN,
    Header,
    frames_in,
    from_start,
    index,
    marked,
    naming,
    packets_of,
    probe_all,
    video_stream,
)

logger = logging.getLogger(__name__)
# the containers whose frames the tests read back at random
SUFFIXES = tuple(f".{name}" for name in "mp4 m4v mov 3gp webm mkv avi ts mts m2ts mpg mpeg flv wmv asf gif".split())
NUM_OPEN = 16  # videos that a process keeps open
MAX_AGAIN = 3  # decode at most so many frames again, should the next read go on behind this one


def open_video(path: str | Path) -> "VideoReader":
    """Opens a video file, once in each process. Raises ValueError that names the file where it is broken."""
    return _open(str(path), os.getpid())


@lru_cache(maxsize=NUM_OPEN)
def _open(path: str, process: int) -> "VideoReader":
    """The process is part of the key: a forked one must not share the open files of its parent."""
    return VideoReader(path)


class VideoReader:
    """One open video file. Its frames are uint8 (t, c, h, w), as a player shows them.

    It decodes onwards from the last frame where a seek leads no nearer, and from the start of the file where no seek
    leads to a frame. LeRobot writes a key frame every other frame; there, the decoder would spend half its time on
    frames that nobody asked for. So the decoder is drained behind the last frame of a read where that frame lies near
    its key frame.
    """

    def __init__(self, path: str | Path):
        self.path, self.index = path, index(path)
        self.shown_at = self.index.shown_at  # [s]
        self.to_rgb = VideoReformatter()
        with naming(path):
            self._open()
        self.size = self.stream.codec_context.width, self.stream.codec_context.height
        self.pixel_shape = self.stream.sample_aspect_ratio or 1  # width by height

    def frames(self, times: Sequence[float] | np.ndarray) -> Tensor:
        """The frames shown at `times` [s], in any order. Raises ValueError where the video does not last that long."""
        times = np.asarray(times, dtype=np.float64)
        first, last = self.shown_at[0], self.shown_at[-1]
        interval = (last - first) / max(len(self.shown_at) - 1, 1)
        if times.min() < first - TOLERANCE or times.max() > last + interval + TOLERANCE:
            wanted = f"{times.min():.3f} to {times.max():.3f} s"
            raise ValueError(f"{self.path}: no frames at {wanted}; it lasts from {first:.3f} to {last:.3f} s")
        return self.numbered(np.searchsorted(self.shown_at, times + TOLERANCE, side="right") - 1)

    @cached_property
    def grid(self) -> np.ndarray:
        """Frame numbers at the regular mean rate. They are 0, 1, 2, ... where no frame is shown half an interval too
        early or too late; else the number of the frame that is shown at each time of the grid."""
        times = self.shown_at[0] + np.arange(len(self.shown_at)) / self.index.fps
        if np.abs(self.shown_at - times).max() <= 0.5 / self.index.fps:
            return np.arange(len(times))
        return np.searchsorted(self.shown_at, times + TOLERANCE, side="right") - 1

    def numbered(self, numbers: np.ndarray) -> Tensor:
        """The frames of these numbers, in any order; frame i is shown at `shown_at[i]`."""
        wanted, position = np.unique(numbers, return_inverse=True)
        with naming(self.path):
            frames = self._decode(wanted.tolist())
        return frames if np.array_equal(wanted, numbers) else frames[position]

    def _open(self) -> None:
        self.container = av.open(str(self.path))
        self.stream = video_stream(self.container)
        self.stream.codec_context.thread_count = 1
        self.number = None  # of the frame that was decoded last

    def _decode(self, numbers: list[int]) -> Tensor:
        frames = None  # t h w c
        for i, number in enumerate(numbers):
            is_last = i + 1 == len(numbers) or self._key(numbers[i + 1])[1] > number + 1
            image = self._image(self._frame(number, is_last))
            if frames is None:
                frames = np.empty((len(numbers), *image.shape), dtype=np.uint8)
            if image.shape != frames.shape[1:]:
                raise RuntimeError(f"frame {number} is turned otherwise than frame {numbers[0]}")
            frames[i] = image
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def _key(self, number: int) -> tuple[int, int]:
        """The key frame that decoding of a frame begins at: its place among the key frames (-1: the start of the
        file), and the number of the first frame that is shown from there on."""
        key = int(np.searchsorted(self.index.key_numbers, number, side="right")) - 1
        return key, int(self.index.key_numbers[key]) if key >= 0 else 0

    def _frame(self, number: int, is_last: bool) -> av.VideoFrame:
        """is_last: the next frame that is asked for is not decoded onwards from this one."""
        key, key_number = self._key(number)
        if self.number is not None and key_number - 1 <= self.number < number:
            key = None  # go on
        is_near = is_last and number - key_number <= MAX_AGAIN
        drain_at = int(self.index.marks[number]) if is_near and self.index.mark == "pts" else None
        before = max(self._key(number)[0] - 1, -1)
        for start in dict.fromkeys([key, before, -1]):
            try:
                frame = self._found(number, start, drain_at if start == key else None)
                break
            except (RuntimeError, av.FFmpegError):
                if start == -1:
                    raise
        if (frame.width, frame.height) != self.size:
            sizes = f"frame {number} has {frame.width} x {frame.height} pixels, expected {'{} x {}'.format(*self.size)}"
            raise RuntimeError(f"its frames change their size: {sizes}")
        return frame

    def _found(self, number: int, key: int | None, drain_at: int | None) -> av.VideoFrame:
        """Decodes from a key frame, from the start of the file (-1), or onwards (None)."""
        self.number, mark = None, self.index.marks[number]  # None stays where decoding fails
        self.drain_at = drain_at
        if key == -1:
            logger.info("%s: frame %d is decoded from the start", self.path, number)
            self._open()
            self.decoded = from_start(self.container, self.stream, self.index.mark, self.index.has_keys)
        elif key is not None:
            self.decoded = self._decoded(self._packets_from(key))
        frame = next((frame for frame in self.decoded if self._is_reached(frame.pts, mark)), None)
        if frame is None or frame.pts != mark or frame.is_corrupt:
            raise RuntimeError(f"frame {number} cannot be decoded")
        if self.drain_at is None:
            self.number = number
        return frame

    def _is_reached(self, pts: int, mark: int) -> bool:
        return pts >= mark if self.index.mark == "pts" else pts == mark

    def _image(self, frame: av.VideoFrame) -> np.ndarray:
        """(h, w, c) as a player shows it: upright, with square pixels."""
        settings: dict[str, Any] = {"format": "rgb24", "interpolation": "BICUBIC"}
        settings["width"] = max(1, round(frame.width * self.pixel_shape))
        settings["dst_colorspace"] = "ITU601"  # PyAV ignores the frame's colour space and range unless told
        settings["src_color_range"] = "JPEG" if frame.color_range == ColorRange.JPEG else "MPEG"
        image = self.to_rgb.reformat(frame, **settings).to_ndarray()  # h w c
        return oriented(image, orientation(frame))

    def _packets_from(self, key: int) -> Iterator[av.Packet]:
        """The packets from a key frame on, or from an earlier one. In most files, a seek to the time of showing leads
        there; where it leads too far, a seek to the time of decoding does."""
        *stamps, mark = self.index.key_stamps[key].tolist()
        for stamp in stamps:
            if stamp == UNKNOWN:
                continue
            self.container.seek(stamp, stream=self.stream)
            packets = marked(packets_of(self.container, self.stream), self.index.mark)
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= mark:
                return chain([first], packets)
        raise RuntimeError(f"its key frame at {stamps[0]} cannot be found")

    def _decoded(self, packets: Iterator[av.Packet]) -> Iterator[av.VideoFrame]:
        """The frames in the packets, in the order in which they are shown. A decoder keeps some back, since others may
        be shown before them; once it has the packet at `drain_at`, it is made to give them all."""
        for packet in packets:
            yield from frames_in(packet)
            if packet.pts is not None and packet.pts == self.drain_at:
                break
        yield from self.stream.codec_context.decode(None)


def orientation(frame: av.VideoFrame) -> np.ndarray:
    """The signs (2, 2) of a frame's display matrix: rows x and y of the frame, columns x and y on the screen.

    Raises RuntimeError where the matrix turns the frame by other than quarter turns.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return np.eye(2, dtype=np.int64)
    parts = np.frombuffer(bytes(matrix), dtype=np.int32)[[0, 1, 3, 4]].astype(np.float64).reshape(2, 2)
    length = np.abs(parts).max()
    if not length:  # it says nothing
        return np.eye(2, dtype=np.int64)
    signs = np.where(np.abs(parts) < 0.02 * length, 0, np.sign(parts)).astype(np.int64)  # ignore a degree
    if not np.array_equal(np.abs(signs), np.eye(2)) and not np.array_equal(np.abs(signs), np.eye(2)[::-1]):
        angle = math.degrees(math.atan2(parts[0, 1], parts[0, 0]))
        raise RuntimeError(f"it is to be shown turned by {angle:.0f} degrees; expected 0, 90, 180 or 270")
    return signs


def oriented(image: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """An image (h, w, c) turned and mirrored as `orientation` says."""
    (a, b), (c, d) = signs.tolist()
    if not a:
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: d or 1, :: a or 1]


def files_in(folder: Path) -> Iterator[Path]:
    """The files below a folder, also behind links; each folder is read once."""
    seen = set()
    for parent, folders, names in folder.walk(follow_symlinks=True):
        if (real := parent.resolve()) in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(real)
        yield from (parent / name for name in names if (parent / name).is_file())


def read_task(path: Path) -> str:
    """The instruction in a text file; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8-sig").strip() if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text in UTF-8, got other bytes: {error}") from error


def find_videos(uri: str, folder: Path) -> list[Path]:
    """The videos below a folder, sorted. Tells how many other files are there, beside texts of the videos' names."""
    files = [path for path in files_in(folder) if path.name[0] != "."]
    videos = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    if not videos:
        raise ValueError(f"{uri}: no video in {folder}; expected files of type {', '.join(SUFFIXES)}")
    known = {*videos, *(path.with_suffix(".txt") for path in videos)}
    others = Counter(path.suffix.lower() or path.name for path in files if path not in known)
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
        tell_once(f"{uri}: left out {others.total()} files that are no videos by their names: {kinds}")
    return videos


class Clip(NamedTuple):
    """A row of a table: a part of a video file."""

    row: str  # its file and its number there, for errors; "": a whole file, without a table
    path: Path
    start: float  # [s] after the first frame
    end: float  # where it ends, without the frame shown there [s]
    text: str | None  # None: that beside the file


def read_table(path: Path, folder: Path) -> list[Clip]:
    """The rows of a CSV, TSV or JSONL file: `file`, relative to `folder`; `start`, `end` and `text` may be missing.

    Times are seconds, or hours, minutes and seconds with colons. Raises ValueError, which names the row.
    """
    clips = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = [*csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable table in CSV, TSV or JSONL: {error}") from error
    for number, row in enumerate(rows, start=1):
        name = f"{path}, row {number}"
        if not isinstance(row, dict) or not isinstance(row.get("file"), str):
            found = ", ".join(map(str, row)) if isinstance(row, dict) else f"{row}"[:80]
            raise ValueError(f"{name}: expected file and, where known, start, end and text, got {found}")
        start, end = (seconds(name, row, key, default) for key, default in (("start", 0.0), ("end", math.inf)))
        if not 0 <= start < end:
            raise ValueError(f"{name}: expected 0 <= start < end [s], got start={start:g} and end={end:g}")
        text = row.get("text")
        clips.append(Clip(name, (folder / row["file"]).resolve(), start, end, text and str(text).strip()))
    if not clips:
        raise ValueError(f"{path}: expected a row for each clip, got none")
    return clips


def seconds(name: str, row: dict, key: str, default: float) -> float:
    value = row.get(key)
    if value in (None, ""):
        return default
    try:
        return sum(float(part) * 60**i for i, part in enumerate(reversed(str(value).split(":"))))
    except ValueError:
        raise ValueError(f"{name}: expected {key} in seconds, such as 12.5, got {value!r}") from None


def frames_of(clip: Clip, header: Header | ValueError) -> range:
    """The frames that a clip shows. Raises ValueError, which names the row, where the file does not show all of it."""
    if isinstance(header, ValueError):
        raise ValueError(f"{clip.row}: {header}") if clip.row else header
    if clip.end == math.inf and not clip.start:
        return range(header.num_frames)
    lasts = header.num_frames / header.fps
    if clip.start >= lasts or (clip.end > lasts + 1 / header.fps and clip.end < math.inf):
        raise ValueError(f"{clip.row}: {clip.path} lasts {lasts:.3f} s, got {clip.start:g} to {clip.end:g} s")
    first, end = (math.ceil((time - TOLERANCE) * header.fps) for time in (clip.start, min(clip.end, lasts)))
    return range(first, max(min(end, header.num_frames), first + 1))


class Videos(Source):
    """A folder of video files, searched recursively: each file is an episode, in the order of their paths.

    An episode has the frames that the decoder gives, and fps is their mean rate. Where the rate varies by more than
    half a frame, frame i is the one shown i / fps seconds after the first. A text file of the same name (wave.txt for
    wave.mp4) holds the task.

    table: a file, in the folder or elsewhere, whose rows are the episodes in place of whole files (`read_table`).
    skip_broken: leave out files that cannot be read, log them and count them in `num_skipped`.
    Raises ValueError where the folder has no video, or a file cannot be read.
    """

    def __init__(self, folder: str | Path, uri: str | None = None, skip_broken: bool = False, table: str | None = None):
        folder = Path(folder).expanduser().resolve()
        self.uri, self.name = uri or f"videos:{folder}", f"videos-{folder.name}"
        if table is None:
            clips = [Clip("", path, 0.0, math.inf, None) for path in find_videos(self.uri, folder)]
        else:
            path = next((p for p in (folder / table, Path(table).expanduser()) if p.is_file()), folder / table)
            clips = read_table(path, folder)
            self.name += f"-{path.stem}"
        headers = probe_all(list(dict.fromkeys(clip.path for clip in clips)))
        errors, readable = [], []
        for clip in clips:
            try:
                readable.append((clip, frames_of(clip, headers[clip.path])))
            except ValueError as error:
                errors.append(error)
        if errors and (not skip_broken or not readable):
            what = "files" if table is None else f"rows of {path}"
            raise ValueError(f"{self.uri}: {len(errors)} of {len(clips)} {what} cannot be read, first: {errors[0]}")
        for error in errors:
            logger.warning("skipped %s", error)
        self.num_skipped = len(errors)

        self.clips, self.frames = [clip for clip, _ in readable], [frames for _, frames in readable]
        self.paths = [clip.path for clip in self.clips]
        known = {path: header for path, header in headers.items() if isinstance(header, Header)}
        self.num_frames = {path: known[path].num_frames for path in self.paths}
        self.fps = np.array([known[path].fps for path in self.paths])
        self.lengths = np.array([len(frames) for frames in self.frames])
        self.tasks = [
            read_task(clip.path.with_suffix(".txt")) if clip.text is None else clip.text for clip in self.clips
        ]

        names = [os.path.relpath(path, folder) for path in self.paths]
        what = (names, contents_hash(list(self.num_frames)), self.lengths.tolist(), self.fps.tolist(), self.tasks)
        if table is not None:
            what += ([frames.start for frames in self.frames],)
        self.fingerprint = hashlib.sha256(repr(what).encode()).hexdigest()[:16]

    def instructions(self, episode: int, indices: Indices) -> list[str]:
        return [self.tasks[episode]] * len(indices)

    def place(self, episode: int) -> str:
        clip = self.clips[episode]
        return f"{clip.path}, {clip.row}" if clip.row else str(clip.path)

    def read(self, episode: int, indices: Indices) -> dict:
        path, length, indices = self.paths[episode], int(self.lengths[episode]), np.asarray(indices)
        video = open_video(path)
        if len(video.grid) != self.num_frames[path]:
            expected = f"expected {self.num_frames[path]} frames as when it was indexed"
            raise ValueError(f"{path}: {expected}, got {len(video.grid)}")
        if indices.min() < 0 or indices.max() >= length:
            raise ValueError(f"{path}: expected frame numbers below {length}, got {indices.min()} to {indices.max()}")
        numbers = video.grid[self.frames[episode].start + indices]
        return {"frames": video.numbered(numbers), "task": self.instructions(episode, indices)[0]}
