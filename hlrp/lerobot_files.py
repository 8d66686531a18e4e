"""Reads the files of a LeRobot dataset, format v3: info.json, tasks, episodes, rows, and images in rows.

All functions raise ValueError, naming file, column and row, for data that cannot be used.
"""

import importlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hlrp.images import decode_all
from hlrp.video_index import unreadable

POINT = "annotation.point"  # column of the `point` of `hlrp.contract`, nan if it is not known
Columns = dict[str, np.ndarray]


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises ValueError that names the file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise unreadable(path, "JSON file", error) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def read_info(root: Path, name: str) -> dict:
    """Reads meta/info.json in `root`, of the dataset `name`. Raises ValueError for another version of the format.
    LeRobot's converter puts a dataset of the Hub where hlrp looks first, and mends a folder in its place."""
    path = root / "meta" / "info.json"
    info = read_json(path)
    version = info.get("codebase_version")
    if not str(version).startswith("v3."):
        where = f"--repo-id={name}" if "snapshots" in root.parts else f"--repo-id=local/{root.name} --root={root}"
        raise ValueError(
            f"{path}: expected version v3 of the LeRobot format, got version {version} of it. To convert v2.1: "
            f"python -m lerobot.scripts.convert_dataset_v21_to_v30 {where} --push-to-hub=false"
        )
    features = info.get("features")
    if not isinstance(features, dict) or not all(isinstance(f, dict) and "dtype" in f for f in features.values()):
        raise ValueError(f"{path}: expected features, an object with the dtype of each, got {str(features)[:200]}")
    fps, is_video = info.get("fps"), any(feature["dtype"] == "video" for feature in features.values())
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < float("inf"):
        raise ValueError(f"{path}: expected fps, a number above 0, got {fps!r}")
    for key in ("data_path", "video_path")[: 1 + is_video]:
        if not isinstance(info.get(key), str):
            raise ValueError(f"{path}: expected {key}, a template of paths, got {info.get(key)!r}")
    return info


def read_table(path: Path, columns: Sequence[str] | None = None):
    """Reads a parquet file, or some columns of it, as a pyarrow table. Raises ValueError for a missing column."""
    import pyarrow
    from pyarrow import parquet

    check_columns(path, columns or ())
    try:
        return parquet.read_table(path, columns=columns, use_threads=False)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise unreadable(path, "parquet file", error) from error


def check_columns(path: Path, columns: Sequence[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise unreadable(path, "parquet file", error) from error
    if missing := [column for column in columns if column not in names]:
        raise ValueError(f"{path}: expected columns {', '.join(missing)}, got {', '.join(names)}")


def to_numpy(column) -> tuple[np.ndarray, dict[int, str]]:
    """A pyarrow column of numbers, or of lists of numbers, as an array (rows, numbers); and the faults, row -> message.
    A row at fault is null or has another size than most rows; in the array it is nan."""
    from pyarrow import types

    compute: Any = importlib.import_module("pyarrow.compute")  # whose functions are made when it is imported
    array = column.combine_chunks()
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        sizes = compute.min_max(compute.list_value_length(array)).as_py()
        if array.null_count or sizes["min"] != sizes["max"]:
            return mended(column.to_pylist())
        array = array.flatten()
    is_number = types.is_integer(array.type) or types.is_floating(array.type) or types.is_boolean(array.type)
    if array.null_count or not is_number:
        return mended(column.to_pylist())
    return array.to_numpy(zero_copy_only=False).reshape(len(column), len(array) // max(len(column), 1)), {}


def mended(rows: list) -> tuple[np.ndarray, dict[int, str]]:
    """As `to_numpy`, but row by row, for a column with faults."""
    values, faults = {}, {}
    for number, row in enumerate(rows):
        if row is None:
            faults[number] = "expected numbers, got null"
            continue
        try:
            values[number] = np.asarray(row, dtype=np.float64).ravel()
        except (ValueError, TypeError):
            faults[number] = f"expected numbers, got {str(row)[:60]}"
    size = int(np.bincount([value.size for value in values.values()] or [1]).argmax())
    array = np.full((len(rows), size), np.nan)
    for number, value in values.items():
        if value.size == size:
            array[number] = value
        else:
            faults[number] = f"expected {size} numbers, got {value.size}"
    return array, faults


def read_episodes(root: Path, video: str | None) -> Columns:
    """The columns of meta/episodes, one number for each episode, sorted by episode. video: the folder of a camera."""
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    if video is not None:
        names += [f"{video}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    parts = []
    for path in sorted((root / "meta" / "episodes").rglob("*.parquet")):
        table, part = read_table(path, names), {}
        for name in names:
            part[name], faults = to_numpy(table[name])
            for row, fault in faults.items():
                raise ValueError(f"{path}: {name}, row {row}: {fault}")
        parts.append(part)
    columns = {name: np.concatenate([part[name][:, 0] for part in parts]) for name in names} if parts else {}
    if not columns or not len(columns["length"]):
        raise ValueError(f"{root}: no episodes in meta/episodes")
    order = columns["episode_index"].argsort()
    return {name: column[order] for name, column in columns.items()}


def episode_files(
    root: Path, template: str, episodes: Columns, prefix: str, camera: str = ""
) -> tuple[list[Path], np.ndarray]:
    """The files of the episodes, and for each episode the number of its file in that list."""
    places = np.stack([episodes[f"{prefix}/chunk_index"], episodes[f"{prefix}/file_index"]], axis=1)
    unique, number = np.unique(places, axis=0, return_inverse=True)
    try:
        paths = [template.format(chunk_index=i, file_index=j, video_key=camera) for i, j in unique.tolist()]
    except (KeyError, IndexError, ValueError) as error:
        fields = "chunk_index, file_index and video_key"
        raise ValueError(f"{root}/meta/info.json: expected a path of {fields}, got {template!r}") from error
    return [root / path for path in paths], number.ravel()


def read_numbers(
    paths: list[Path], episodes: Columns, keys: Sequence[str], tasks: dict[int, str] | None
) -> tuple[Columns, np.ndarray, dict[int, str]]:
    """Reads columns of all data files, one file after another. Returns the columns, with the rows of each episode in
    the order of their frame_index; for each row its place in the files; and the faults, episode -> message.

    Adds two columns to `episodes`: its first row in these columns (`first_row`) and in its own file (`row_in_file`)."""
    lengths, episode_index = episodes["length"], episodes["episode_index"]
    episodes["first_row"], episodes["row_in_file"] = np.zeros_like(lengths), np.zeros_like(lengths)
    names = ["timestamp", "frame_index", *([] if tasks is None else ["task_index"]), *keys]
    parts, places, broken, num_rows = [], [], {}, 0
    for number, path in enumerate(paths):
        table, part, faults = read_table(path, ["episode_index", *names]), {}, {}
        here = np.flatnonzero(episodes["data_file"] == number)
        episode_of = np.repeat(here, lengths[here])
        if not np.array_equal(to_numpy(table["episode_index"])[0][:, 0], episode_index[episode_of]):
            raise ValueError(f"{path}: expected the rows of the episodes that meta/episodes has in it, got others")
        for name in names:
            column, wrong = to_numpy(table[name])
            if name in keys:
                with np.errstate(over="ignore"):
                    column = column.astype(np.float32, copy=False)
            if parts and name in keys and column.shape[1] != parts[0][name].shape[1]:
                sizes = f"expected {parts[0][name].shape[1]} numbers as in {paths[0]}, got {column.shape[1]}"
                raise ValueError(f"{path}: {name}: {sizes}")
            is_sound = ~np.isinf(column) if name == POINT else np.isfinite(column)
            for row in np.flatnonzero(~is_sound.all(axis=1)).tolist():
                wrong.setdefault(row, f"expected finite numbers, got {column[row].tolist()}")
            if name == "task_index":
                for row in np.flatnonzero(~np.isin(column[:, 0], list(tasks or ()))).tolist():
                    wrong.setdefault(row, f"expected one of meta/tasks, got {column[row, 0]}")
                column = np.nan_to_num(column).astype(np.int64, copy=False)
            part[name] = column if name in keys else column[:, 0]
            faults |= {row: f"{name}, row {row}: {fault}" for row, fault in wrong.items()}
        order = np.lexsort((part["frame_index"], episode_of))
        part = {name: column[order] for name, column in part.items()}
        is_next = np.diff(episode_of) == 0
        for name in ("frame_index", "timestamp"):
            column = part[name]
            for i in np.flatnonzero(is_next & (np.diff(column) <= 0)).tolist():
                fault = f"expected more than the {column[i]} of the frame before, got {column[i + 1]}"
                faults.setdefault(int(order[i + 1]), f"{name}, row {order[i + 1]}: {fault}")
        for row in sorted(faults):
            episode = int(episode_of[row])
            broken.setdefault(episode, f"episode {episode_index[episode]}: {path}: {faults[row]}")
        episodes["row_in_file"][here] = lengths[here].cumsum() - lengths[here]
        episodes["first_row"][here] = num_rows + episodes["row_in_file"][here]
        places.append(num_rows + order)
        num_rows += len(table)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in names}, np.concatenate(places), broken


def read_tasks(root: Path) -> dict[int, str]:
    """task_index -> instruction, from meta/tasks.parquet, or from meta/tasks.jsonl as version 2 has it."""
    from pyarrow import types

    path, lines = root / "meta" / "tasks.parquet", root / "meta" / "tasks.jsonl"
    if lines.is_file() and not path.is_file():
        try:
            rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
            return {int(row["task_index"]): str(row["task"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise unreadable(lines, "file of a task_index and a task in each line", error) from error
    table = read_table(path)
    kinds = {f.name: f.type.value_type if types.is_dictionary(f.type) else f.type for f in table.schema}
    texts = [name for name, kind in kinds.items() if types.is_string(kind) or types.is_large_string(kind)]
    indices = (table.schema.pandas_metadata or {}).get("index_columns", [])  # where LeRobot has it; else a range
    named = [name for name in ("task", *indices, "__index_level_0__") if name in texts]
    named = named or texts if len(texts) == 1 else named
    if "task_index" not in kinds or not named:
        raise ValueError(f"{path}: expected columns task_index and task, got {', '.join(kinds)}")
    texts = [text or "" for text in table[named[0]].to_pylist()]
    return dict(zip(table["task_index"].to_pylist(), texts, strict=True))


def read_texts(paths: list[Path], key: str, tasks: dict[int, str] | None) -> tuple[np.ndarray, dict[int, str]]:
    """Reads the instructions from a column of all data files that has a text, or a number of `tasks`, in each row.
    Returns the number of the instruction of each row, int64 (rows,), and number -> instruction."""
    numbers, known = [], {}
    for path in paths:
        rows: list[Any] = read_table(path, [key])[key].to_pylist()
        rows = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
        for row, value in enumerate(rows):
            if not isinstance(value, str) and (type(value) is not int or value not in (tasks or {})):
                raise ValueError(f"{path}: {key}, row {row}: expected a text or a number of meta/tasks, got {value}")
        texts = [value if isinstance(value, str) else (tasks or {})[value] for value in rows]
        numbers += [known.setdefault(text, len(known)) for text in texts]
    return np.array(numbers, dtype=np.int64), {number: text for text, number in known.items()}


def check_images(path: Path, camera: str, root: Path) -> tuple[list[Path], dict[int, str]]:
    """The image files that a parquet file names without holding their bytes; and row -> fault, where there is no image.

    Looks at the rows where the statistics of the file count cells without bytes."""
    from pyarrow import parquet

    file, named, faults, end = parquet.ParquetFile(path), [], {}, 0
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        first, end = end, end + facts.num_rows
        columns = [facts.column(i) for i in range(facts.num_columns)]
        held = [column.statistics for column in columns if column.path_in_schema == f"{camera}.bytes"]
        if not any(statistics is not None and statistics.null_count for statistics in held):
            continue
        for row, image in enumerate(file.read_row_group(group, [camera])[camera].to_pylist(), start=first):
            if image is None or not (image.get("bytes") or image.get("path")):
                faults[row] = f"{camera}, row {row}: expected an image, got none"
            elif not image["bytes"]:
                named.append(root / image["path"])
                if not named[-1].is_file():
                    faults[row] = f"{camera}, row {row}: expected the image {named.pop()}, and it is not there"
    return named, faults


def read_images(path: Path, camera: str, rows: np.ndarray, root: Path) -> Tensor:
    """Decodes images that rows of a parquet file hold as PNG or JPEG, or name by paths from `root` on: uint8
    (t, c, h, w)."""
    ends, rows = row_group_ends(path), rows.tolist()
    images = []
    for row in rows:
        group = int(np.searchsorted(ends, row, side="right"))
        first = ends[group - 1] if group else 0
        image = row_group(path, group, camera)[row - first].as_py()
        if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
            raise ValueError(f"{path}: {camera}, row {row}: expected an image, got {str(image)[:80]}")
        images.append(image.get("bytes") or (root / image["path"]).read_bytes())
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
