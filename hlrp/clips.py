"""Clips: the samples of a source. `hlrp.contract` has a table of what a sample holds."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hlrp.contract import EncodedSource, Indices, Source, too_coarse
from hlrp.images import decode_clips, fit, fit_all, point_in_middle

logger = logging.getLogger(__name__)
# keys that a sample gives a meaning; other columns and facts of a source must have other names
SAMPLE_KEYS = frozenset("frames images task dataset source episode place index fps state action".split()) | {
    "action_is_pad",
    "latent_is_pad",
}


class Sizes(NamedTuple):
    """Sizes that the optional parts of a batch are padded to; 0 if a part is absent."""

    state: int
    action: int
    chunk: int


class Request(NamedTuple):
    """One read of an episode, for all samples of a batch that show it."""

    samples: list[int]  # their places in the batch
    row: int  # place of the episode in `Clips.episodes`
    episode: int
    frames: np.ndarray  # frames to read, increasing
    place: list[list[int]]  # for each sample, where its frames and then its images stand in `frames`


class Plan(NamedTuple):
    """What the samples of a batch show. Past the end of an episode, its last frame is the padding."""

    starts: np.ndarray  # (samples,)
    clip_frames: np.ndarray  # (samples, t)
    action_frames: np.ndarray  # (samples, chunk), for the longest chunk
    action_is_pad: Sequence[Tensor]  # for each sample (chunk,)
    latent_is_pad: Sequence[Tensor]  # for each sample (t - 1,)
    requests: list[Request]


class Clips(Dataset):
    """Every clip of some episodes: frames at `times` [s] that all lie inside one episode.

    The frame rate of each episode turns seconds into frames. Episodes that are shorter than a clip, or whose frames are
    too far apart, have no clips, and neither have unevenly spaced frames that are not `times` apart; a warning counts
    them. The index holds a few numbers for each episode and none for a clip.

    With `min_times`, fewer of the times must lie inside the episode: a policy acts in every frame and asks for one.
    What lies past the end is marked as padding: actions by action_is_pad, latent actions by latent_is_pad.
    """

    def __init__(
        self,
        source: Source,
        episodes: Indices,
        times: Sequence[float] | np.ndarray = (0.0, 0.5),
        image_size: int = 224,
        source_index: int = 0,
        labelled_episodes: Indices | None = None,
        input_size: int | None = None,
        latent_space: dict | None = None,
        min_times: int | None = None,
        chunk_size: int | None = None,
        num_images: int = 1,
        num_views: int = 1,
        name: str | None = None,
        frames: Sequence[np.ndarray] | None = None,
    ):
        """labelled_episodes: episodes whose actions a sample shows (default: all).
        input_size: side of `images`, the frame at t = 0 as a policy sees it [pixel] (default: no images).
        num_images: how many frames `images` shows of each camera, one frame apart, the last at t = 0. Before the
        episode they repeat its first frame. The `views` of the source stand beside its camera, sorted by name.
        num_views: cameras that `frames` shows, one below the other, sorted by name: all, or 1, the source's own.
        min_times: how many of `times`, counted from the first, must lie inside the episode (default: all).
        chunk_size: number of actions from t = 0 on, one for each frame (default: up to the last time).
        name: name of these clips in logs (default: the source's).
        frames: for each episode of the source, the frames that a clip may start at, increasing (default: all).
        latent_space: the LAQ whose cached latent actions a sample shows, at all times but the last; `frames` then
        holds t = 0 alone (default: no latent actions)."""
        times = np.asarray(times, dtype=np.float64)
        if times[0] != 0 or (np.diff(times) <= 0).any():
            raise ValueError(f"times={times.tolist()} s; expected increasing times that begin with 0")
        self.source, self.times, self.image_size, self.source_index = source, times, image_size, source_index
        self.input_size, self.latent_space = input_size, latent_space
        self.chunk_size, self.num_images, self.name = chunk_size, num_images, name or source.name
        self.num_views = check_views(source, num_views)
        self.crop = getattr(source, "crop", False)  # a plain class with what is read of it is a source, too
        self.min_times = len(times) if min_times is None else min_times
        self.episodes = np.asarray(episodes, dtype=np.int64)
        self.labelled_episodes = self.episodes
        if labelled_episodes is not None:
            self.labelled_episodes = np.asarray(labelled_episodes, dtype=np.int64)
        fps = source.fps[self.episodes]
        self.offsets = np.rint(np.outer(fps, times)).astype(np.int64)  # episodes t
        is_coarse = np.any(too_coarse(fps, times), axis=1)
        if latent_space is not None:
            self._check_labels(latent_space, fps[~is_coarse], self.offsets[~is_coarse])
            source.labels(int(self.episodes[0]), [0])  # loads them once, before workers fork

        lengths = source.lengths[self.episodes]
        num_clips = np.maximum(lengths - self.offsets[:, self.min_times - 1], 0)
        num_clips[is_coarse] = 0
        self._tell_left_out(is_coarse, ~is_coarse & (num_clips == 0))
        self.starts = None
        if frames is not None:
            self.starts = [frames[e][frames[e] < n] for e, n in zip(self.episodes, num_clips, strict=True)]
        uneven = getattr(source, "uneven", {})
        if any(episode in uneven for episode in self.episodes.tolist()):
            self.starts = self._evenly_spaced(self.starts or [np.arange(n) for n in num_clips])
        if self.starts is not None:
            num_clips = np.array([len(starts) for starts in self.starts], dtype=np.int64)
        self.ends = np.cumsum(num_clips)
        self.firsts = self.ends - num_clips  # of the clips of each episode
        if not num_clips.sum():
            raise ValueError(
                f"{source.uri}: no clip of {times[self.min_times - 1]:g} s begins at any of its chosen frames"
            )
        self.is_labelled = np.isin(self.episodes, self.labelled_episodes) & (source.action_dim > 0)
        if chunk_size is None:
            chunk_size = int(self.offsets[~is_coarse, -1].max())
        self.sizes = Sizes(source.state_dim, source.action_dim, chunk_size if source.action_dim else 0)

    @property
    def fingerprint(self) -> str:
        """A hash of the source, the clips and their settings."""
        plain = (self.source.fingerprint, self.image_size, self.input_size, self.min_times, self.chunk_size)
        views = () if self.num_views == 1 else (self.num_views,)
        digest = hashlib.sha256(repr((plain, self.num_images, *views)).encode())
        starts = [np.concatenate(self.starts), self.ends] if self.starts is not None else []
        for numbers in (self.episodes, self.labelled_episodes, self.times, *starts):
            digest.update(np.ascontiguousarray(numbers).tobytes() + b"|")
        return digest.hexdigest()[:16]

    def _tell_left_out(self, is_coarse: np.ndarray, is_short: np.ndarray) -> None:
        """Warns of the episodes without a clip. Raises ValueError if all episodes are."""
        source, reasons = self.source, []
        fps = source.fps[self.episodes]

        def those(rows: np.ndarray) -> str:
            return f"{rows.sum()} of {len(rows)} episodes, first {source.place(int(self.episodes[rows.argmax()]))}"

        if is_coarse.any():
            row = int(is_coarse.argmax())
            column = int(too_coarse(fps[[row]], self.times)[0].argmax())
            delta, nearest = self.times[column], max(self.offsets[row, column], 1) / fps[row]
            reasons.append(
                f"{those(is_coarse)}: delta={delta:g} s is {delta * fps[row]:.2f} frames at its {fps[row]:g} fps, "
                f"expected a whole number, such as {nearest:.4g} s"
            )
        if is_short.any():
            longest = (source.lengths[self.episodes] / fps)[is_short].max()
            span = self.times[self.min_times - 1]
            reasons.append(
                f"{those(is_short)}: clips last {span:g} s, but the longest episode only {longest:g} s"
                if is_short.all()
                else f"{those(is_short)}: shorter than the {span:g} s of a clip"
            )
        if reasons and (is_coarse | is_short).all():
            raise ValueError(f"{source.uri}: no clip is left: {'; '.join(reasons)}")
        for reason in reasons:
            logger.warning("%s: left out %s", source.uri, reason)

    def _evenly_spaced(self, starts: list[np.ndarray]) -> list[np.ndarray]:
        """Keeps the starts whose frames lie `times` apart, to a fifth, as far as they lie inside the episode."""
        kept, error, worst = [], 0.0, ""
        for frames, episode, offsets in zip(starts, self.episodes.tolist(), self.offsets, strict=True):
            if (taken_at := self.source.uneven.get(episode)) is not None and len(frames):
                in_clip = frames[:, None] + offsets  # starts t
                times = taken_at[in_clip.clip(max=len(taken_at) - 1)] - taken_at[frames][:, None]
                errors = np.where(in_clip < len(taken_at), np.abs(times - self.times), 0)[:, 1:] / self.times[1:]
                errors = errors.max(axis=1, initial=0)
                if errors.max() > error:
                    i, error = errors.argmax(), errors.max()
                    apart = times[i].round(3).tolist()
                    worst = f"episode {episode}: from frame {frames[i]} on, they lie {apart} s apart"
                frames = frames[errors <= 0.2]
            kept.append(frames)
        num_clips, num_kept = sum(map(len, starts)), sum(map(len, kept))
        if num_kept < num_clips:
            what = f"{num_clips - num_kept} of {num_clips} clips, whose frames are not {self.times.tolist()} s apart"
            if not num_kept:
                raise ValueError(f"{self.source.uri}: no clip is left without {what}, such as in {worst}")
            logger.warning("%s: left out %s, such as in %s", self.source.uri, what, worst)
        return kept

    def _check_labels(self, latent_space: dict, fps: np.ndarray, offsets: np.ndarray) -> None:
        source, cached = self.source, self.source.latent_space
        if cached is None:
            raise ValueError(f"{source.uri} has no cached latent actions; python -m hlrp.label makes them")
        cached = {"crop": False, "num_views": 1} | cached  # which records of earlier versions do not have
        camera = cameras_of(source, self.num_views)
        for name, value in (latent_space | {"camera": camera, "crop": self.crop}).items():
            if cached[name] != value:
                raise ValueError(
                    f"{source.uri}: expected latent actions of {name}={value!r}, got {name}={cached[name]!r}; "
                    f"make them from {cached['source']} with python -m hlrp.label, or train on that without a cache"
                )
        delta = cached["delta"]
        steps = np.outer(np.rint(fps * delta).astype(np.int64), np.arange(len(self.times)))
        if (offsets != steps).any():
            raise ValueError(
                f"{source.uri}: a sample's latent actions are between {self.times.tolist()} s, the cached ones are "
                f"of whole frames, {steps[0, 1] / fps[0]:.4g} s for delta={delta:g} s; "
                f"train on {cached['source']}, without a cache"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Indices) -> list[dict]:
        """The samples at `indices`, in their order. Clips of one episode are decoded together, and all clips of an
        `EncodedSource` are, into one memory."""
        plan = self._plan(*self._locate(indices))
        samples = [{}] * len(indices)
        for request, read in zip(plan.requests, self._read(plan), strict=True):
            for i, sample in zip(request.samples, self._samples(plan, request, read), strict=True):
                samples[i] = sample
        return samples

    def frames_of(self, indices: Indices) -> dict[int, set[int]]:
        """The frames that the samples at `indices` show, by episode."""
        frames: dict[int, set[int]] = {}
        for row, start in zip(*self._locate(indices), strict=True):
            episode = int(self.episodes[row])
            in_clip = start + np.concatenate([np.arange(1 - self.num_images, 0), self.offsets[row]])
            in_clip = in_clip.clip(0, self.source.lengths[episode] - 1)
            frames.setdefault(episode, set()).update(in_clip.tolist())
        return frames

    def _locate(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        """Place of the episode of each clip, and the frame at its t = 0, int64 (n,) each."""
        indices = np.asarray(indices, dtype=np.int64)
        rows = np.searchsorted(self.ends, indices, side="right")
        starts = indices - self.firsts[rows]
        if self.starts is not None:
            starts = np.array([self.starts[row][start] for row, start in zip(rows, starts, strict=True)])
        return rows, starts

    def _plan(self, rows: np.ndarray, starts: np.ndarray) -> Plan:
        """Plans the reads of a batch. rows: place of each sample's episode; starts: its frame at t = 0."""
        episodes, offsets, first = self.episodes[rows], self.offsets[rows], starts[:, None]
        last = self.source.lengths[episodes][:, None] - 1
        clip_frames = first + offsets
        chunk_size = offsets[:, -1].max(initial=0) if self.chunk_size is None else self.chunk_size
        action_frames = first + np.arange(chunk_size)
        action_is_pad, latent_is_pad = (
            torch.from_numpy(frames > last).unbind() for frames in (action_frames, clip_frames[:, 1:])
        )
        clip_frames, action_frames = np.minimum(clip_frames, last), np.minimum(action_frames, last)

        wanted = clip_frames if self.latent_space is None else clip_frames[:, :1]
        if self.input_size is not None:
            seen = np.maximum(first + np.arange(1 - self.num_images, 1), 0)
            wanted = np.concatenate([wanted, seen], axis=1)
        if isinstance(self.source, EncodedSource):
            groups = [[i] for i in range(len(rows))]
        else:
            groups = [np.flatnonzero(rows == row).tolist() for row in np.unique(rows)]
        firsts = [group[0] for group in groups]
        increases = np.all(wanted[:, 1:] > wanted[:, :-1], axis=1).tolist()
        as_wanted = [list(range(wanted.shape[1]))]
        requests = []
        for group, row, episode in zip(groups, rows[firsts].tolist(), episodes[firsts].tolist(), strict=True):
            is_one = len(group) == 1 and increases[group[0]]
            frames, place = (wanted[group[0]], as_wanted) if is_one else distinct(wanted[group])
            requests.append(Request(group, row, episode, frames, place))
        return Plan(starts, clip_frames, action_frames, action_is_pad, latent_is_pad, requests)

    def _read(self, plan: Plan) -> Iterator[dict]:
        """For each request: what read() gives, with `frames` made square, `native` frames in their own
        size, and the `task` and the `labels` of each sample."""
        if isinstance(self.source, EncodedSource):
            yield from self._read_encoded(self.source, plan)
            return
        for request in plan.requests:
            with naming(self.source, request.episode):
                read = self.source.read(request.episode, request.frames)
                read |= self._known(plan, request)
                native, views = read["frames"], self.num_views
                frames = read_frames(self.source, request.episode, request.frames, self.image_size, views, native)
            yield read | {"native": native, "frames": frames}

    def _read_encoded(self, source: EncodedSource, plan: Plan) -> Iterator[dict]:
        encoded, reads = [], []
        for request in plan.requests:
            _, _, episode, frames, _ = request
            with naming(source, episode):
                encoded.append(source.encoded(episode, frames))
                reads.append(source.about(episode, frames) | self._known(plan, request))

        def name(number: int) -> str:
            frames = [(request.episode, frame) for request in plan.requests for frame in request.frames]
            episode, frame = frames[number]
            return f"{source.uri}, episode {episode}: {source.place(episode)}, frame {frame}"

        natives = decode_clips(encoded, name)
        for read, native, frames in zip(reads, natives, fit_all(natives, self.image_size, self.crop), strict=True):
            yield read | {"native": native, "frames": frames}

    def _known(self, plan: Plan, request: Request) -> dict:
        tasks = self.source.instructions(request.episode, plan.starts[request.samples])
        return {"task": tasks, "labels": self._labels(plan, request)}

    def _labels(self, plan: Plan, request: Request) -> dict[str, Sequence[Tensor]]:
        """The actions of each sample if its episode is labelled, and its cached latent actions if asked for."""
        source, labels, samples = self.source, {}, request.samples
        samples = slice(samples[0], samples[0] + 1) if len(samples) == 1 else samples  # a view
        if self.is_labelled[request.row]:
            frames = plan.action_frames[samples, : self._chunk_size(request.row)]
            labels["action"] = per_sample(source.actions(request.episode, frames.ravel()), frames)
        if self.latent_space is not None:
            frames = plan.clip_frames[samples, :-1]
            for name, column in source.labels(request.episode, frames.ravel()).items():
                labels[name] = per_sample(column, frames)
        return labels

    def _chunk_size(self, row: int) -> int:
        return int(self.offsets[row, -1]) if self.chunk_size is None else self.chunk_size

    def _samples(self, plan: Plan, request: Request, read: dict) -> Iterator[dict]:
        source, (samples, _, episode, frames, place) = self.source, request
        fps, num_shown = float(source.fps[episode]), len(self.times) if self.latent_space is None else 1
        native, fitted, labels, tasks = map(read.pop, ("native", "frames", "labels", "task"))
        state, point = read.pop("state", None), read.pop("point", None)
        if point is not None and self.crop:
            point = point_in_middle(point, *native.shape[-2:])
        pictures, where = {}, source.place(episode)
        if self.input_size is not None:
            viewed = np.array([places[num_shown:] for places in place])
            pictures[source.camera] = native[viewed]  # samples v c h w
            for camera, view in source.views.items():
                there, place_there = distinct(frames[viewed])
                with naming(source, episode):
                    pictures[camera] = view.read(episode, there)["frames"][np.array(place_there)]
        for j, (i, places) in enumerate(zip(samples, place, strict=True)):
            shown = places[:num_shown]
            sample = {
                "frames": select(fitted, shown),
                "task": tasks[j],
                "dataset": self.name,
                "source": self.source_index,
                "episode": source.number(episode),
                "place": where,
                "index": int(plan.starts[i]),
                "fps": fps,
            }
            if self.input_size is not None:
                views = [fit(pictures[camera][j], self.input_size, self.crop) for camera in sorted(pictures)]
                sample["images"] = torch.cat(views)
            if source.state_dim:
                sample["state"] = state[shown[0]]
            if point is not None:
                sample["point"] = point[shown[0]]
            for key, column in labels.items():
                sample[key] = column[j]
            if "latent_vectors" in labels:
                known, vectors = ~plan.latent_is_pad[i].numpy(), sample["latent_vectors"].numpy()
                what = f"{source.uri}, episode {episode}: cached latent action"
                refuse_not_finite(what, vectors[known], plan.clip_frames[i, :-1][known])
            if "action" in labels:
                is_pad, chunk_size = plan.action_is_pad[i], len(sample["action"])
                sample["action_is_pad"] = is_pad if len(is_pad) == chunk_size else is_pad[:chunk_size]
            if self.min_times < len(self.times):
                sample["latent_is_pad"] = plan.latent_is_pad[i]
            for key, value in read.items():
                sample[key] = value[[shown[0], shown[-1]]] if isinstance(value, Tensor) else value
            yield sample


def check_views(source: Source, num_views: int) -> int:
    """Returns num_views. Raises ValueError unless it is 1 or the number of all cameras of the source."""
    if num_views != 1 and num_views != 1 + len(source.views):
        cameras = cameras_of(source, 1 + len(source.views)) or "one"
        raise ValueError(f"{source.uri}: expected {num_views} cameras, as by ?camera=A,B, got {cameras}")
    return num_views


def cameras_of(source: Source, num_views: int) -> str:
    """The cameras that `frames` shows, in their order."""
    return source.camera if num_views == 1 else ",".join(sorted([source.camera, *source.views]))


def read_frames(
    source: Source, episode: int, indices: Indices, image_size: int, num_views: int = 1, own: Tensor | None = None
) -> Tensor:
    """Frames uint8 (t, c, num_views * h, w) as `Clips` shows them. own: those of the source's own camera, where they
    have been read already."""
    crop = getattr(source, "crop", False)
    own = source.read(episode, indices)["frames"] if own is None else own
    frames = fit(own, image_size, crop)
    if num_views == 1:
        return frames
    others = {camera: view.read(episode, indices)["frames"] for camera, view in source.views.items()}
    squares = {source.camera: frames} | {camera: fit(other, image_size, crop) for camera, other in others.items()}
    return torch.cat([squares[camera] for camera in sorted(squares)], dim=-2)


def refuse_not_finite(name: str, values: np.ndarray, frames: Indices | None = None) -> None:
    """Raises ValueError, which begins with `name` and tells the frame, if a row of values (t, ...) has nan or inf.

    frames: the frame of each row (default: 0, 1, ...).
    """
    for row in np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[:1].tolist():
        frame = row if frames is None else frames[row]
        raise ValueError(f"{name} of frame {frame}: expected finite numbers, got {values[row].tolist()}")


@contextmanager
def naming(source: Source, episode: int) -> Iterator[None]:
    """Adds the source, the episode and its file to an error that reading it raises."""
    try:
        yield
    except (ValueError, OSError) as error:
        place = source.place(episode)
        is_told = place in str(error) or place == f"episode {episode}"
        raise ValueError(f"{source.uri}, episode {episode}: {error if is_told else f'{place}: {error}'}") from error


def short(place: str) -> str:
    """The last folder and the file of a path."""
    return "/".join(place.split("/")[-2:])


def distinct(frames: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """The different numbers in `frames` (n, t), increasing, and where each number stands among them."""
    unique, place = np.unique(frames, return_inverse=True)
    return unique, place.reshape(frames.shape).tolist()


def per_sample(column: Tensor, frames: np.ndarray) -> Sequence[Tensor]:
    """Splits a column (n * t, ...) into n tensors (t, ...), for frames (n, t)."""
    return [column] if len(frames) == 1 else column.unflatten(0, frames.shape).unbind()


def select(frames: Tensor, indices: list[int]) -> Tensor:
    """frames[indices], without a copy if the indices are evenly spaced."""
    if indices == list(range(len(frames))):
        return frames
    first, last = indices[0], indices[-1]
    evenly = range(first, last + 1, max((last - first) // max(len(indices) - 1, 1), 1))
    return frames[first : last + 1 : evenly.step] if list(evenly) == indices else frames[indices]
