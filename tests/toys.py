"""What several test files use: small data that can be told apart, and small models.

The frames of the videos show their own numbers as bar codes.
"""

import json
import os
import traceback
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import av
import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import hlrp
from hlrp.contract import Source
from hlrp.training import Run

if TYPE_CHECKING:
    from hlrp.policy import HLRPConfig, HLRPPolicy

# of the dataset that write_lerobot writes
LENGTHS, FPS = (12, 30, 9), 10
TOP, WRIST = "observation.images.top", "observation.images.wrist"

# width and height of the videos that write_video writes
SIZE = (64, 48)

# of the policy that make_policy makes
TASKS = ["push the red block", "open the door"]
META = SimpleNamespace(tasks=SimpleNamespace(index=TASKS), stats=None)
STATE, CHUNK = 3, 4

# of a small run of train_laq.py
WORLD = "world:default?episodes=12"
FLAGS = f"""--data {WORLD} --val-samples 16 --batch-size 4 --warmup-steps 2 --num-workers 0 --log-freq 2
    --eval-freq 1000 --image-size 32 --patch-size 8 --codebook-size 8 --quantizer fsq""".split()


class Counting(Source):
    """Episodes whose frames show their own (episode, index) in the first two channels."""

    def __init__(self, lengths, fps=10.0, name="counting", action_dim=0, state_dim=0):
        self.uri, self.name, self.camera, self.fingerprint = f"test:{name}", name, "", name
        self.lengths = np.array(lengths)
        self.fps = np.full(len(lengths), fps) if np.isscalar(fps) else np.array(fps)
        self.action_dim, self.state_dim, self.reads = action_dim, state_dim, 0

    def read(self, episode, indices):
        assert min(indices) >= 0 and max(indices) < self.lengths[episode]
        self.reads += 1
        frames = torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8)
        frames[:, 0], frames[:, 1] = episode, torch.as_tensor(indices)[:, None, None]
        read = {"frames": frames, "embodiment": episode % 2}
        read["truth"] = torch.as_tensor(indices)[:, None].float()
        if self.state_dim:
            read["state"] = torch.as_tensor(indices).float()[:, None].expand(-1, self.state_dim)
        return read

    def instructions(self, episode, indices):
        return [f"episode {episode}"] * len(indices)

    def actions(self, episode, indices):
        assert min(indices) >= 0 and max(indices) < self.lengths[episode]
        return torch.as_tensor(indices).float()[:, None].repeat(1, self.action_dim)


def picture(number: int, height: int = SIZE[1]) -> np.ndarray:
    """A frame (height, 64, 3) that shows a number below 256 as a bar code."""
    image = np.zeros((height, 64, 3), dtype=np.uint8)
    for bit in range(8):
        image[:, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    return image


def numbers(frames: torch.Tensor) -> list[int]:
    """The numbers that frames (t, c, h, w) show."""
    bars = frames[:, 0, frames.shape[2] // 2, 4::8] > 127
    return (bars.long() << torch.arange(8)).sum(1).tolist()


def write_lerobot(folder, codec="h264", g=2, numbers=True, **settings):
    """Three episodes of two tasks; the frames count through as bar codes, inverted in the wrist view."""
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    image = {"dtype": "image" if codec is None else "video", "shape": (64, 64, 3)}
    features = {key: image | {"names": ["height", "width", "channels"]} for key in (TOP, WRIST)}
    if numbers:
        features["observation.state"] = {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]}
        features["action"] = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
        features["annotation.point"] = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    if codec is not None:
        settings["rgb_encoder"] = RGBEncoderConfig(vcodec=codec, g=g, crf=20)
        settings |= {"streaming_encoding": True, "encoder_queue_maxsize": 100, "encoder_threads": 1}
    dataset = LeRobotDataset.create("toy/toy", FPS, features, root=folder, use_videos=codec is not None, **settings)
    total = 0
    for episode, length in enumerate(LENGTHS):
        for i in range(length):
            frame = {TOP: picture(total, 64), WRIST: 255 - picture(total, 64), "task": f"task {episode % 2}"}
            if numbers:
                frame["observation.state"] = np.array([episode, i, total], dtype=np.float32)
                frame["action"] = np.array([total, -i], dtype=np.float32)
                frame["annotation.point"] = np.array([i / 40, -i / 40], dtype=np.float32)
            dataset.add_frame(frame)
            total += 1
        dataset.save_episode()
    dataset.finalize()
    return folder


def rename(folder, names):
    """Gives columns of a LeRobot dataset other names."""
    info = json.loads((folder / "meta/info.json").read_text())
    features = {names.get(key, key): feature for key, feature in info["features"].items()}
    (folder / "meta/info.json").write_text(json.dumps(info | {"features": features}))
    for path in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)


def write_video(
    path, codec="libx264", fps=30, options=None, num_frames=50, times=None, cut=0, lost=0, size=SIZE, container=None
):
    """times: when each frame is shown [s], at a variable rate; cut: how many frames an edit list hides; lost: how many
    of the first packets are."""
    time_base = Fraction(1, 1000) if times is not None else 1 / Fraction(fps)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        if codec == "gif":
            stream.pix_fmt = "rgb8"
        stream.codec_context.time_base = time_base
        packets = []
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, size[1])[:, : size[0]], "rgb24")
            frame.pts, frame.time_base = number if times is None else round(times[number] * 1000), time_base
            packets += shifted(stream.encode(frame), cut, fps)
        for packet in (packets + shifted(stream.encode(), cut, fps))[lost:]:
            out.mux(packet)
    return path


def shifted(packets, cut, fps):
    for packet in packets:
        offset = round(cut / Fraction(fps) / packet.time_base)
        packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
    return packets


def make_config(cameras=(TOP,), state=STATE, **settings) -> "HLRPConfig":
    from lerobot.configs import FeatureType, PolicyFeature

    from hlrp.policy import HLRPConfig

    settings = {"chunk_size": CHUNK, "n_action_steps": 2, "expert_dim": 32, "expert_depth": 1} | settings
    config = HLRPConfig(device="cpu", push_to_hub=False, image_size=32, **settings)
    config.input_features = {key: PolicyFeature(FeatureType.VISUAL, (3, 40, 40)) for key in cameras}
    if state:
        config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (state,))
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    return config


def make_policy(**settings) -> "HLRPPolicy":
    from hlrp.policy import HLRPPolicy

    torch.manual_seed(0)
    return HLRPPolicy(make_config(**settings), dataset_meta=META)


def weights(output_dir) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "checkpoints/last/pretrained_model/model.safetensors")


def assert_equal_to_the_bit(output_dir, other_dir):
    found, expected = weights(output_dir), weights(other_dir)
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def one_cpu(number: int) -> list[str]:
    """Runs what stands behind it on one CPU: threads that wait for each other are slow where CPUs are shared."""
    cpus = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cpus[number % len(cpus)])]


def rank_of(run: Path, rank: int) -> int:
    """The process that trains there as this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        is_script = b"-u" in words and str(run).encode() in words
        if is_script and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no rank {rank} of {run}")


class Waits(TorchDispatchMode):
    """Lists the lines of hlrp at which a host would wait for a device: for a number that it reads, or for a shape that
    depends on values. What transformers waits for inside a vision-language model is left out."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"):
            *_, place = (f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename)
            if Path(place.filename).parent == Path(hlrp.__file__).parent:
                self.found.append(f"{name} at {place.filename}:{place.lineno}")
        return func(*args, **kwargs or {})


def waits_of_ordinary_steps(monkeypatch, train) -> list[str]:
    """What the host waits for in steps 2 and 3 of a run of four, which neither logs, validates nor saves."""
    batches, waits = Run.batches, Waits()

    def watched(run, optimizer):
        run.check_freq = 4  # as on a GPU, not at every step
        for batch in batches(run, optimizer):
            with waits if run.step in (1, 2) else nullcontext():
                yield batch

    monkeypatch.setattr(Run, "batches", watched)
    train(steps=4, log_freq=4, eval_freq=4, save_freq=4)
    return waits.found
