"""The index beside a TAR of episodes: where each member is, and its checksum. It is a safetensors file.

    header       __metadata__["hlrp"]: facts about the TAR as JSON, and the checksum of each table
    checksum     uint32 (1,): checksum of the header, which has those of the tables, which have those of the members
    lengths, fps      int64 and float64 (episodes,)
    members      uint8 (episodes, kinds * 16): a ROW for each member that is no frame, in the order of facts["kinds"]
    frames       uint8 (frames, 16): a ROW for each frame
    state.*, action.*   float64 (n,): count, mean, std, min, max, q01, q99 over all frames of the TAR
    idle.*       float32 (frames, ...): what `hlrp.idle.episode_scores` gives, with --idle-span

Opening an index reads and checks the header and the first tables; other tables are read when they are needed. A row is
not checked, since a wrong one leads to data that fail their checksum. All checksums are CRC32C.

`faults` checks a whole shard: every checksum, and the TAR against its index.
"""

import hashlib
import json
import os
import struct
import tarfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from hlrp.tars import read_samples

SUFFIX = ".index"
FORMAT = 1
ROW = np.dtype([("start", "<i8"), ("size", "<u4"), ("checksum", "<u4")])
UNPACK_ROWS = struct.Struct("<qII").iter_unpack
ABSENT = (-1, 0, 1)  # an episode without this member
DTYPES = {"U8": "uint8", "U32": "uint32", "I64": "int64", "F32": "float32", "F64": "float64"}
HEAD_SIZE = 2**16  # how much of an index is read at once when it is opened [byte]
GAP = 4 * tarfile.BLOCKSIZE  # members that are less far apart are read together: padding, headers and extended headers
NUM_OPEN = 512  # files that a process keeps open
STATISTICS = ("count", "mean", "std", "min", "max", "q01", "q99")

Row = tuple[int, int, int]  # start, size [byte], checksum


class Table(NamedTuple):
    start: int  # where it begins in the index [byte]
    dtype: str
    shape: tuple[int, ...]


class Index(NamedTuple):
    path: Path
    tar: Path
    facts: dict
    tables: dict[str, Table]
    lengths: np.ndarray
    fps: np.ndarray
    digest: bytes  # hash of the header, and thereby of all data
    versions: tuple[int, int]  # when the index and the TAR were last changed, so that a new file is opened again

    def file(self) -> "File":
        return open_file(str(self.path), self.versions[0])

    def tar_file(self) -> "File":
        return open_file(str(self.tar), self.versions[1])

    def table(self, name: str) -> np.ndarray:
        """Reads and checks a whole table."""
        start, dtype, shape = self.tables[name]
        data = self.file().read(start, prod(shape) * np.dtype(dtype).itemsize)
        if google_crc32c.value(data) != self.facts["checksums"][name]:
            raise ValueError(f"{self.path}: the checksum of its table {name} differs; the file is damaged")
        return np.frombuffer(data, dtype).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> list[Row]:
        """The rows start, ..., stop - 1 of the table "frames", or all rows of these episodes in the table "members"."""
        table = self.tables[name]
        data = self.file().read(table.start + start * table.shape[1], (stop - start) * table.shape[1])
        return list(UNPACK_ROWS(data))

    def read(self, rows: Sequence[Row], what: Callable[[Row], str]) -> dict[Row, bytes]:
        """The data that these rows point to, checked; neighbours are read in one go. what: names a row in errors."""
        data_at, tar, tar_size = {}, self.tar_file(), self.facts["tar_size"]
        for run in runs(sorted(set(rows))):
            start, end = run[0][0], run[-1][0] + run[-1][1]
            if not tarfile.BLOCKSIZE <= start <= end <= tar_size:
                raise ValueError(f"{self.path}: its row of {what(run[-1])} points to no place in {self.tar.name}")
            block = tar.read(start, end - start)
            for row in run:
                at, size, checksum = row
                data_at[row] = data = block[at - start : at - start + size]
                if google_crc32c.value(data) != checksum or not size:
                    for table in ("frames", "members"):  # is the row itself damaged?
                        self.table(table)
                    if size:
                        name = self.name_of(row) or what(row)
                        raise ValueError(f"{self.tar}: {name}: checksum differs; the file is damaged")
        return data_at

    def name_of(self, row: Row) -> str:
        """The name of a member in the TAR; "" if there is no header at this row."""
        try:
            header = self.tar_file().read(row[0] - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (ValueError, tarfile.HeaderError):
            return ""


def runs(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Groups sorted rows whose data are side by side."""
    run, end = [], 0
    for row in rows:
        if run and not 0 <= row[0] - end <= GAP:
            yield run
            run = []
        run.append(row)
        end = row[0] + row[1]
    if run:
        yield run


class File:
    """An open file without a position, so that forked processes and threads may share it."""

    def __init__(self, path: str):
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, start: int, size: int) -> bytes:
        try:
            data = os.pread(self.descriptor, size, start)
            while len(data) < size:  # a network drive may give less at once
                more = os.pread(self.descriptor, size - len(data), start + len(data))
                if not more:
                    raise ValueError(f"{self.path}: it has no byte {start + len(data)}; is it cut off?")
                data += more
        except OSError as error:
            raise ValueError(f"{self.path}: not readable at byte {start}: {error.strerror}") from error
        return data


@lru_cache(maxsize=NUM_OPEN)
def open_file(path: str, version: int) -> File:
    return File(path)


def read_index(path: Path) -> Index:
    """Raises ValueError, naming the file, if the index is damaged or the TAR beside it has another size."""
    file, tar = File(str(path)), path.with_suffix(".tar")
    stat = os.fstat(file.descriptor)
    size = stat.st_size
    head = file.read(0, min(size, HEAD_SIZE))
    data_start = 8 + int.from_bytes(head[:8], "little")  # as safetensors has it
    if len(head) < 8 or data_start + 4 > size:
        raise ValueError(f"{path}: {size} bytes are no index; delete it, and python -m hlrp.shards makes it again")
    if len(head) < data_start + 4:
        head = file.read(0, data_start + 4)
    checksum = int.from_bytes(head[data_start : data_start + 4], "little")
    if google_crc32c.value(head[:data_start]) != checksum:
        raise ValueError(f"{path}: the checksum of its header differs; it is damaged, or no index of hlrp.shards")

    header = json.loads(head[8:data_start])
    facts = json.loads(header.pop("__metadata__")["hlrp"])
    if facts["format"] != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, as python -m hlrp.shards writes it, got {facts['format']}")
    end = data_start + max(entry["data_offsets"][1] for entry in header.values())
    if size != end:
        raise ValueError(f"{path}: expected {end} bytes, got {size}; is it cut off?")
    tables = {
        name: Table(data_start + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
    }
    parts = {}
    for name in ("lengths", "fps"):
        start, dtype, (num_episodes,) = tables[name]
        stop = start + 8 * num_episodes
        data = head[start:stop] if stop <= len(head) else file.read(start, stop - start)
        if google_crc32c.value(data) != facts["checksums"][name]:
            raise ValueError(f"{path}: the checksum of its table {name} differs; the file is damaged")
        parts[name] = np.frombuffer(data, dtype)

    try:
        tar_stat = os.stat(tar)
    except OSError as error:
        raise ValueError(f"{tar}: {error.strerror}, but its index is there") from error
    if tar_stat.st_size != facts["tar_size"]:
        raise ValueError(
            f"{tar}: expected {facts['tar_size']} bytes by its index, got {tar_stat.st_size}; is it cut off?"
        )
    versions = stat.st_mtime_ns, tar_stat.st_mtime_ns
    digest = hashlib.sha256(head[:data_start]).digest()
    return Index(path, tar, facts, tables, parts["lengths"], parts["fps"], digest, versions)


def index_tar(
    tar: Path,
    fps: float | None = None,
    ignore: Sequence[str] = (),
    facts: dict | None = None,
    scores: dict[str, np.ndarray] | None = None,
) -> bytes:
    """Makes the index of a TAR of episodes (see `hlrp.tars`), whoever wrote the TAR.

    fps: frame rate of episodes that have none in their JSON, and no time stamps. facts, scores: more to record.
    Raises ValueError, naming the member, if the TAR or an episode is broken, or episodes differ in their arrays.
    """
    lengths, rates, frames, members, kinds = [], [], [], [], []
    columns: dict[str, list[np.ndarray]] = {}
    first, same = None, {}
    with open(tar, "rb") as file:
        for sample in read_samples(file, str(tar), ignore):
            if sample.video is not None:
                raise ValueError(
                    f"{tar}: {sample.key} is a video, which is streamed; to read it at random, write its frames into "
                    f"shards: python -m hlrp.shards --data 'shards:{tar.parent}' --output-dir DIR"
                )
            images = sample.frames()
            shapes = {name: list(column.shape[1:]) for name, column in sorted(sample.columns.items())}
            first = first or (sample.key, shapes)
            if shapes != first[1]:
                raise ValueError(f"{tar}: {sample.key}: expected arrays {first[1]} as in {first[0]}, got {shapes}")
            lengths.append(len(images))
            rates.append(sample.fps(fps))
            frames += [row_of(member) for member in images]
            image_names = {member.name for member in images}
            others = {suffix: m for suffix, m in sample.members.items() if m.name not in image_names}
            kinds += [suffix for suffix in others if suffix not in kinds]
            members.append({suffix: row_of(member) for suffix, member in others.items()})
            for name in ("state", "action"):
                if name in sample.columns:
                    columns.setdefault(name, []).append(sample.columns[name])
            for name in ("dataset", "camera", "latent_space"):
                same.setdefault(name, []).append(sample.header.get(name))

    tables = {"lengths": np.array(lengths, dtype=np.int64), "fps": np.array(rates, dtype=np.float64)}
    rows = [[member.get(kind, ABSENT) for kind in kinds] for member in members]
    tables["members"] = np.array(rows, dtype=ROW).view(np.uint8).reshape(len(lengths), -1)
    tables["frames"] = np.array(frames, dtype=ROW).view(np.uint8).reshape(-1, ROW.itemsize)
    for name, parts in columns.items():
        for key, value in zip(STATISTICS, statistics(np.concatenate(parts)), strict=True):
            tables[f"{name}.{key}"] = value
    tables |= {f"idle.{name}": score for name, score in (scores or {}).items()}
    size, checksum = file_checksum(tar)
    if any(space != same["latent_space"][0] for space in same["latent_space"]):
        raise ValueError(f"{tar}: expected latent actions of one LAQ in all episodes, got those of several")
    everywhere = {name: values[0] for name, values in same.items() if all(v == values[0] for v in values)}
    known = {"format": FORMAT, "tar_size": size, "tar_checksum": checksum}
    assert first is not None  # a TAR without an episode is an error
    known |= {"kinds": kinds, "columns": first[1]} | everywhere
    return to_safetensors(tables, known | (facts or {}))


def row_of(member) -> Row:
    return member.start, len(member.data), google_crc32c.value(member.data)


def statistics(values: np.ndarray) -> list[np.ndarray]:
    """values (frames, n) -> each of `STATISTICS`, float64 (n,)."""
    values = values.astype(np.float64)
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    count = np.full(values.shape[1], float(len(values)))
    return [count, values.mean(axis=0), values.std(axis=0), values.min(axis=0), values.max(axis=0), q01, q99]


def merge_statistics(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The statistics of several shards together: exact, but for the quantiles, which are the mean of the shards'."""
    each = {name: np.stack([part[name] for part in parts]) for name in STATISTICS}  # shards n
    weight = each["count"] / each["count"].sum(axis=0)
    merged = {name: (weight * each[name]).sum(axis=0) for name in ("mean", "q01", "q99")}
    variance = (weight * (each["std"] ** 2 + (each["mean"] - merged["mean"]) ** 2)).sum(axis=0)
    merged |= {"count": each["count"].sum(axis=0), "std": np.sqrt(variance)}
    return merged | {"min": each["min"].min(axis=0), "max": each["max"].max(axis=0)}


def file_checksum(path: Path) -> tuple[int, int]:
    """The size of a file, and the CRC32C of all its bytes."""
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while data := file.read(2**20):
            size, checksum = size + len(data), google_crc32c.extend(checksum, data)
    return size, checksum


def to_safetensors(tables: dict[str, np.ndarray], facts: dict) -> bytes:
    """The bytes of a safetensors file whose first tensor is the checksum of the header."""
    tables = {name: np.ascontiguousarray(table) for name, table in tables.items()}
    facts = facts | {"checksums": {name: google_crc32c.value(t.tobytes()) for name, t in tables.items()}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"hlrp": json.dumps(facts)}}
    end = 0
    for name, table in ({"checksum": np.zeros(1, np.uint32)} | tables).items():
        offsets = [end, end := end + table.nbytes]
        header[name] = {"dtype": names[str(table.dtype)], "shape": list(table.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    checksum = google_crc32c.value(head).to_bytes(4, "little")
    return head + checksum + b"".join(table.tobytes() for table in tables.values())


def faults(tar: Path) -> Iterator[str]:
    """One line for each fault of a shard, with file and member."""
    try:
        index = read_index(tar.with_suffix(SUFFIX))
    except ValueError as error:
        yield str(error)
        return
    for name in index.facts["checksums"]:
        try:
            index.table(name)
        except ValueError as error:
            yield str(error)
    if file_checksum(tar)[1] != index.facts["tar_checksum"]:
        yield f"{tar}: checksum of the whole file differs"

    frames = index.rows("frames", 0, int(index.lengths.sum()))
    members = [row for row in index.rows("members", 0, len(index.lengths)) if row != ABSENT]
    for number, row in enumerate(members + frames):
        try:
            index.read([row], lambda _, number=number: f"member {number}")
        except ValueError as error:
            yield str(error)

    expected = {start: size for start, size, _ in members + frames}
    try:
        with open(tar, "rb") as file:
            for sample in read_samples(file, str(tar), index.facts.get("ignore", ())):
                for member in sample.members.values():
                    if expected.pop(member.start, None) != len(member.data):
                        yield f"{tar}: {member.name}: not where the index has it"
    except ValueError as error:
        yield str(error)
        return
    for start in sorted(expected):
        yield f"{tar}: no member at byte {start}, where the index has one"
