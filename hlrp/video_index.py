"""Which frames a video file has, and when each is shown.

The packets of the file tell, if they can. Else the file is decoded once: an AVI has no times, some files have no key
frame at the beginning, and others have two frames at one time.
"""

import hashlib
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

logger = logging.getLogger(__name__)
TOLERANCE = 0.001  # [s]; WebM and Matroska round time stamps to milliseconds
MAX_REORDER = 16  # at most so many frames are decoded before one that is shown earlier (H.264, A.3.1)
MOV, MATROSKA, AVI = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"
STORE_TIMES = (MOV, MATROSKA, "mpegts", "flv")  # formats that store when each frame is shown
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # Matroska is a header and a segment
UNKNOWN = np.iinfo(np.int64).min
# by which number a packet is known again after a seek: its time, its position, or, from the start only, its count
Mark = Literal["pts", "pos", "count"]


class Index(NamedTuple):
    """The frames of a stream in the order in which they are shown, and where decoding can start."""

    shown_at: np.ndarray  # float64 (frames,), not decreasing [s]
    marks: np.ndarray  # int64 (frames,): the mark of the packet that each is decoded from
    mark: Mark
    key_numbers: np.ndarray  # int64 (keys,), not decreasing: the first frame that is shown from each key frame on
    key_stamps: np.ndarray  # int64 (keys, 3): pts, dts and mark of each key frame
    has_keys: bool  # whether any packet is marked as a key frame
    fps: float  # mean rate [1/s]


class Header(NamedTuple):
    """What a video is, as far as a source has to know."""

    fps: float  # mean rate [1/s]
    first: float  # when the first frame is shown [s]
    last: float  # when the last frame is shown [s]
    num_frames: int


def probe(path: str | Path) -> Header:
    """Reads the header. Raises ValueError, naming the file, if it is no video, has no frames, or is cut off."""
    with naming(path):
        check_whole(path)
        header = glance(path)
    if header is None:
        frames = index(path)
        header = Header(frames.fps, float(frames.shown_at[0]), float(frames.shown_at[-1]), len(frames.marks))
    return header


def probe_all(paths: Sequence[Path]) -> dict[Path, Header | ValueError]:
    """The headers of many files, or their errors."""

    def probe_or_error(path: Path) -> Header | ValueError:
        try:
            return probe(path)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(max_workers=8) as threads:  # they wait for the disk at the same time
        return dict(zip(paths, threads.map(probe_or_error, paths), strict=True))


def glance(path: str | Path) -> Header | None:
    """The header of an MP4, from its first and last packets; None if these leave a doubt, as a varying rate does."""
    with av.open(str(path)) as container:
        stream = video_stream(container)
        num_frames, rate = stream.frames, stream.average_rate
        if container.format.name != MOV or not num_frames or not rate:
            return None
        first = [(p.pts, p.is_keyframe, p.is_discard) for p in islice(packets_of(container, stream), MAX_REORDER)]
        container.seek(2**40, stream=stream)  # to the last key frame
        last = [(p.pts, p.is_keyframe, p.is_discard) for p in packets_of(container, stream)]
        if not first or not last or any(pts is None or is_hidden for pts, _, is_hidden in first + last):
            return None
        start, end = seconds(min(first)[0], stream), seconds(max(last)[0], stream)
        is_regular = abs((num_frames - 1) / float(rate) - (end - start)) < TOLERANCE
        if not is_regular or not first[0][1] or min(first)[0] != first[0][0]:
            return None
        return Header(float(rate), start, end, num_frames)


def index(path: str | Path) -> Index:
    """Reads all packets of a file. Raises ValueError as `probe` does."""
    with naming(path):
        check_whole(path)
        with closing(av.open(str(path))) as container:
            stream = video_stream(container)
            rows = [(p.pts, p.dts, p.pos, p.is_keyframe, p.is_discard) for p in packets_of(container, stream)]
            if not rows:
                raise RuntimeError("it has no frames")
            columns = [[UNKNOWN if x is None else x for x in column] for column in zip(*rows, strict=True)]
            pts, dts, pos = np.array(columns[:3], dtype=np.int64)
            is_key, is_hidden = np.array(columns[3:], dtype=bool)
            rate = stream.guessed_rate or stream.average_rate
            clock, tick = next(
                ((stamps, seconds(1, stream)) for stamps in (pts, dts) if (stamps != UNKNOWN).all()),
                (np.arange(len(pts)), 1 / float(rate or 1)),
            )
            stores_times = container.format.name in STORE_TIMES
            if not stores_times and not is_key.all() and (dts != UNKNOWN).all():
                clock = dts  # PyAV has guessed pts from it
            if tells_order(path, stream, stores_times, pts, is_key, is_hidden):
                mark, marks, order = "pts", pts, np.flatnonzero(~is_hidden)
                order = order[pts[order].argsort()]
                if not len(order):
                    raise RuntimeError("it has no frames that are shown")
                keys = np.flatnonzero(is_key)
                keys = keys[pts[keys].argsort()]
                key_numbers = np.searchsorted(pts[order], pts[keys])
            else:
                can_seek = container.format.name in (MOV, MATROSKA, AVI) and len(np.unique(pos)) == len(pos)
                mark = "pos" if can_seek and UNKNOWN not in pos else "count"
                marks = pos if mark == "pos" else np.arange(len(pos))
                row_of = {key: row for row, key in enumerate(marks.tolist())}
                order = np.array([row_of[key] for key in decoded_marks(path, mark, bool(is_key.any()))])
                key_numbers = np.flatnonzero(is_key[order]) if mark == "pos" else np.zeros(0, dtype=np.int64)
                keys = order[key_numbers]
            shown_at = np.sort(clock[order]) * tick
            key_stamps = np.stack([pts, dts, marks], axis=1)[keys]
            fps = mean_rate(stream, shown_at)
            return Index(shown_at, marks[order], mark, key_numbers, key_stamps, bool(is_key.any()), fps)


def seconds(stamp: int | None, stream: VideoStream) -> float:
    """A time stamp of a stream in seconds."""
    assert stamp is not None and stream.time_base is not None
    return float(stamp * stream.time_base)


def tells_order(
    path: str | Path,
    stream: VideoStream,
    stores_times: bool,
    pts: np.ndarray,
    is_key: np.ndarray,
    is_hidden: np.ndarray,
) -> bool:
    """Whether the packets tell which frames there are, and in which order they are shown."""
    if UNKNOWN in pts or not (stores_times or is_key.all()):
        return False
    if not is_key[0] or pts[0] != pts.min() or len(np.unique(pts[~is_hidden])) < (~is_hidden).sum():
        return False
    if not stream.codec_context.has_b_frames or (np.diff(pts) < 0).any():
        return True
    with av.open(str(path)) as container:  # does it have no such frames, or was their order lost?
        other = video_stream(container)
        times = [frame.pts for frame in islice(decoded(other, packets_of(container, other)), 2 * MAX_REORDER)]
    return times == sorted(times)


def decoded_marks(path: str | Path, mark: Mark, has_keys: bool) -> list[int]:
    """The marks of all frames in the order in which they are decoded; cached in $HLRP_CACHE or ~/.cache/hlrp."""
    path = Path(path).resolve()
    stat = path.stat()
    key = hashlib.sha256(repr((str(path), stat.st_size, stat.st_mtime_ns, mark, av.__version__)).encode()).hexdigest()
    file = Path(os.environ.get("HLRP_CACHE", "~/.cache/hlrp")).expanduser() / "frames" / f"{key[:32]}.npy"
    if file.is_file():
        return np.load(file, allow_pickle=False).tolist()
    with av.open(str(path)) as container:
        stream = video_stream(container)
        marks = [frame.pts for frame in from_start(container, stream, mark, has_keys)]
    if not marks:
        raise RuntimeError("none of its frames can be decoded")
    if len(set(marks)) < len(marks):
        raise RuntimeError("it has packets of several frames each; expected one frame a packet, as ffmpeg writes it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, np.array(marks, dtype=np.int64))
        partial.replace(file)
    except OSError as error:
        logger.warning("%s: decoded to count its frames; the result cannot be cached: %s", path, error)
    return marks


def from_start(container: InputContainer, stream: VideoStream, mark: Mark, has_keys: bool) -> Iterator[av.VideoFrame]:
    """All frames of a file that was just opened, each with its mark as pts. Decoding begins at the first key frame; if
    no packet is marked as one, at the first packet that the decoder takes."""
    packets = marked(packets_of(container, stream), mark)
    has_begun = False
    for packet in dropwhile(lambda packet: has_keys and not packet.is_keyframe, packets):
        try:
            frames = frames_in(packet)
        except av.FFmpegError:
            if has_begun:
                raise
            continue
        has_begun |= bool(frames)
        yield from frames
    yield from stream.codec_context.decode(None)


def decoded(stream: VideoStream, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    """The frames in these packets, in the order in which they are shown."""
    for packet in packets:
        yield from frames_in(packet)
    yield from stream.codec_context.decode(None)


def frames_in(packet: av.Packet) -> list[Any]:
    """The frames that the decoder gives at a packet of a video stream."""
    return packet.decode()


def marked(packets: Iterable[av.Packet], mark: Mark) -> Iterator[av.Packet]:
    """Puts the mark of each packet in place of its pts; the decoder hands it on to the frame."""
    for count, packet in enumerate(packets):
        if mark != "pts":
            packet.pts = packet.pos if mark == "pos" else count
        yield packet


def video_stream(container: InputContainer) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise RuntimeError("there is no video stream")
    return stream


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The packets from the current place on, without empty ones."""
    return (packet for packet in container.demux(stream) if packet.size)


def mean_rate(stream: VideoStream, shown_at: np.ndarray) -> float:
    """The mean frame rate [1/s]: the one in the header if the times agree with it, else that of the times."""
    intervals, span = len(shown_at) - 1, float(shown_at[-1] - shown_at[0])
    stored = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    for rate in stored:
        if abs(intervals / rate - span) < 2 * TOLERANCE:
            return rate
    if span:
        return intervals / span
    return stored[0] if stored else 1.0


def check_whole(path: str | Path) -> None:
    """Raises RuntimeError if the outermost boxes of an MP4, a Matroska or an AVI file say that it should be longer."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        end = expected_size(file, size)
    if end > size:
        raise RuntimeError(f"it has {size} bytes, expected {end}; is it cut off?")


def expected_size(file: BinaryIO, size: int) -> int:
    """Where the last outermost box ends that begins in a file of this size; 0 if the boxes do not tell."""
    head, end = file.read(16), 0
    if head.startswith(EBML):
        for name in (EBML, SEGMENT):
            file.seek(end)
            if file.read(4) != name or not (first := file.read(1)) or not first[0]:
                return 0
            num_more = 8 - first[0].bit_length()
            value = int.from_bytes(bytes([first[0] & (0x7F >> num_more)]) + file.read(num_more), "big")
            if value == 2 ** (7 * (num_more + 1)) - 1:  # unknown, as in a live recording
                return 0
            end = file.tell() + value
        return end
    if head.startswith(b"RIFF"):
        while end + 8 <= size:
            file.seek(end)
            name, length = struct.unpack("<4sI", file.read(8))
            if name != b"RIFF":
                break
            end += 8 + length + length % 2 * (end + 8 + length < size)
        return end
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        while end + 8 <= size:
            file.seek(end)
            length, name = struct.unpack(">I4s", file.read(8))
            if length == 1 and end + 16 <= size:
                length = int.from_bytes(file.read(8), "big")
            if length < 8 or not name.isalnum():  # the box goes to the end of the file, or it is no box
                return min(end, size)
            end += length
    return end


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turns errors of a decoder (RuntimeError, FFmpeg's) and of the disk into a ValueError that names the file."""
    try:
        yield
    except (av.FFmpegError, RuntimeError, OSError) as error:
        raise unreadable(path, "video", error) from error


def unreadable(path: str | Path, kind: str, error: Exception) -> ValueError:
    """The error for a file that cannot be read as this kind. It says if Git LFS has left a pointer in its place."""
    path = Path(path)
    head = path.open("rb").read(64) if path.is_file() else b""
    if head.startswith(b"version https://git-lfs"):
        return ValueError(f"{path}: not a {kind}, but the pointer of Git LFS to one; git lfs pull brings the file")
    if path.is_file() and not head:
        return ValueError(f"{path}: not a readable {kind}: it is empty")
    return ValueError(f"{path}: not a readable {kind}: {error}")
