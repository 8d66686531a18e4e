"""LeRobot datasets (format v3): `lerobot:REPO_OR_DIR?camera=KEY,KEY&state=KEY,KEY&action=KEY[:7]&revision=TAG`.

The format: many episodes share a file, and meta/episodes says in which rows of which parquet file, and from
which time on in which mp4, each of them lies. The frame of a row is the one that the mp4 shows at this start plus the
row's own `timestamp`. Numbers are read once; frames are decoded, or read as PNG, on demand.
"""

import hashlib
import logging
import os
import re
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hlrp.checkpoints import contents_hash
from hlrp.contract import Column, Indices, Source, parse_columns, tell_once
from hlrp.lerobot_files import (
    POINT,
    Columns,
    check_columns,
    check_images,
    episode_files,
    read_episodes,
    read_images,
    read_info,
    read_json,
    read_numbers,
    read_table,
    read_tasks,
    read_texts,
    to_numpy,
)
from hlrp.video_index import probe_all
from hlrp.videos import open_video

logger = logging.getLogger(__name__)
STATE, ACTION = "observation.state", "action"
LATENT_ACTION, LATENT_INDICES = "latent_action", "latent_action_indices"  # columns that hlrp.label adds
LATENT_SPACE = "meta/latent_actions.json"  # and what they are
FRAME_KEYS = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns of every dataset
EVEN = 0.05  # of a frame: how far time stamps may lie from evenly spaced ones


class LeRobotData(Source):
    """One camera of a LeRobot dataset: a source, as the data contract has it. Further ones are views for a policy.

    camera: features, or the last parts of their names (`top` for observation.images.top), by commas; else the first.
    state, action: features side by side, by commas, each with a range of its numbers or whole; "" for none. Else
    observation.state and action, where they are. task: the feature with the instruction of each row, a text or a number
    in meta/tasks; else task_index. revision: branch, tag or commit on the Hub.
    Raises ValueError for another version of the format, for files that are missing, broken, or shorter than their
    episodes, and for rows that are null, not finite, or of another size. With `skip_broken`, episodes with such rows
    and of broken videos are left out, logged, and counted in `num_skipped`.
    """

    def __init__(
        self,
        repo_or_dir: str | Path,
        camera: str | None = None,
        uri: str | None = None,
        name: str | None = None,
        skip_broken: bool = False,
        state: str | None = None,
        action: str | None = None,
        task: str | None = None,
        revision: str | None = None,
    ):
        first, *others = camera.split(",") if camera else [None]
        self.uri = uri or f"lerobot:{repo_or_dir}"
        self.root = root = find_dataset(repo_or_dir, "meta/*", revision=revision)
        info = read_info(root, str(repo_or_dir))
        features = info["features"]
        self.camera = choose_camera(self.uri, features, first)
        self.is_video = features[self.camera]["dtype"] == "video"
        columns = {STATE: choose_columns(self.uri, features, "state", state, STATE)}
        columns[ACTION] = choose_columns(self.uri, features, "action", action, ACTION)
        if task is not None:
            task = choose_task(self.uri, features, task)
        find_dataset(repo_or_dir, "data/*", f"videos/{self.camera}/*", revision=revision)
        self.name = name or f"lerobot-{Path(repo_or_dir).name or root.name}"
        if first and not name:
            self.name += "-" + short_name(self.camera, features)

        video = f"videos/{self.camera}"
        episodes = read_episodes(root, video if self.is_video else None)
        num_episodes, empty = len(episodes["length"]), np.flatnonzero(episodes["length"] < 1)
        for episode in episodes["episode_index"][empty]:
            if not skip_broken or len(empty) == num_episodes:
                raise ValueError(f"{self.uri}, episode {episode}: {root}/meta/episodes has it without frames")
            logger.warning("skipped %s, episode %d: it has no frames", self.uri, episode)
        episodes = {key: np.delete(column, empty) for key, column in episodes.items()}
        self.data_files, episodes["data_file"] = episode_files(root, info["data_path"], episodes, "data")
        chosen = [column.path for name in (STATE, ACTION) for column in columns[name]]
        chosen += [POINT] * (POINT in features)
        keys = list(dict.fromkeys(chosen))
        self.tasks = read_tasks(root) if "task_index" in features else None
        self.numbers, self.places, broken = read_numbers(self.data_files, episodes, keys, self.tasks)
        others_kept = {key: column for key, column in self.numbers.items() if key not in keys}
        point = {POINT: self.numbers[POINT]} if POINT in features else {}
        self.numbers = others_kept | side_by_side(self.uri, columns, self.numbers) | point
        self.state_dim, self.action_dim = (self.numbers[key].shape[1] if columns[key] else 0 for key in (STATE, ACTION))
        if task is not None:
            texts, self.tasks = read_texts(self.data_files, task, self.tasks)
            self.numbers["task_index"] = texts[self.places]
        linked = []  # images beside the parquet files
        for number, path in enumerate(() if self.is_video else self.data_files):
            check_columns(path, [self.camera])
            named, faults = check_images(path, self.camera, root)
            linked += named
            here = np.flatnonzero(episodes["data_file"] == number)
            for row, fault in faults.items():
                episode = here[np.searchsorted(episodes["row_in_file"][here], row, side="right") - 1]
                broken.setdefault(int(episode), f"episode {episodes['episode_index'][episode]}: {path}: {fault}")
        if point:
            check_points(self.numbers[POINT], self.uri)
        self.latent_space = read_json(root / LATENT_SPACE) if (root / LATENT_SPACE).is_file() else None
        cameras = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
        read = {*keys, *cameras, *FRAME_KEYS, LATENT_ACTION, LATENT_INDICES, task}
        self.unread = listed({key: feature for key, feature in features.items() if key not in read})
        if self.unread:
            choice = "?action=KEY&state=KEY,KEY[:7]&task=KEY chooses others"
            tell_once(f"{self.uri}: columns not read: {self.unread}; {choice}")

        stamps = self.numbers["timestamp"]
        episodes["fps"], is_even = frame_rates(stamps, episodes["first_row"], episodes["length"], float(info["fps"]))
        self.video_files = []
        if self.is_video:
            self.video_files, episodes["video_file"] = episode_files(
                root, info["video_path"], episodes, video, self.camera
            )
            episodes["video_start"] = episodes[f"{video}/from_timestamp"]
            add_places(episodes, stamps)
            self.spacing = frame_spacing(stamps, episodes)
            broken = broken_episodes(self.video_files, episodes, stamps) | broken
        if broken and (not skip_broken or len(broken) == len(episodes["length"])):
            more = f"; {len(broken)} episodes are broken in all" if len(broken) > 1 else ""
            raise ValueError(f"{self.uri}, {next(iter(broken.values()))}{more}")
        for error in broken.values():
            logger.warning("skipped %s, %s", self.uri, error)
        kept = np.setdiff1d(np.arange(len(episodes["length"])), list(broken))
        used = "episode_index length fps data_file row_in_file first_row video_file video_start first_shown num_shown"
        self.episodes = {key: episodes[key][kept] for key in used.split() if key in episodes}
        options = {"state": state, "action": action, "task": task, "revision": revision, "skip_broken": skip_broken}
        views = [LeRobotData(repo_or_dir, other, self.uri, **options) for other in others]
        self.views = {view.camera: view for view in views if view.camera != self.camera}
        whole = reduce(np.intersect1d, (view.episodes["episode_index"] for view in (self, *views)))
        if not len(whole):
            raise ValueError(f"{self.uri}: no episode of which all cameras can be read")
        for view in (self, *views):
            kept = np.isin(view.episodes["episode_index"], whole)
            view.episodes = {key: column[kept] for key, column in view.episodes.items()}
            view.lengths, view.fps = view.episodes["length"], view.episodes["fps"]
        self.num_skipped = num_episodes - len(whole)
        uneven = episodes["episode_index"][~is_even]
        uneven = np.flatnonzero(np.isin(self.episodes["episode_index"], uneven)).tolist()
        self.uneven = {episode: self._stamps(episode) for episode in uneven}

        files = self.video_files if self.is_video else [*self.data_files, *linked]
        if self.latent_space is not None:
            files = files + self.data_files
        digest = hashlib.sha256(contents_hash([path for path in files if path.exists()]).encode())
        others = [view.fingerprint for view in self.views.values()]
        kept = {key: column.tolist() for key, column in self.episodes.items() if key != "row_in_file"}
        digest.update(repr((self.camera, *others, kept, sorted((self.tasks or {}).items()))).encode())
        for key, column in self.numbers.items():
            digest.update(repr((key, column.shape)).encode() + np.ascontiguousarray(column).tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def read(self, episode: int, indices: Indices) -> dict:
        rows = self._rows(episode, indices)
        if self.is_video:
            frames = self._decode(episode, np.asarray(indices))
        else:
            at = {key: self.episodes[key][episode] for key in ("data_file", "row_in_file", "first_row")}
            in_file = self.places[rows] - at["first_row"] + at["row_in_file"]
            frames = read_images(self.data_files[at["data_file"]], self.camera, in_file, self.root)
        read = {"frames": frames, "task": self.instructions(episode, indices)[0]}
        if self.state_dim:
            read["state"] = self.states(episode, indices)
        if POINT in self.numbers:
            read["point"] = torch.from_numpy(self.numbers[POINT][rows])
        return read

    def _decode(self, episode: int, indices: np.ndarray) -> Tensor:
        """The frames of an mp4 whose own times are those of the rows, to half a frame."""
        at = {key: self.episodes[key][episode] for key in ("video_file", "video_start", "first_shown", "num_shown")}
        path, rows = self.video_files[at["video_file"]], self._rows(episode, indices)
        video, times = open_video(path), at["video_start"] + self.numbers["timestamp"][rows]
        if at["num_shown"] == len(video.shown_at):  # the frames of the file are the rows, one by one
            numbers = at["first_shown"] + indices
        else:
            numbers = nearest(video.shown_at, times)
        error = np.abs(video.shown_at[numbers] - times) / self.spacing[rows]
        if error.max() > 0.4999:  # but for rounding, half a frame
            worst = error.argmax()
            raise ValueError(
                f"episode {self.episodes['episode_index'][episode]}: its frame {indices[worst]} is at "
                f"{times[worst]:.3f} s by timestamp and from_timestamp, but {path} shows one at "
                f"{video.shown_at[numbers[worst]]:.3f} s"
            )
        return video.numbered(numbers)

    def place(self, episode: int) -> str:
        """The mp4, or the parquet file of images, and the number of the episode in the data set."""
        at = {key: column[episode] for key, column in self.episodes.items()}
        path = self.video_files[at["video_file"]] if self.is_video else self.data_files[at["data_file"]]
        return f"{path}, episode {at['episode_index']}"

    def _rows(self, episode: int, indices: Indices) -> np.ndarray:
        return self.episodes["first_row"][episode] + np.asarray(indices)

    def _stamps(self, episode: int) -> np.ndarray:
        """When the frames of an episode were taken, from about 0 on [s]."""
        first, length = self.episodes["first_row"][episode], self.episodes["length"][episode]
        return self.numbers["timestamp"][first : first + length].astype(np.float64)

    def instructions(self, episode: int, indices: Indices) -> list[str]:
        if self.tasks is None:
            return [""] * len(indices)
        return [self.tasks[task] for task in self.numbers["task_index"][self._rows(episode, indices)].tolist()]

    def actions(self, episode: int, indices: Indices) -> Tensor:
        return torch.from_numpy(self.numbers[ACTION][self._rows(episode, indices)])

    def states(self, episode: int, indices: Indices) -> Tensor:
        return torch.from_numpy(self.numbers[STATE][self._rows(episode, indices)])

    def labels(self, episode: int, indices: Indices) -> dict[str, Tensor]:
        rows = self.places[self._rows(episode, indices)]
        return {name: torch.from_numpy(column[rows]) for name, column in self.latent_actions.items()}

    @cached_property
    def latent_actions(self) -> Columns:
        """The cached labels of all rows of the data files; read when they are first asked for."""
        columns = {"latent_vectors": LATENT_ACTION}
        assert self.latent_space is not None
        if self.latent_space["num_tokens"]:
            columns["latent_indices"] = LATENT_INDICES
        tables = [read_table(path, list(columns.values())) for path in self.data_files]
        return {
            name: np.concatenate([to_numpy(table[column])[0] for table in tables]) for name, column in columns.items()
        }


def find_dataset(repo_or_dir: str | Path, *patterns: str, revision: str | None = None) -> Path:
    """Folder of a dataset: this one, one that LeRobot recorded here, or one on the Hub (`patterns` of it). Only the Hub
    has revisions."""
    name, path = str(repo_or_dir), Path(repo_or_dir).expanduser()
    hf_home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    lerobot_home = Path(os.environ.get("HF_LEROBOT_HOME", f"{hf_home}/lerobot")).expanduser()
    for folder in (path, lerobot_home / path) if revision is None else ():
        if (folder / "meta" / "info.json").is_file():
            return folder.resolve()
    if revision is not None and path.is_dir():
        raise ValueError(f"lerobot:{name}: revision={revision}; expected a dataset on the Hub, got a folder")
    if path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"lerobot:{name}: no meta/info.json there; expected the folder of a LeRobot dataset")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise ValueError(f"lerobot:{name}: no such folder, and the Hub does not give it{at}: {error}") from error


def is_depth(feature: dict) -> bool:
    """Whether a camera shows distances, by any spelling of the flag that LeRobot has had."""
    for facts in (feature, feature.get("info"), feature.get("video_info")):
        flags = [facts.get(flag) for flag in ("is_depth_map", "video.is_depth_map")] if isinstance(facts, dict) else []
        if any(str(flag).lower() in ("true", "1") for flag in flags):
            return True
    return False


def choose_camera(uri: str, features: dict, camera: str | None) -> str:
    """The feature that `camera` names, by its whole name or the last parts of it; None: the first."""
    kinds = {key: feature for key, feature in features.items() if feature["dtype"] in ("video", "image")}
    cameras = [key for key, feature in kinds.items() if not is_depth(feature)]
    known = ", ".join(cameras) or "none"
    if others := ", ".join(key for key in kinds if key not in cameras):
        known += f" (and of depth, which is not read: {others})"
    matches = cameras if camera is None else [key for key in cameras if f".{key}".endswith(f".{camera}")]
    if camera is not None and camera in matches:
        return camera
    if not matches:
        raise ValueError(f"{uri}: camera={camera}; its cameras: {known}")
    if camera is not None and len(matches) > 1:
        raise ValueError(f"{uri}: camera={camera} is the end of several names; expected one of {', '.join(matches)}")
    return matches[0]


def short_name(camera: str, features: dict) -> str:
    """The last parts of a camera's name, as few as tell it from the other features."""
    parts = camera.split(".")
    ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
    return next(end for end in ends if sum(f".{key}".endswith(f".{end}") for key in features) == 1 or end == camera)


def listed(features: dict) -> str:
    """The names of features with their shapes."""
    return ", ".join(f"{key} {list(feature.get('shape') or [])}" for key, feature in features.items())


def choose_columns(uri: str, features: dict, setting: str, keys: str | None, default: str) -> list[Column]:
    """The features of numbers that `keys` names, by their whole names or the last parts; None: the default, if any."""
    numeric = {k: f for k, f in features.items() if f["dtype"] not in ("video", "image", "string", "language")}
    if keys is None:
        return [Column(default, slice(None))] if default in features else []
    columns = []
    for column in parse_columns(uri, setting, keys):
        found = [k for k in numeric if k == column.path] or [k for k in numeric if f".{k}".endswith(f".{column.path}")]
        if len(found) != 1:
            raise ValueError(f"{uri}: {setting}={column}; expected one of {listed(numeric) or 'none'}")
        columns.append(Column(found[0], column.range))
    return columns


def choose_task(uri: str, features: dict, key: str) -> str:
    known = {k: f for k, f in features.items() if f["dtype"] == "string" or f["dtype"].startswith("int")}
    if key not in known:
        raise ValueError(f"{uri}: task={key}; expected a column of texts or task numbers: {listed(known) or 'none'}")
    return key


def side_by_side(uri: str, columns: dict[str, list[Column]], numbers: Columns) -> Columns:
    """State and action, each of its columns. Raises ValueError where a range holds no number."""
    found = {}
    for name, chosen in columns.items():
        parts = [numbers[path][:, part] for path, part in chosen]
        for column, part in zip(chosen, parts, strict=True):
            if not part.shape[1]:
                of = numbers[column.path].shape[1]
                raise ValueError(f"{uri}: {column} of {of} numbers; expected a key, or a range such as KEY[:7]")
        if parts:
            found[name] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return found


def check_points(points: np.ndarray, uri: str) -> None:
    """Raises ValueError where points are none in the image: others would be taken for its border."""
    if points.shape[1] != 2 or (np.abs(points) > 1).any():
        found = f"{points.shape[1]} numbers up to {np.nanmax(np.abs(points)):g}"
        expected = "x and y from the middle of the image, in halves of its longer side, -1 to 1 or nan"
        raise ValueError(f"{uri}: {POINT} has {found}; expected {expected}")


def frame_rates(
    stamps: np.ndarray, first_row: np.ndarray, lengths: np.ndarray, fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Frames per second of each episode by its time stamps, which are exactly `fps` where they agree with it; and
    whether its frames are evenly spaced."""
    episode_of = np.repeat(np.arange(len(lengths)), lengths)
    first, last = (stamps[rows].astype(np.float64) for rows in (first_row, first_row + lengths - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = (lengths - 1) / (last - first)
        number = np.arange(len(stamps)) - np.repeat(first_row, lengths)
        away = np.abs((stamps - first[episode_of]) * rates[episode_of] - number)
    away[~np.isfinite(away)] = 0
    is_even = np.maximum.reduceat(away, first_row) <= EVEN
    for i in np.flatnonzero(~is_even).tolist():  # the rate of most of its frames
        gaps = np.diff(stamps[first_row[i] : first_row[i] + lengths[i]].astype(np.float64))
        rates[i] = 1 / gaps[np.abs(gaps / np.median(gaps) - 1) < 0.2].mean()
    is_known = np.isfinite(rates) & (rates > 0)
    rates[~is_known] = np.median(rates[is_known]) if is_known.any() else fps
    return np.where(np.abs(rates / fps - 1) < 1e-3, fps, rates.round(4)), is_even  # stamps are float32


def frame_spacing(stamps: np.ndarray, episodes: Columns) -> np.ndarray:
    """From each frame to the nearer one of its neighbours in the episode; float32 (rows,) [s]."""
    first, last = episodes["first_row"], episodes["first_row"] + episodes["length"] - 1
    gaps = np.diff(stamps.astype(np.float64), prepend=-np.inf, append=np.inf)
    gaps[first] = gaps[last + 1] = np.inf
    spacing = np.minimum(gaps[:-1], gaps[1:])
    spacing[first[first == last]] = 1 / episodes["fps"][first == last]
    return spacing.astype(np.float32)


def nearest(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The places among the first of those nearest to the second."""
    right = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    left = (right - 1).clip(min=0)
    return np.where(values - sorted_values[left] <= sorted_values[right] - values, left, right)


def add_places(episodes: Columns, stamps: np.ndarray) -> None:
    """Adds to `episodes` how many frames their mp4 has before them (`first_shown`) and in all (`num_shown`), if it has
    one for each row of its episodes; -1 where episodes share frames."""
    lengths, starts = episodes["length"], episodes["video_start"]
    episodes["first_shown"], episodes["num_shown"] = np.zeros_like(lengths), np.full_like(lengths, -1)
    lasts = stamps[episodes["first_row"] + lengths - 1]
    for number in np.unique(episodes["video_file"]):
        here = np.flatnonzero(episodes["video_file"] == number)
        here = here[starts[here].argsort(kind="stable")]
        if (starts[here][1:] > (starts + lasts / 2)[here][:-1]).all():
            episodes["first_shown"][here] = lengths[here].cumsum() - lengths[here]
            episodes["num_shown"][here] = lengths[here].sum()


def broken_episodes(paths: list[Path], episodes: Columns, stamps: np.ndarray) -> dict[int, str]:
    """What is wrong with each episode whose video is missing, unreadable, or does not show all of the episode."""
    headers, broken = list(probe_all(paths).values()), {}
    begins, ends = episodes["first_row"], episodes["first_row"] + episodes["length"] - 1
    firsts, lasts = (episodes["video_start"] + stamps[rows] for rows in (begins, ends))
    for i, (number, first, last, fps) in enumerate(
        zip(episodes["video_file"], firsts, lasts, episodes["fps"], strict=True)
    ):
        header, name = headers[number], f"episode {episodes['episode_index'][i]}"
        if isinstance(header, ValueError):
            broken[i] = f"{name}: {header}"
        elif not last <= header.last + 0.5 / fps:
            broken[i] = (
                f"{name}: its last frame is at {last:.3f} s, but {paths[number]} ends with a frame at "
                f"{header.last:.3f} s"
            )
        elif first < header.first - 0.5 / fps:
            broken[i] = (
                f"{name}: its first frame is at {first:.3f} s, but {paths[number]} begins with a frame at "
                f"{header.first:.3f} s"
            )
    return broken
