"""Latent actions of any model in a file, and the pairs of frames that they are of.

`.npz` arrays or parquet columns, one row a pair:
    episode            int: its number in the source
    time or index      of the first frame in it: [s], or int
    vector             float (e,): the latent action, and / or
    codes              int (m,): its discrete tokens
    delta              [s], from the first frame to the second: one number
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from hlrp.clips import Clips
from hlrp.splits import is_stream

COLUMNS = ("episode", "time", "index", "vector", "codes", "delta")


class LatentFile(NamedTuple):
    """Rows of a file, in its order."""

    path: Path
    delta: float  # [s]
    episode: np.ndarray  # int64 (b,)
    time: np.ndarray | None  # float64 (b,) [s], or
    index: np.ndarray | None  # int64 (b,)
    vectors: Tensor  # float32 (b, n, d); of codes alone, empty: (b, 0, 0)
    indices: Tensor | None  # int64 (b, m)

    @property
    def codebook_size(self) -> int | None:
        return None if self.indices is None else int(self.indices.max()) + 1

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]


def read_latents(path: Path, delta: float | None = None) -> LatentFile:
    """Reads a file. delta: where it has none. Raises ValueError for what is missing or does not fit."""
    columns = read_columns(path)
    if "episode" not in columns or not columns.keys() & {"time", "index"}:
        raise ValueError(f"{path} has {', '.join(columns) or 'nothing'}; episode, and time or index, are needed")
    if not columns.keys() & {"vector", "codes"}:
        raise ValueError(f"{path} has {', '.join(columns)}; vector or codes, or both, are needed")
    length = len(columns["episode"])
    for name, column in columns.items():
        if name != "delta" and len(column) != length:
            raise ValueError(f"{path}: {name} has {len(column)} rows, episode {length}; one row a pair fits")
    if "delta" in columns:
        found = np.unique(columns["delta"])
        if len(found) != 1 or (delta is not None and not np.isclose(found[0], delta)):
            raise ValueError(f"{path}: delta is {found[:4].tolist()} s, --delta {delta}; one number fits")
        delta = float(found[0])
    if delta is None:
        raise ValueError(f"{path} has no delta: say by --delta how many seconds lie between the two frames")
    if not length:
        raise ValueError(f"{path} has no rows; some thousand pairs fit")

    vectors, indices = torch.zeros(length, 0, 0), None
    if "vector" in columns:
        vectors = torch.from_numpy(columns["vector"].reshape(length, 1, -1).astype(np.float32))
        if not vectors.isfinite().all():
            row = int((~vectors.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"{path}: vector of row {row} is not finite")
    if "codes" in columns:
        indices = torch.from_numpy(integers(path, "codes", columns["codes"]).reshape(length, -1))
        if indices.min() < 0:
            raise ValueError(f"{path}: a code is {indices.min()}; numbers from 0 on fit")
    index = integers(path, "index", columns["index"]) if "index" in columns else None
    time = columns["time"].astype(np.float64) if index is None else None
    return LatentFile(path, delta, integers(path, "episode", columns["episode"]), time, index, vectors, indices)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a checkpoint's pretrained_model folder, .npz or .parquet fits")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: np.atleast_1d(arrays[name]) for name in COLUMNS if name in arrays}
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: {path.suffix or 'no suffix'}; .npz or .parquet fits")
    import pyarrow.parquet as pq

    known = [name for name in COLUMNS if name in pq.read_schema(path).names]
    table = pq.read_table(path, columns=known)
    columns = {}
    for name in known:
        values = table[name].to_pylist()
        sizes = {np.shape(value) for value in values}
        if len(sizes) > 1:
            raise ValueError(f"{path}: rows of {name} have the sizes {sorted(sizes)}; one size fits")
        columns[name] = np.array(values)
    return columns


def integers(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """Raises ValueError where the values are no whole numbers."""
    rounded = np.rint(values).astype(np.int64)
    if (rounded != values).any():
        raise ValueError(f"{path}: {name} has {values[rounded != values].flat[0]}; whole numbers fit")
    return rounded


def pairs_of(file: LatentFile, source, image_size: int) -> Subset:
    """The pairs of frames that the rows are of, in their order.

    Raises ValueError for a row that no pair of the source fits.
    """
    if is_stream(source):
        raise ValueError(f"{source.uri} is a stream, whose episodes have no numbers; an indexed source fits")
    clips = Clips(source, np.arange(len(source.lengths)), (0.0, file.delta), image_size)
    outside = (file.episode < 0) | (file.episode >= len(source.lengths))
    if outside.any():
        row = outside.nonzero()[0][0]
        raise ValueError(
            f"{file.path}, row {row}: episode {file.episode[row]}; {source.uri} has 0 to {len(source.lengths) - 1}"
        )
    fps = source.fps[file.episode]
    index = file.index if file.time is None else np.rint(file.time * fps).astype(np.int64)
    if file.time is not None and (aside := np.abs(file.time * fps - index) > 0.25).any():
        row = aside.nonzero()[0][0]
        raise ValueError(f"{file.path}, row {row}: no frame at {file.time[row]} s of {fps[row]:g} fps; k / fps fits")
    last = (clips.ends - clips.firsts)[file.episode] - 1
    if (beyond := (index < 0) | (index > last)).any():
        row = beyond.nonzero()[0][0]
        raise ValueError(
            f"{file.path}, row {row}: frame {index[row]} of episode {file.episode[row]}; pairs {file.delta:g} s "
            f"apart start at 0 to {last[row]}"
        )
    return Subset(clips, (clips.firsts[file.episode] + index).tolist())
