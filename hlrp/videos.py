"""Video files: the frames at given times, and the source `videos:DIR`."""

import hashlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from hlrp.checkpoints import contents_hash
from hlrp.contract import Source
from hlrp.video_index import (
    TOLERANCE,
    UNKNOWN,
    Header,
    Index,
    from_start,
    index,
    marked,
    naming,
    packets_of,
    probe_all,
    video_stream,
)

logger = logging.getLogger(__name__)
SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
NUM_OPEN = 16  # videos that a process keeps open
MAX_AGAIN = 3  # frames that may be decoded once more, should the next read go on behind this one


@lru_cache
def decoder() -> Literal["torchcodec", "pyav"]:
    """What decodes here: torchcodec where FFmpeg is installed, else PyAV, slower, which brings its own."""
    if importlib.util.find_spec("torchcodec") is None:
        return "pyav"
    try:
        import torchcodec.decoders  # noqa: F401
    except RuntimeError as error:
        if "Could not load libtorchcodec" not in str(error):
            raise
        return "pyav"
    return "torchcodec"


def read_frames(path: str | Path, times: Sequence[float]) -> Tensor:
    """The frames that a video shows at `times` [s], in any order; uint8 (t, c, h, w), as a player shows them.

    Raises ValueError, naming the file, where it is broken or does not last that long.
    """
    return open_video(path).frames(times)


def open_video(path: str | Path) -> "VideoReader":
    """A video file, opened once in each process."""
    return _open(str(path), os.getpid())


@lru_cache(maxsize=NUM_OPEN)
def _open(path: str, process: int) -> "VideoReader":
    """The process is part of the key: a forked one must not share the open files of its parent."""
    return VideoReader(path, decoder())


class VideoReader:
    """One open video file. Both decoders give the same pixels, each at its speed; where torchcodec fails,
    PyAV decodes, and has the last word on what is broken."""

    def __init__(self, path: str | Path, decoder: Literal["torchcodec", "pyav"]):
        self.path, self.torchcodec = path, None
        self.index = index(path)
        self.shown_at = self.index.shown_at  # [s]
        with naming(path):
            self.pyav = PyAV(path, self.index)
            if decoder == "torchcodec" and self.index.is_plain and self.pyav.is_plain():
                self.torchcodec = TorchCodec(path, self.pyav.stream, self.index)

    def frames(self, times: Sequence[float]) -> Tensor:
        """As `read_frames`."""
        times = np.asarray(times, dtype=np.float64)
        first, last = self.shown_at[0], self.shown_at[-1]
        interval = (last - first) / max(len(self.shown_at) - 1, 1)
        if times.min() < first - TOLERANCE or times.max() > last + interval + TOLERANCE:
            wanted = f"{times.min():.3f} to {times.max():.3f} s"
            raise ValueError(f"{self.path}: no frames at {wanted}; it lasts from {first:.3f} to {last:.3f} s")
        return self.numbered(np.searchsorted(self.shown_at, times + TOLERANCE, side="right") - 1)

    @cached_property
    def grid(self) -> np.ndarray:
        """The numbers of the frames of a regular rate, the mean one: all of them, one after another, where none is
        shown half an interval too early or too late; else those that are shown at its times."""
        times = self.shown_at[0] + np.arange(len(self.shown_at)) / self.index.fps
        if np.abs(self.shown_at - times).max() <= 0.5 / self.index.fps:
            return np.arange(len(times))
        return np.searchsorted(self.shown_at, times + TOLERANCE, side="right") - 1

    def numbered(self, numbers: np.ndarray) -> Tensor:
        """The frames of these numbers, which are shown at `shown_at[numbers]` [s]."""
        if (numbers[1:] > numbers[:-1]).all():
            return self._decode(numbers.tolist())
        numbers, position = np.unique(numbers, return_inverse=True)
        return self._decode(numbers.tolist())[position]

    def _decode(self, numbers: list[int]) -> Tensor:
        if self.torchcodec:
            try:
                return self.torchcodec(numbers)
            except RuntimeError as error:
                logger.warning("%s: torchcodec fails, PyAV decodes it: %s", self.path, error)
                self.torchcodec = None
        with naming(self.path):
            return self.pyav(numbers)


class TorchCodec:
    """Decodes frames by their numbers with torchcodec."""

    def __init__(self, path: str | Path, stream: VideoStream, index: Index):
        self.path, self.stream_index, self.index, self.shown_at = str(path), stream.index, index, index.shown_at

    @cached_property
    def video(self):
        from torchcodec.decoders import VideoDecoder

        keys = set(self.index.key_stamps[:, 0].tolist())
        durations = np.diff(self.index.marks, append=self.index.marks[-1] + 1)
        frames = [
            {"pts": pts, "duration": duration, "key_frame": int(pts in keys)}
            for pts, duration in zip(self.index.marks.tolist(), durations.tolist(), strict=True)
        ]
        mappings = json.dumps({"frames": frames})  # with which it need not scan the file again
        return VideoDecoder(self.path, stream_index=self.stream_index, custom_frame_mappings=mappings)

    def __call__(self, numbers: list[int]) -> Tensor:
        batch = self.video.get_frames_at(numbers)
        if not np.allclose(batch.pts_seconds.numpy(), self.shown_at[numbers], rtol=0, atol=TOLERANCE):
            raise RuntimeError(f"frames {numbers} decode to those at {batch.pts_seconds.tolist()} s")
        return batch.data


class PyAV:
    """Decodes frames by their numbers with PyAV, onwards from the last one where a seek leads no nearer, and from the
    start of the file where no seek leads to a frame.

    With a key frame every other frame, as LeRobot writes videos, half of what is decoded would be frames behind those
    that are asked for; so the decoder is drained at a last one that lies near its key frame."""

    def __init__(self, path: str | Path, index: Index):
        self.path, self.index = path, index
        self.to_rgb = VideoReformatter()
        self.open()
        self.size = self.stream.codec_context.width, self.stream.codec_context.height
        self.pixel_shape = self.stream.sample_aspect_ratio or 1  # width by height

    def open(self) -> None:
        self.container = av.open(str(self.path))
        self.stream = video_stream(self.container)
        self.stream.codec_context.thread_count = 1
        self.number = None  # of the frame that was decoded last

    def __call__(self, numbers: list[int]) -> Tensor:
        frames = None  # t h w c
        for i, number in enumerate(numbers):
            is_last = i + 1 == len(numbers) or self._key(numbers[i + 1])[1] > number + 1
            image = self.image(self._frame(number, is_last))
            if frames is None:
                frames = np.empty((len(numbers), *image.shape), dtype=np.uint8)
            if image.shape != frames.shape[1:]:
                raise RuntimeError(f"frame {number} is turned otherwise than frame {numbers[0]}")
            frames[i] = image
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def is_plain(self) -> bool:
        """Whether pixels are square and no picture is mirrored, which torchcodec would not show."""
        (a, b), (c, d) = orientation(self._frame(0, is_last=True)).tolist()
        return self.pixel_shape == 1 and a * d - b * c > 0

    def _key(self, number: int) -> tuple[int, int]:
        """The key frame from which a frame is decoded: its place among those, -1 for the start of the file, and the
        number of the first frame that is shown from there on."""
        key = int(np.searchsorted(self.index.key_numbers, number, side="right")) - 1
        return key, int(self.index.key_numbers[key]) if key >= 0 else 0

    def _frame(self, number: int, is_last: bool) -> av.VideoFrame:
        """is_last: none is asked for that decoding would go on to."""
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
        """Decodes from a key frame, from the start of the file (-1), or on (None)."""
        self.number, mark = None, self.index.marks[number]  # None for the case that what follows fails
        self.drain_at = drain_at
        if key == -1:
            logger.info("%s: frame %d is decoded from the start", self.path, number)
            self.open()
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

    def image(self, frame: av.VideoFrame) -> np.ndarray:
        """(h, w, c) as a player shows it: upright, with square pixels."""
        image = self.to_rgb.reformat(  # which ignores the colour space and range of the frame unless told
            frame,
            width=max(1, round(frame.width * self.pixel_shape)),
            format="rgb24",
            interpolation="BICUBIC",
            dst_colorspace="ITU601",
            src_color_range="JPEG" if frame.color_range == ColorRange.JPEG else "MPEG",
        ).to_ndarray()  # h w c
        return oriented(image, orientation(frame))

    def _packets_from(self, key: int) -> Iterator[av.Packet]:
        """The packets from a key frame on, or from an earlier one. In most files, a seek to when it is shown leads
        there; where it leads further, one to when it is decoded does."""
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
        """The frames in these, in the order in which they are shown. A decoder keeps back some, for others may have
        to be shown before; once it has the packet at `drain_at`, it is made to give them all."""
        for packet in packets:
            yield from packet.decode()
            if packet.pts is not None and packet.pts == self.drain_at:
                break
        yield from self.stream.codec_context.decode(None)


def orientation(frame: av.VideoFrame) -> np.ndarray:
    """The signs (2, 2) of a frame's display matrix: rows x and y of the frame, columns x and y of what is shown. Raises
    RuntimeError where it turns by other than quarter turns."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return np.eye(2, dtype=np.int64)
    parts = np.frombuffer(bytes(matrix), dtype=np.int32)[[0, 1, 3, 4]].astype(np.float64).reshape(2, 2)
    length = np.abs(parts).max()
    if not length:  # no turn is meant
        return np.eye(2, dtype=np.int64)
    signs = np.where(np.abs(parts) < 0.02 * length, 0, np.sign(parts)).astype(np.int64)  # a degree is no turn
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
    """The files below a folder, also behind links, each folder once."""
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
        raise ValueError(f"{path}: not a text in UTF-8: {error}") from error


class Videos(Source):
    """A folder of video files, searched recursively: each file is an episode, in the order of their paths.

    There are as many frames as the decoder gives, and fps is the file's mean frame rate. Where a rate varies by more
    than half a frame, frame i is the one shown i / fps seconds after the first. A text file of the same name (wave.txt
    for wave.mp4) is the task.

    With `skip_broken`, files that cannot be read are left out, logged and counted in `num_skipped`.
    """

    def __init__(self, folder: str | Path, uri: str | None = None, skip_broken: bool = False):
        folder = Path(folder).expanduser().resolve()
        self.uri, self.name = uri or f"videos:{folder}", f"videos-{folder.name}"
        paths = sorted(p for p in files_in(folder) if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        if not paths:
            raise ValueError(f"{self.uri}: no video in {folder}; a folder of {', '.join(SUFFIXES)} files fits")

        headers = probe_all(paths)
        errors = [header for header in headers.values() if isinstance(header, ValueError)]
        if errors and (not skip_broken or len(errors) == len(paths)):
            raise ValueError(f"{self.uri}: {len(errors)} of {len(paths)} files cannot be read, first: {errors[0]}")
        for error in errors:
            logger.warning("skipped %s", error)
        self.num_skipped = len(errors)

        self.paths = [path for path, header in headers.items() if isinstance(header, Header)]
        self.fps = np.array([headers[path].fps for path in self.paths])
        self.lengths = np.array([headers[path].num_frames for path in self.paths])
        self.tasks = [read_task(path.with_suffix(".txt")) for path in self.paths]

        names = [path.relative_to(folder).as_posix() for path in self.paths]
        what = repr((names, contents_hash(self.paths), self.lengths.tolist(), self.fps.tolist(), self.tasks))
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()[:16]

    def instructions(self, episode: int, indices: Sequence[int]) -> list[str]:
        return [self.tasks[episode]] * len(indices)

    def place(self, episode: int) -> str:
        return str(self.paths[episode])

    def read(self, episode: int, indices: Sequence[int]) -> dict:
        path, length, indices = self.paths[episode], int(self.lengths[episode]), np.asarray(indices)
        video = open_video(path)
        if len(video.grid) != length:
            raise ValueError(f"{path}: it has {len(video.grid)} frames, but had {length} when it was indexed")
        if indices.min() < 0 or indices.max() >= length:
            raise ValueError(f"{path}: frames {indices.min()} to {indices.max()} of {length}")
        return {"frames": video.numbered(video.grid[indices])}
