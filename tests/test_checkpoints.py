import errno
import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hlrp import checkpoints
from hlrp.checkpoints import Frozen, contents_hash, link_last, load_config, load_weights, save_pretrained, whole_folder


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path, nn.Linear(3, 2), {"type": "linear"})
    return tmp_path


def test_weights_survive_the_round_trip_to_the_bit(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_pretrained(tmp_path, model, {"type": "linear"})
    load_weights(tmp_path, other)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_missing_unexpected_and_misshapen_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing bias.*unexpected extra.*weight is \(2, 4\), expected \(2, 3\)"):
        load_weights(folder, nn.Linear(3, 2))
    assert set(tensors) == {"weight", "bias"}


def test_a_folder_of_another_kind_is_refused_with_what_would_fit(folder, tmp_path):
    with pytest.raises(ValueError, match="of type 'linear'; expected a checkpoint of type 'laq'"):
        load_config(folder, "laq")
    (tmp_path / "run/checkpoints/last").mkdir(parents=True)
    folder.joinpath("config.json").rename(tmp_path / "run/config.json")
    with pytest.raises(ValueError, match="holds no config.json"):
        load_config(tmp_path / "elsewhere", "laq")


def test_settings_of_another_version_are_named(folder):
    @dataclass
    class Settings:
        width: int

    config = {"type": "linear", "linear": {"width": 3, "depth": 2}, "hlrp_version": "7.0"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown settings depth; it is of hlrp 7.0, this is 0"):
        load_config(folder, "linear", Settings)


def test_a_writer_killed_in_the_middle_leaves_nothing_under_the_final_name(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from hlrp.checkpoints import whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "000010"
    process = subprocess.run([sys.executable, "-c", script, str(target)], env=os.environ)
    assert process.returncode == -9 and not target.exists()
    with whole_folder(target) as partial:
        (partial / "whole").write_text("x")
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert not target.with_name("000010.partial").exists()


def test_a_frozen_module_stays_in_evaluation_mode_and_out_of_the_checkpoint():
    model = nn.Sequential(nn.Linear(2, 2), Frozen(nn.Sequential(nn.Linear(2, 2), nn.Dropout())))
    model.train()
    assert not model[1].module.training and model[0].training
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    assert not model[1](torch.ones(1, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("hashed", [2**26, 2**17])  # all of the files, and blocks of them
def test_a_hash_of_contents_follows_the_bytes_and_not_the_place(hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "HASHED", hashed)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "small").write_bytes(b"some bytes")
        (folder / "large").write_bytes(bytes(2**20))
    files = [[folder / "small", folder / "large"] for folder in folders]
    first = contents_hash(files[0])
    assert contents_hash(files[1]) == first == contents_hash([f"file://{path}" for path in files[0]])
    assert contents_hash(files[0][::-1]) != first
    for place in (0, 2**19, 2**20 - 1):  # head, middle and tail
        data = bytearray(2**20)
        data[place] = 1
        files[1][1].write_bytes(data)
        assert contents_hash(files[1]) != first
    with pytest.raises(ValueError, match="absent"):
        contents_hash([tmp_path / "absent"])


def unsupported(*args, **kwargs):
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_without_links_last_is_a_copy_and_a_plain_folder_gives_way_to_a_link(tmp_path, monkeypatch):
    for step in "123":
        (tmp_path / step).mkdir()
        (tmp_path / step / "model").write_text(step)
    link_last(tmp_path / "1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", unsupported)
        for step in "23":
            link_last(tmp_path / step)
            assert not (tmp_path / "last").is_symlink() and (tmp_path / "last/model").read_text() == step
    link_last(tmp_path / "1")
    assert (tmp_path / "last").is_symlink() and (tmp_path / "last/model").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "last"]


def test_a_folder_that_cannot_be_flushed_is_written_all_the_same_and_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    def failing(number):
        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    with whole_folder(tmp_path / "whole") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "whole/file").is_file()
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), whole_folder(tmp_path / "other") as partial:
        pass
