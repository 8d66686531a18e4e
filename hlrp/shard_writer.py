"""Writes one shard, episodes of any source as a TAR and its index. The same source and settings give the same bytes."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hlrp.checkpoints import sync
from hlrp.contract import EncodedSource, Indices, Source, Stream
from hlrp.idle import episode_scores
from hlrp.images import JPEG, NPY, PNG, fit, middle, point_in_middle
from hlrp.shard_index import SUFFIX, index_tar
from hlrp.sources import open_source
from hlrp.streams import Episode, VideoFrames
from hlrp.tars import END, array_bytes, changes_of, member_bytes

logger = logging.getLogger(__name__)
Codec = Literal["jpeg", "png", "yuv420"]
EXTENSIONS = {"jpeg": "jpg", "png": "png", "yuv420": "yuv.npy"}
FIRST_BYTES = {"jpeg": JPEG, "png": PNG, "yuv420": NPY}
CHUNK = 64  # frames that are decoded together
SAME_RATE = 0.001  # frame rates that differ by a smaller share count as the same
IDLE_SIZE = 64  # side of the frames in which motion is measured, as in `hlrp.idle` [pixel]


@dataclass
class Settings:
    """The settings that the content of a shard depends on; `hlrp.shards.Args` explains each."""

    image_size: int | None
    fps: float | None
    drop_actions: bool
    instruction: str | None
    codec: Codec
    quality: int
    idle_span: float | None


class Job(NamedTuple):
    """One shard to write: the episodes start, ..., stop - 1 of a source, or the shard `start` of a stream."""

    path: Path  # the TAR to write
    uri: str
    start: int
    stop: int


@dataclass
class View:
    """One episode of a source or a stream: the methods of a source, without the number of the episode."""

    length: int
    fps: float
    read: Callable[[Indices], dict]
    actions: Callable[[Indices], Tensor] | None
    instructions: Callable[[Indices], list[str]]
    labels: Callable[[Indices], dict[str, Tensor]] | None = None
    encoded: Callable[[Indices], list[bytes]] | None = None


@lru_cache
def opened(uri: str, skip_broken: bool):
    """Opens a source, once in each process."""
    return open_source(uri, skip_broken)


def write_shard(job: Job, settings: Settings, skip_broken: bool) -> int:
    """Writes the TAR and its index, both or none. Returns how many episodes were left out.

    A killed process leaves `.partial` files, which the next one overwrites.

    With `skip_broken`, episodes that cannot be read are left out, logged, and listed in the index.
    Raises ValueError that names the episode, or OSError that names the file that could not be written.
    """
    source = opened(job.uri, skip_broken)
    index = job.path.with_suffix(SUFFIX)
    partial_tar, partial_index = (path.with_name(path.name + ".partial") for path in (job.path, index))
    skipped, scores = {}, []
    try:
        with naming(job.path), open(partial_tar, "wb") as tar:
            for number, view in views(source, job):
                key = f"{job.path.stem}_{number:06d}"
                try:
                    if isinstance(view, Exception):
                        raise view
                    members, score = record(source, number, view, settings)
                except (ValueError, OSError) as error:
                    message = f"{job.uri}, episode {number}: {error}"
                    if not skip_broken:
                        raise ValueError(message) from error
                    logger.warning("skipped %s", message)
                    skipped[number] = str(error)
                    continue
                scores.append(score)
                for suffix, data in members.items():
                    tar.write(member_bytes(f"{key}.{suffix}", data))
            if not scores:
                raise ValueError(
                    f"{job.uri}, episodes from {job.start} on: no episode of this shard can be read: {skipped}; "
                    "take them out of the source, or give a larger frames_per_shard and another folder"
                )
            tar.write(END)
        sync(partial_tar)
        facts: dict[str, Any] = {"skipped": skipped}
        if settings.idle_span is not None:
            facts["idle_span"] = settings.idle_span
        columns = {name: np.concatenate([score[name] for score in scores]) for name in scores[0]}
        content = index_tar(partial_tar, facts=facts, scores=columns)
        with naming(index):
            partial_index.write_bytes(content)
        sync(partial_index)
        partial_tar.replace(job.path)
        partial_index.replace(index)
        sync(job.path.parent)
        return len(skipped)
    except BaseException:
        partial_tar.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to an error of the disk, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def views(source, job: Job) -> Iterator[tuple[int, View | Exception]]:
    """The episodes of a job with their numbers. Where a stream cannot give an episode, its error takes the place."""
    if not isinstance(source, Stream):
        for number in range(job.start, job.stop):
            yield number, view_of(source, number)
        return
    episodes = iter(source.episodes(job.start))
    for number in count():
        try:
            view = view_passing(next(episodes))
        except StopIteration:
            return
        except (ValueError, OSError) as error:
            view = error
        yield number, view


def view_of(source, number: int) -> View:
    return View(
        int(source.lengths[number]),
        float(source.fps[number]),
        partial(source.read, number),
        partial(source.actions, number) if source.action_dim else None,
        partial(source.instructions, number),
        partial(source.labels, number) if source.latent_space is not None else None,
        partial(source.encoded, number) if isinstance(source, EncodedSource) else None,
    )


def view_passing(episode: Episode) -> View:
    is_video = isinstance(episode.frames, VideoFrames)  # whose frames are no files
    return View(
        len(episode.frames),
        episode.fps,
        episode.read,
        None if episode.action is None else episode.actions,
        episode.instructions,
        encoded=lambda indices: [] if is_video else [episode.frames[i] for i in indices],
    )


def record(source, number: int, view: View, settings: Settings) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """The members of an episode, in their order and named by what follows the key; and its idle scores, {} without
    `idle_span`."""
    if (times := source.uneven.get(number)) is not None:
        away = np.abs((times - times[0]) * view.fps - np.arange(len(times)))
        if away.max() > 0.5:
            raise ValueError(
                f"expected frames {1 / view.fps:.4g} s apart, because an episode in a shard has one frame rate, got "
                f"frame {away.argmax()} at {times[away.argmax()] - times[0]:.3f} s"
            )
    fps = view.fps if settings.fps is None else settings.fps
    indices = frame_numbers(view, settings)
    encoded, small, facts = [], [], {}
    parts: dict[str, list[Tensor]] = {}
    for chunk in np.split(indices, range(CHUNK, len(indices), CHUNK)):
        read = view.read(chunk)
        native, _ = read.pop("frames"), read.pop("task")  # the tasks of all frames stand in the header
        if source.crop and "point" in read:
            read["point"] = point_in_middle(read["point"], *native.shape[-2:])
        native = middle(native) if source.crop else native
        frames = native if settings.image_size is None else fit(native, settings.image_size)
        data = view.encoded(chunk) if view.encoded and frames is native and not source.crop else []
        if not data or not all(d.startswith(FIRST_BYTES[settings.codec]) for d in data):
            data = [encode(frame, settings.codec, settings.quality) for frame in frames]
        encoded += data
        if settings.idle_span is not None:
            small.append(fit(native, IDLE_SIZE))
        for name, value in read.items():
            if isinstance(value, Tensor):
                parts.setdefault(name, []).append(value)
            else:
                facts.setdefault(name, value)

    columns = {name: torch.cat(part) for name, part in parts.items()}
    header = changes_of(view.instructions(indices)) | {"fps": fps, "dataset": source.name, "episode": number}
    header |= {"camera": source.camera, "source": source.uri}
    if settings.instruction is not None:
        if settings.instruction not in facts:
            raise ValueError(f"instruction={settings.instruction}; expected one of {', '.join(facts) or 'no facts'}")
        header["task"] = str(facts[settings.instruction])
    if view.actions and not settings.drop_actions:
        columns["action"] = view.actions(indices)
    if view.labels and not settings.drop_actions:
        columns |= view.labels(indices)
        header["latent_space"] = source.latent_space
    header["facts"] = {name: v.item() if isinstance(v, np.generic) else v for name, v in facts.items()}
    columns["timestamp"] = torch.from_numpy(indices / view.fps)  # float64 [s]

    members = {"json": json.dumps(header).encode()}
    for name in sorted(columns, key=lambda name: (name != "state", name != "action", name != "timestamp", name)):
        members[f"{name}.npy"] = array_bytes(columns[name].numpy())
    for i, data in enumerate(encoded):
        members[f"{i:06d}.{EXTENSIONS[settings.codec]}"] = data
    return members, idle_scores(small, fps, columns.get("action"), settings.idle_span)


def frame_numbers(view: View, settings: Settings) -> np.ndarray:
    """The numbers of the frames to write: all, or the nearest ones to the times of a lower rate.

    Raises ValueError for a higher rate, and if frames with actions would be left out without `drop_actions`.
    """
    fps = settings.fps
    if fps is None or abs(view.fps / fps - 1) <= SAME_RATE:
        return np.arange(view.length)
    if fps > view.fps:
        raise ValueError(f"fps={fps:g}; expected at most the {view.fps:g} fps of the episode")
    if (view.actions or view.labels) and not settings.drop_actions:
        raise ValueError(
            f"fps={fps:g}, but the episode has an action for each of its frames at {view.fps:g} fps, and no rule joins "
            "several into one; --drop-actions writes the video alone"
        )
    num_frames = int((view.length - 1) * fps / view.fps + 1e-6) + 1
    return np.rint(np.arange(num_frames) * view.fps / fps).astype(np.int64).clip(max=view.length - 1)


def encode(frame: Tensor, codec: Codec, quality: int) -> bytes:
    """frame: uint8 (c, h, w)."""
    from torchvision.io import encode_jpeg, encode_png

    if codec == "jpeg":
        encoded = encode_jpeg(frame.contiguous(), quality)
        assert isinstance(encoded, Tensor)  # one frame gives one
        return encoded.numpy().tobytes()
    if codec == "png":
        return encode_png(frame.contiguous()).numpy().tobytes()
    import av

    height, width = frame.shape[1:]
    if height % 2 or width % 2:
        raise ValueError(f"codec=yuv420; expected frames of an even width and height, got {width} x {height} pixels")
    image = frame.permute(1, 2, 0).contiguous().numpy()
    return array_bytes(av.VideoFrame.from_ndarray(image, "rgb24").to_ndarray(format="yuv420p"))


def idle_scores(small: list[Tensor], fps: float, actions: Tensor | None, span: float | None) -> dict[str, np.ndarray]:
    """The scores of `hlrp.idle.episode_scores`, from frames that are decoded and small already."""
    if span is None:
        return {}
    frames = torch.cat(small)
    return episode_scores(OneEpisode(frames, fps, actions), 0, span)


class OneEpisode(Source):
    """An episode in memory."""

    def __init__(self, frames: Tensor, fps: float, actions: Tensor | None):
        self.frames, self.taken = frames, actions
        self.lengths, self.fps = np.array([len(frames)]), np.array([fps])
        self.action_dim = 0 if actions is None else actions.shape[1]

    def read(self, episode: int, indices: Indices) -> dict:
        return {"frames": self.frames[list(indices)]}

    def actions(self, episode: int, indices: Indices) -> Tensor:
        assert self.taken is not None
        return self.taken[list(indices)]
