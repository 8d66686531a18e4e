"""Video files: the frames at given times, and the source `videos:DIR`."""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from hlrp.checkpoints import contents_hash

logger = logging.getLogger(__name__)
SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
TOLERANCE = 0.001  # [s]; WebM and Matroska round time stamps to milliseconds
NUM_OPEN = 16  # videos that a process keeps open
MAX_AGAIN = 3  # frames that may be decoded once more, should the next read go on behind this one
MAX_REORDER = 16  # frames that may be decoded before one that is shown earlier (H.264, A.3.1)


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
    """The frames that a video shows at `times` [s], in any order; uint8 (t, c, h, w), upright.

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


class Packets(NamedTuple):
    """The time stamps of a stream, in its time base; frame `number` is the one shown at `pts[number]`."""

    pts: np.ndarray  # int64 (frames,), increasing
    key_pts: np.ndarray  # int64 (keys,), increasing: where decoding can start
    key_dts: np.ndarray  # int64 (keys,): and when it is decoded
    are_plain: bool  # what torchcodec 0.11 decodes without fault: nothing hidden, closed groups, and no AVI


class VideoReader:
    """One open video file. Both decoders give the same pixels, each at its speed; where torchcodec fails,
    PyAV decodes, and has the last word on what is broken."""

    def __init__(self, path: str | Path, decoder: Literal["torchcodec", "pyav"]):
        self.path, self.torchcodec = path, None
        with naming(path):
            container = av.open(str(path))
            stream = video_stream(container)
            packets = scan(container, stream)
            self.shown_at = packets.pts * float(stream.time_base)  # [s]
            self.pyav = PyAV(container, stream, packets)
            if decoder == "torchcodec" and packets.are_plain:
                self.torchcodec = TorchCodec(path, stream, packets)

    def frames(self, times: Sequence[float]) -> Tensor:
        """As `read_frames`."""
        times = np.asarray(times, dtype=np.float64)
        first, last = self.shown_at[0], self.shown_at[-1]
        interval = (last - first) / max(len(self.shown_at) - 1, 1)
        if times.min() < first - TOLERANCE or times.max() > last + interval + TOLERANCE:
            wanted = f"{times.min():.3f} to {times.max():.3f} s"
            raise ValueError(f"{self.path}: no frames at {wanted}; it lasts from {first:.3f} to {last:.3f} s")
        return self.numbered(np.searchsorted(self.shown_at, times + TOLERANCE, side="right") - 1)

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

    def __init__(self, path: str | Path, stream: VideoStream, packets: Packets):
        self.path, self.stream_index, self.packets = str(path), stream.index, packets
        self.shown_at = packets.pts * float(stream.time_base)

    @cached_property
    def video(self):
        from torchcodec.decoders import VideoDecoder

        keys = set(self.packets.key_pts.tolist())
        durations = np.diff(self.packets.pts, append=self.packets.pts[-1] + 1)
        frames = [
            {"pts": pts, "duration": duration, "key_frame": int(pts in keys)}
            for pts, duration in zip(self.packets.pts.tolist(), durations.tolist(), strict=True)
        ]
        mappings = json.dumps({"frames": frames})  # with which it need not scan the file again
        return VideoDecoder(self.path, stream_index=self.stream_index, custom_frame_mappings=mappings)

    def __call__(self, numbers: list[int]) -> Tensor:
        batch = self.video.get_frames_at(numbers)
        if not np.allclose(batch.pts_seconds.numpy(), self.shown_at[numbers], rtol=0, atol=TOLERANCE):
            raise RuntimeError(f"frames {numbers} decode to those at {batch.pts_seconds.tolist()} s")
        return batch.data


class PyAV:
    """Decodes frames by their numbers with PyAV, onwards from the last one where a seek leads no nearer.

    With a key frame every other frame, as LeRobot writes videos, half of what is decoded would be frames behind those
    that are asked for; so the decoder is drained at a last one that lies near its key frame."""

    def __init__(self, container: InputContainer, stream: VideoStream, packets: Packets):
        self.container, self.stream, self.packets = container, stream, packets
        self.stream.codec_context.thread_count = 1
        self.to_rgb = VideoReformatter()
        self.number = None  # of the frame that was decoded last

    def __call__(self, numbers: list[int]) -> Tensor:
        frames = None  # t h w c
        for i, number in enumerate(numbers):
            is_last = i + 1 == len(numbers) or self._key(numbers[i + 1])[1] > number + 1
            image = self._decode(number, is_last)
            if frames is None:
                frames = np.empty((len(numbers), *image.shape), dtype=np.uint8)
            frames[i] = image
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def _key(self, number: int) -> tuple[int, int]:
        """Of the key frame from which a frame is decoded: its place among those, and its own number."""
        pts, key_pts, _, _ = self.packets
        key = max(int(np.searchsorted(key_pts, pts[number], side="right")) - 1, 0)
        return key, int(np.searchsorted(pts, key_pts[key]))

    def _decode(self, number: int, is_last: bool) -> np.ndarray:
        """The frame, (h, w, c). is_last: none is asked for that decoding would go on to."""
        pts = self.packets.pts
        key, key_number = self._key(number)
        if self.number is None or not key_number - 1 <= self.number < number:
            self.decoded = self._decoded(self._packets_from(key))
        self.drain_at = pts[number] if is_last and number - key_number <= MAX_AGAIN else None
        self.number = None  # for the case that what follows fails, or that the decoder is drained
        frame = next((frame for frame in self.decoded if frame.pts >= pts[number]), None)
        if frame is None or frame.pts != pts[number] or frame.is_corrupt:
            raise RuntimeError(f"frame {number} cannot be decoded")
        if self.drain_at is None:
            self.number = number

        image = self.to_rgb.reformat(  # which ignores the colour space and range of the frame unless told
            frame,
            format="rgb24",
            interpolation="BICUBIC",
            dst_colorspace="ITU601",
            src_color_range="JPEG" if frame.color_range == ColorRange.JPEG else "MPEG",
        ).to_ndarray()  # h w c
        return np.rot90(image, frame.rotation // 90)  # counter-clockwise, as is `rotation`

    def _packets_from(self, key: int) -> Iterator[av.Packet]:
        """The packets from a key frame on, or from an earlier one. In most files, a seek to when it is shown leads
        there; where it leads further, one to when it is decoded does."""
        key_pts = self.packets.key_pts[key]
        for stamp in (key_pts, self.packets.key_dts[key]):
            self.container.seek(int(stamp), stream=self.stream)
            packets = self.container.demux(self.stream)
            first = next(packets)
            if first.pts is not None and first.pts <= key_pts:
                return chain([first], packets)
        raise RuntimeError(f"its key frame at {key_pts} cannot be found")

    def _decoded(self, packets: Iterator[av.Packet]) -> Iterator[av.VideoFrame]:
        """The frames in these, in the order in which they are shown. A decoder keeps back some, for others may have
        to be shown before; once it has the packet at `drain_at`, it is made to give them all."""
        for packet in packets:
            yield from packet.decode()
            if packet.pts is not None and packet.pts == self.drain_at:
                yield from self.stream.codec_context.decode(None)
                return


def video_stream(container: InputContainer) -> VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise RuntimeError("there is no video stream")
    return stream


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The packets from here on, without those that end a stream."""
    for packet in container.demux(stream):
        if packet.size:
            if packet.pts is None:
                raise RuntimeError("it has frames without time stamps")
            yield packet


def scan(container: InputContainer, stream: VideoStream) -> Packets:
    """Reads all packets of a stream, and decodes none."""
    pts, keys = [], []
    are_plain = container.format.name != "avi"
    for packet in packets_of(container, stream):
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        is_hidden = packet.is_discard  # by an edit list
        are_plain &= not is_hidden and bool(keys) and packet.pts >= keys[-1][0]
        if not is_hidden:
            pts.append(packet.pts)
    if not pts or not keys:
        raise RuntimeError("it has no frames")
    key_pts, key_dts = np.array(sorted(keys), dtype=np.int64).T
    return Packets(np.array(sorted(pts), dtype=np.int64), key_pts, key_dts, are_plain)


class Header(NamedTuple):
    """What a video is, by its first and last packets."""

    fps: float  # mean
    first: float  # when the first and the last frame are shown [s]
    last: float


def probe(path: str | Path) -> Header:
    """Raises ValueError, naming the file, where it is no video, has no frames, or is cut off."""
    with naming(path), av.open(str(path)) as container:
        stream = video_stream(container)
        rate = stream.average_rate or stream.guessed_rate
        shown = (packet.pts for packet in packets_of(container, stream) if not packet.is_discard)
        first = min(islice(shown, MAX_REORDER), default=None)
        if first is None or not rate:
            raise RuntimeError("it has no frames")
        container.seek(2**40, stream=stream)  # to the last key frame
        last, end = None, 0.0  # of this stream, and where the last of all streams is [s]
        for packet in container.demux():
            if not packet.size or packet.pts is None:
                continue
            time = float(packet.pts * packet.time_base)
            end = max(end, time)
            if packet.stream == stream and not packet.is_discard:
                last = time if last is None else max(last, time)
        if last is None:
            raise RuntimeError("its end cannot be read; is it cut off?")

        if stream.duration is not None:
            end, duration = last, float(stream.duration * stream.time_base)
        else:  # that of the longest stream, which may be the sound
            duration = (container.duration or 0) / av.time_base
        if end + 1 / rate < 0.9 * duration:
            raise RuntimeError(f"it ends at {end:.2f} s and not at {duration:.2f} s; is it cut off?")
        return Header(float(rate), float(first * stream.time_base), last)


def probe_all(paths: Sequence[Path]) -> dict[Path, Header | ValueError]:
    """Headers of many files, and the errors of those that are broken."""

    def probe_or_error(path: Path) -> Header | ValueError:
        try:
            return probe(path)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(max_workers=8) as threads:  # which wait for the disk together
        return dict(zip(paths, threads.map(probe_or_error, paths), strict=True))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of the decoders (RuntimeError, FFmpeg's) become ValueErrors that name the file."""
    try:
        yield
    except (av.FFmpegError, RuntimeError) as error:
        raise unreadable(path, "video", error) from error


def unreadable(path: str | Path, kind: str, error: Exception) -> ValueError:
    """The error of a file that is not what it should be. It tells where Git LFS left a pointer in place of the file."""
    path = Path(path)
    head = path.open("rb").read(64) if path.is_file() else b""
    if head.startswith(b"version https://git-lfs"):
        return ValueError(f"{path}: not a {kind}, but the pointer of Git LFS to one; git lfs pull brings the file")
    if path.is_file() and not head:
        return ValueError(f"{path}: not a readable {kind}: it is empty")
    return ValueError(f"{path}: not a readable {kind}: {error}")


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


class Videos:
    """A folder of video files, searched recursively: each file is an episode, in the order of their paths.

    Frame i is the one shown i / fps seconds after the first, fps being the file's mean frame rate: variable
    frame rates come on a regular grid too. A text file of the same name (wave.txt for wave.mp4) is the task.

    With `skip_broken`, files that cannot be read are left out, logged and counted in `num_skipped`.
    """

    def __init__(self, folder: str | Path, uri: str | None = None, skip_broken: bool = False):
        folder = Path(folder).expanduser().resolve()
        self.uri, self.name = uri or f"videos:{folder}", f"videos-{folder.name}"
        self.action_dim, self.state_dim, self.camera = 0, 0, ""
        paths = sorted(p for p in files_in(folder) if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        if not paths:
            raise ValueError(f"{self.uri}: no video in {folder}; a folder of {', '.join(SUFFIXES)} files fits")

        headers = probe_all(paths)
        errors = [header for header in headers.values() if isinstance(header, ValueError)]
        if errors and (not skip_broken or len(errors) == len(paths)):
            raise errors[0]
        for error in errors:
            logger.warning("skipped %s", error)
        self.num_skipped = len(errors)

        self.paths = [path for path, header in headers.items() if isinstance(header, Header)]
        self.fps, self.first, last = np.array([headers[path] for path in self.paths]).T
        self.lengths = np.floor((last - self.first) * self.fps + 0.1).astype(np.int64) + 1
        self.tasks = [read_task(path.with_suffix(".txt")) for path in self.paths]

        names = [path.relative_to(folder).as_posix() for path in self.paths]
        what = repr((names, contents_hash(self.paths), self.lengths.tolist(), self.fps.tolist(), self.tasks))
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()[:16]

    def instructions(self, episode: int, indices: Sequence[int]) -> list[str]:
        return [self.tasks[episode]] * len(indices)

    def read(self, episode: int, indices: Sequence[int]) -> dict:
        times = self.first[episode] + np.asarray(indices) / self.fps[episode]
        return {"frames": read_frames(self.paths[episode], times), "task": self.tasks[episode]}
