"""LeRobot datasets (format v3), read directly: `lerobot:REPO_OR_DIR?camera=KEY,KEY`.

The format: many episodes share a file, and meta/episodes says in which rows of which parquet file, and from
which time on in which mp4, each of them lies. Numbers are read once; frames are decoded, or read as PNG, on
demand.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hlrp.checkpoints import contents_hash
from hlrp.images import decode_all
from hlrp.videos import probe_all, read_frames

STATE, ACTION = "observation.state", "action"
POINT = "annotation.point"  # column of what `hlrp.data` calls so, nan where it is not known
LATENT_ACTION, LATENT_INDICES = "latent_action", "latent_action_indices"  # columns that hlrp.label adds
LATENT_SPACE = "meta/latent_actions.json"  # and what they are
Columns = dict[str, np.ndarray]


class LeRobotData:
    """One camera of a LeRobot dataset: a source, as the data contract has it. Further ones are views for a policy.

    camera: features, or the last part of their names (`top` for observation.images.top), by commas; else the first.
    Raises ValueError for another version of the format, and for files that are missing, broken, or shorter
    than their episodes. With `skip_broken`, episodes of broken videos are left out, logged, and counted in
    `num_skipped`.
    """

    def __init__(
        self,
        repo_or_dir: str | Path,
        camera: str | None = None,
        uri: str | None = None,
        name: str | None = None,
        skip_broken: bool = False,
    ):
        camera, *others = camera.split(",") if camera else [None]
        self.uri = uri or f"lerobot:{repo_or_dir}"
        self.root = root = find_dataset(repo_or_dir, "meta/*")
        info = read_info(root, repo_or_dir)
        self.camera = choose_camera(self.uri, info["features"], camera)
        self.is_video = info["features"][self.camera]["dtype"] == "video"
        find_dataset(repo_or_dir, "data/*", f"videos/{self.camera}/*")
        self.name = name or f"lerobot-{Path(repo_or_dir).name or root.name}"
        if camera and not name:
            self.name += "-" + self.camera.split(".")[-1]

        episodes = read_episodes(root)
        self.data_files, episodes["data_file"] = episode_files(root, info["data_path"], episodes, "data")
        keys = [key for key in ("task_index", STATE, ACTION, POINT) if key in info["features"]]
        self.numbers = read_numbers(self.data_files, episodes, keys)
        self.state_dim, self.action_dim = (self.numbers[key].shape[1] if key in keys else 0 for key in (STATE, ACTION))
        if POINT in keys:
            check_points(self.numbers[POINT], self.uri)
        self.tasks = read_tasks(root)
        labels = root / LATENT_SPACE
        self.latent_space = json.loads(labels.read_text()) if labels.is_file() else None

        self.video_files, broken = [], {}
        if self.is_video:
            self.video_files, episodes["video_file"] = episode_files(
                root, info["video_path"], episodes, f"videos/{self.camera}", self.camera
            )
            episodes["video_start"] = episodes[f"videos/{self.camera}/from_timestamp"]
            broken = broken_episodes(self.video_files, episodes, info["fps"])
        if broken and (not skip_broken or len(broken) == len(episodes["length"])):
            raise ValueError(f"{self.uri}, {next(iter(broken.values()))}")
        for error in broken.values():
            logging.getLogger(__name__).warning("skipped %s, %s", self.uri, error)
        kept = np.setdiff1d(np.arange(len(episodes["length"])), list(broken))
        used = ("episode_index", "length", "data_file", "row_in_file", "first_row", "video_file", "video_start")
        self.episodes = {key: episodes[key][kept] for key in used if key in episodes}
        views = [LeRobotData(repo_or_dir, other, self.uri, skip_broken=skip_broken) for other in others]
        self.views = {view.camera: view for view in views if view.camera != self.camera}
        whole = reduce(np.intersect1d, (camera.episodes["episode_index"] for camera in (self, *views)))
        if not len(whole):
            raise ValueError(f"{self.uri}: no episode of which all cameras can be read")
        for camera in (self, *views):
            kept = np.isin(camera.episodes["episode_index"], whole)
            camera.episodes = {key: column[kept] for key, column in camera.episodes.items()}
            camera.lengths = camera.episodes["length"]
            camera.fps = np.full(len(whole), float(info["fps"]))
        self.num_skipped = len(episodes["length"]) - len(whole)

        files = self.video_files if self.is_video else self.data_files
        if self.latent_space is not None:
            files = files + self.data_files
        digest = hashlib.sha256(contents_hash([path for path in files if path.exists()]).encode())
        others = [view.fingerprint for view in self.views.values()]
        kept = {key: column.tolist() for key, column in self.episodes.items() if key != "row_in_file"}
        digest.update(repr((self.camera, *others, info["fps"], kept, sorted(self.tasks.items()))).encode())
        for key, column in self.numbers.items():
            digest.update(repr((key, column.shape)).encode() + np.ascontiguousarray(column).tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def read(self, episode: int, indices: Sequence[int]) -> dict:
        at = {key: column[episode] for key, column in self.episodes.items()}
        indices = np.asarray(indices)
        if self.is_video:
            # the middle of a frame's time, from where no rounding of time stamps leads to its neighbour
            times = at["video_start"] + (indices + 0.5) / self.fps[episode]
            frames = read_frames(self.video_files[at["video_file"]], times)
        else:
            frames = read_images(self.data_files[at["data_file"]], self.camera, at["row_in_file"] + indices)
        task = self.tasks[int(self.numbers["task_index"][at["first_row"], 0])]
        read = {"frames": frames, "task": task}
        if self.state_dim:
            read["state"] = self.states(episode, indices)
        if POINT in self.numbers:
            read["point"] = torch.from_numpy(self.numbers[POINT][at["first_row"] + indices])
        return read

    def look(self, camera: str, episode: int, indices: Sequence[int]) -> Tensor:
        return self.views[camera].read(episode, indices)["frames"]

    def actions(self, episode: int, indices: Sequence[int]) -> Tensor:
        rows = self.episodes["first_row"][episode] + np.asarray(indices)
        return torch.from_numpy(self.numbers[ACTION][rows])

    def states(self, episode: int, indices: Sequence[int]) -> Tensor:
        rows = self.episodes["first_row"][episode] + np.asarray(indices)
        return torch.from_numpy(self.numbers[STATE][rows])

    def labels(self, episode: int, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = self.episodes["first_row"][episode] + np.asarray(indices)
        return {name: torch.from_numpy(column[rows]) for name, column in self.latent_actions.items()}

    @cached_property
    def latent_actions(self) -> Columns:
        """The cached labels of all frames, as `labels` names them; read when they are first asked for."""
        columns = {"latent_vectors": LATENT_ACTION}
        if self.latent_space["num_tokens"]:
            columns["latent_indices"] = LATENT_INDICES
        tables = [read_table(path, list(columns.values())) for path in self.data_files]
        return {name: np.concatenate([to_numpy(table[column]) for table in tables]) for name, column in columns.items()}


def find_dataset(repo_or_dir: str | Path, *patterns: str) -> Path:
    """Folder of a dataset: this one, one that LeRobot recorded here, or one on the Hub (`patterns` of it)."""
    name, path = str(repo_or_dir), Path(repo_or_dir).expanduser()
    hf_home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    lerobot_home = Path(os.environ.get("HF_LEROBOT_HOME", f"{hf_home}/lerobot")).expanduser()
    for folder in (path, lerobot_home / path):
        if (folder / "meta" / "info.json").is_file():
            return folder.resolve()
    if path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"lerobot:{name}: no meta/info.json there; the folder of a LeRobot dataset fits")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(f"lerobot:{name}: no such folder, and the Hub does not give it: {error}") from error


def read_info(root: Path, repo_or_dir: str | Path) -> dict:
    info = json.loads((root / "meta" / "info.json").read_text())
    version = info.get("codebase_version")
    if not str(version).startswith("v3."):
        raise ValueError(
            f"{repo_or_dir}: version {version} of the LeRobot format; v3 fits. To convert it: python -m "
            f"lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=NAME --root={root} --push-to-hub=false"
        )
    return info


def choose_camera(uri: str, features: dict, camera: str | None) -> str:
    cameras = [
        key
        for key, feature in features.items()
        if feature["dtype"] in ("video", "image") and not (feature.get("info") or {}).get("is_depth_map")
    ]
    fitting = [key for key in cameras if camera in (None, key, key.split(".")[-1])]
    if not fitting:
        raise ValueError(f"{uri}: camera={camera}; its cameras: {', '.join(cameras) or 'none'}")
    return fitting[0]


def check_points(points: np.ndarray, uri: str) -> None:
    """Raises ValueError where points are none in the image: others would be taken for its border."""
    if points.shape[1] != 2 or (np.abs(points) > 1).any():
        found = f"{points.shape[1]} numbers up to {np.nanmax(np.abs(points)):g}"
        expected = "x and y from the middle of the image, in halves of its longer side, -1 to 1 or nan"
        raise ValueError(f"{uri}: {POINT} has {found}; {expected} fit")


def read_table(path: Path, columns: list[str] | None = None):
    """A parquet file as a pyarrow table."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path, columns=columns, use_threads=False)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error


def to_numpy(column) -> np.ndarray:
    """A pyarrow column of numbers, or of lists of equal length, as (rows, numbers)."""
    from pyarrow import types

    array = column.combine_chunks()
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def read_episodes(root: Path) -> Columns:
    """The columns of meta/episodes with one number an episode, sorted by episode."""
    from pyarrow import parquet

    tables = []
    for path in sorted((root / "meta" / "episodes").rglob("*.parquet")):
        names = parquet.read_schema(path).names
        tables.append(read_table(path, [n for n in names if not n.startswith("stats/") and n != "tasks"]))
    if not tables:
        raise ValueError(f"{root}: no episodes in meta/episodes")
    columns = {
        name: np.concatenate([to_numpy(table[name])[:, 0] for table in tables]) for name in tables[0].column_names
    }
    order = columns["episode_index"].argsort()
    return {name: column[order] for name, column in columns.items()}


def episode_files(
    root: Path, template: str, episodes: Columns, prefix: str, camera: str = ""
) -> tuple[list[Path], np.ndarray]:
    """The files that episodes lie in, and for each episode the number of its file in that list."""
    places = np.stack([episodes[f"{prefix}/chunk_index"], episodes[f"{prefix}/file_index"]], axis=1)
    unique, number = np.unique(places, axis=0, return_inverse=True)
    paths = [template.format(chunk_index=chunk, file_index=file, video_key=camera) for chunk, file in unique.tolist()]
    return [root / path for path in paths], number.ravel()


def read_numbers(paths: list[Path], episodes: Columns, keys: list[str]) -> Columns:
    """Columns of all data files, one after another. Adds to `episodes` where each begins there (`first_row`)
    and in its own file (`row_in_file`)."""
    lengths, episode_index = episodes["length"], episodes["episode_index"]
    episodes["first_row"], episodes["row_in_file"] = np.zeros_like(lengths), np.zeros_like(lengths)
    parts = []
    num_rows = 0
    for number, path in enumerate(paths):
        table = read_table(path, ["episode_index", *keys])
        here = np.flatnonzero(episodes["data_file"] == number)
        expected = np.repeat(episode_index[here], lengths[here])
        if not np.array_equal(to_numpy(table["episode_index"])[:, 0], expected):
            raise ValueError(f"{path}: its rows are not those of the episodes that meta/episodes has in it")
        episodes["row_in_file"][here] = lengths[here].cumsum() - lengths[here]
        episodes["first_row"][here] = num_rows + episodes["row_in_file"][here]
        num_rows += len(table)
        parts.append({key: to_numpy(table[key]).astype(np.float32, copy=False) for key in keys})
    return {key: np.concatenate([part[key] for part in parts]) for key in keys}


def read_tasks(root: Path) -> dict[int, str]:
    table = read_table(root / "meta" / "tasks.parquet")
    (text,) = (name for name in table.column_names if name != "task_index")
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def broken_episodes(paths: list[Path], episodes: Columns, fps: float) -> dict[int, str]:
    """What is wrong with each episode whose video is missing, unreadable, or shorter than the episode."""
    headers = list(probe_all(paths).values())
    broken = {}
    for i, (number, start, length) in enumerate(
        zip(episodes["video_file"], episodes["video_start"], episodes["length"], strict=True)
    ):
        header, last = headers[number], start + (length - 1) / fps
        if isinstance(header, ValueError):
            broken[i] = f"episode {episodes['episode_index'][i]}: {header}"
        elif last > header.last + 0.5 / fps:
            broken[i] = (
                f"episode {episodes['episode_index'][i]}: its last frame is at {last:.3f} s, "
                f"but {paths[number]} ends with a frame at {header.last:.3f} s"
            )
    return broken


def read_images(path: Path, camera: str, rows: np.ndarray) -> Tensor:
    """Images that stand as PNG or JPEG in the rows of a parquet file; uint8 (t, c, h, w)."""
    ends, rows = row_group_ends(path), rows.tolist()
    images = []
    for row in rows:
        group = int(np.searchsorted(ends, row, side="right"))
        first = ends[group - 1] if group else 0
        images.append(row_group(path, group, camera)[row - first]["bytes"].as_py())
    return decode_all(images, lambda i: f"{path}, row {rows[i]}")


@lru_cache(maxsize=256)
def row_group_ends(path: Path) -> np.ndarray:
    from pyarrow import parquet

    metadata = parquet.ParquetFile(path).metadata
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


@lru_cache(maxsize=4)
def row_group(path: Path, group: int, camera: str):
    from pyarrow import parquet

    return parquet.ParquetFile(path).read_row_group(group, columns=[camera], use_threads=False)[camera]
