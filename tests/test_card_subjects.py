import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hlrp.card_subjects import pairs_of, read_latents
from hlrp.world import World

WORLD = World("clean", episodes=6)
ROWS = {"episode": np.array([0, 3, 3]), "time": np.array([0.1, 0.0, 0.5]), "vector": np.ones((3, 4))}


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_rows_of_npz_and_of_parquet_are_the_pairs_of_the_source_in_their_order(tmp_path):
    codes = np.array([[1, 2], [0, 7], [3, 3]])
    table = pa.table({"episode": [0, 3, 3], "index": [1, 0, 5], "vector": [[1.0] * 4] * 3, "codes": codes.tolist()})
    pq.write_table(table, tmp_path / "a.parquet")
    for file in (
        read_latents(save(tmp_path / "a.npz", **ROWS, codes=codes, delta=0.2)),
        read_latents(tmp_path / "a.parquet", delta=0.2),
    ):
        assert file.delta == 0.2 and file.codebook_size == 8
        assert torch.equal(file.indices, torch.from_numpy(codes))
        assert file.vectors.shape == (3, 1, 4)
        samples = [pairs_of(file, WORLD, 64)[i] for i in range(3)]
        assert [(s["episode"], s["index"]) for s in samples] == [(0, 1), (3, 0), (3, 5)]
        assert torch.equal(samples[2]["frames"], WORLD.read(3, [5, 7])["frames"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": None}, "vector or codes, or both, are needed"),
        ({"episode": None}, "episode, and time or index, are needed"),
        ({"vector": np.ones((2, 4))}, "vector has 2 rows, episode 3"),
        ({"vector": np.full((3, 4), np.nan)}, "vector of row 0 is not finite"),
        ({"codes": np.array([[1], [2], [-1]])}, "a code is -1"),
        ({"codes": np.array([[1.5], [2], [1]])}, "codes has 1.5; expected whole numbers"),
        ({"delta": None}, "has no delta: say by --delta"),
    ],
)
def test_a_file_that_says_too_little_or_nonsense_is_named(change, message, tmp_path):
    arrays = {name: x for name, x in (ROWS | {"delta": 0.2} | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        read_latents(save(tmp_path / "a.npz", **arrays))


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="no such file; expected a checkpoint's pretrained_model folder, .npz or .parquet"
    ):
        read_latents(tmp_path / "a.npz")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=".csv; expected .npz or .parquet"):
        read_latents(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="delta is .* --delta 0.5"):
        read_latents(save(tmp_path / "a.npz", **ROWS, delta=0.2), delta=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episode": np.array([0, 3, 6])}, "row 2: episode 6; world:clean.* has 0 to 5"),
        ({"time": np.array([0.1, 0.05, 0.5])}, "row 1: no frame at 0.05 s of 10 fps"),
        ({"time": np.array([0.1, 0.0, 9.0])}, "row 2: frame 90 of episode 3; pairs 0.2 s apart start at 0 to"),
    ],
)
def test_a_row_that_no_pair_fits_is_named(change, message, tmp_path):
    file = read_latents(save(tmp_path / "a.npz", **ROWS | change, delta=0.2))
    with pytest.raises(ValueError, match=message):
        pairs_of(file, WORLD, 64)
