"""Shards beside the decoder alone, webdataset and LeRobotDataset; and an index of 24 million frames.

    python tests/benchmarks/shards.py                # one core, two to three minutes, 2 GB of disk
    python tests/benchmarks/shards.py --part speed   # or: --part size

speed   ms of CPU time for a pair of 256 x 256 frames, 0.5 s apart, all sides in turns in one run:
            floor            `hlrp.images.decode` of both JPEGs, which lie in memory
            read             `Shards.read`, pairs in random order
            shards           the same through `Clips`, `Mixture` and `collate`, in batches
            webdataset       a TAR of pairs, the same JPEGs, in its order: `.decode("rgb8").batched()`
            LeRobotDataset   the dataset (H.264, key frame every 2) that the shards were made from, in random order
            lerobot:         the same dataset through `Clips`, `Mixture` and `collate`
            video floor      PyAV alone: seek to the key frame of each of the two frames and decode on to it
        Asserted before: shards give what their JPEGs decode to; webdataset the same, up to the rounding of its
        decoder; lerobot: the frames of LeRobotDataset; and shards these, up to JPEG.
size    640 thousand episodes in 1,024 shards, all alike: time from `Shards(...)` to the first sample, private memory of
        a forked worker that has read some, and a sample's cost beside one shard's.

The exit status is 1 where a target below is missed.
"""

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import tyro
import webdataset as wds
from torchvision.io import encode_jpeg

from hlrp.clips import Clips
from hlrp.contract import Source
from hlrp.data import Mixture, collate
from hlrp.distributed import keep_freed_memory
from hlrp.images import decode
from hlrp.label import CAMERA, write_dataset
from hlrp.lerobot_data import LeRobotData
from hlrp.shard_data import Shards
from hlrp.shard_index import index_tar, read_index, to_safetensors
from hlrp.shards import Args as ShardArgs
from hlrp.shards import main as write_shards
from hlrp.tars import END, array_bytes, member_bytes

FPS, OFFSET, SIZE = 10, 5, 256
TARGETS = {  # least ratio of the costs of the second to the first
    ("shards", "floor"): 0.85,
    ("shards", "webdataset"): 2.0,
    ("shards", "LeRobotDataset"): 8.0,
    ("lerobot:", "LeRobotDataset"): 1.5,
    ("lerobot:", "video floor"): 0.8,
}
MAX_OPEN, MAX_MEMORY, MAX_GROWTH = 2.0, 100, 1.4  # [s], [MiB], ratio


@dataclass
class Args:
    part: Literal["all", "speed", "size"] = "all"
    num_episodes: int = 24  # of speed
    num_frames: int = 60  # of each
    repeats: int = 7  # rounds
    num_pairs: int = 256  # of a side in a round; LeRobotDataset takes a quarter
    batch_size: int = 32
    num_shards: int = 1024  # of size


class Textures(Source):
    """Noise that drifts: as large as JPEG as video of a robot is, 23 kB."""

    uri, name, camera, action_dim, state_dim = "test:textures", "textures", "", 2, 0

    def __init__(self, num_episodes: int, num_frames: int):
        self.lengths = np.full(num_episodes, num_frames)
        self.fps = np.full(num_episodes, float(FPS))

    def read(self, episode, indices):
        rng = np.random.default_rng(episode)
        smooth = torch.from_numpy(rng.uniform(30, 225, (1, 3, 24, 24)).astype(np.float32))
        image = torch.nn.functional.interpolate(smooth, (SIZE, SIZE), mode="bicubic")[0]
        image += torch.from_numpy(rng.normal(0, 5, (1, SIZE, SIZE)).astype(np.float32))
        image = image.clamp(0, 255).to(torch.uint8)
        return {"frames": torch.stack([image.roll(2 * int(i), -1) for i in indices])}

    def actions(self, episode, indices):
        return torch.tensor([[episode, i] for i in indices], dtype=torch.float32)


def pairs_of(source) -> Mixture:
    return Mixture([Clips(source, range(len(source.lengths)), (0.0, OFFSET / FPS), image_size=SIZE)])


def batches(mixture: Mixture, batch_size: int) -> Callable[[int], None]:
    start = 0

    def read(num_pairs: int) -> None:
        nonlocal start
        for first in range(start, start + num_pairs, batch_size):
            collate(mixture.__getitems__(range(first, first + batch_size)))
        start += num_pairs

    return read


def measure_speed(args: Args, folder: Path) -> bool:
    from lerobot.datasets import LeRobotDataset

    write_dataset(Textures(args.num_episodes, args.num_frames), folder / "lerobot", None)
    write_shards(ShardArgs(folder / "shards", (f"lerobot:{folder}/lerobot",), quality=90))
    source, lerobot = Shards(folder / "shards"), LeRobotData(folder / "lerobot")
    deltas = {CAMERA: [0.0, OFFSET / FPS]}
    theirs = LeRobotDataset("hlrp/textures", root=folder / "lerobot", delta_timestamps=deltas)

    rng = np.random.default_rng(0)
    chosen = [(int(rng.integers(args.num_episodes)), int(rng.integers(args.num_frames - OFFSET))) for _ in range(1024)]
    encoded = [source.encoded(episode, [i, i + OFFSET]) for episode, i in chosen]
    with wds.TarWriter(str(folder / "pairs.tar")) as writer:
        for number, (first, second) in enumerate(encoded):
            writer.write({"__key__": f"{number:06d}", "0.jpg": first, "1.jpg": second})
    plain = wds.WebDataset(str(folder / "pairs.tar"), shardshuffle=False).decode("rgb8").to_tuple("0.jpg", "1.jpg")

    error = []
    for number, sample in enumerate(islice(plain, 64)):
        episode, i = chosen[number]
        frames = source.read(episode, [i, i + OFFSET])["frames"]
        expected = torch.stack([decode(data, "") for data in encoded[number]])
        assert torch.equal(frames, expected)
        rgb8 = torch.from_numpy(np.stack(sample)).permute(0, 3, 1, 2)
        assert (rgb8.int() - expected.int()).abs().max() <= 2
        video = lerobot.read(episode, [i, i + OFFSET])["frames"]
        item = theirs[episode * args.num_frames + i][CAMERA]
        assert torch.equal((item * 255).round().to(torch.uint8), video)
        error.append((frames.float() - video).abs().mean().item())
    size = statistics.mean(len(data) for pair in encoded for data in pair)
    print(
        f"a frame is {size / 1000:.1f} kB; all sides agree; JPEG differs by {max(error):.1f} of 255 at most, on average"
    )

    def floor(num_pairs: int) -> None:
        for number in range(num_pairs):
            for data in encoded[number]:
                decode(data, "")

    def read(num_pairs: int) -> None:
        for episode, i in chosen[:num_pairs]:
            source.read(episode, [i, i + OFFSET])

    endless = chain.from_iterable(repeat(plain.batched(args.batch_size)))

    def webdataset(num_pairs: int) -> None:
        for first, second in islice(endless, num_pairs // args.batch_size):
            torch.from_numpy(np.stack([first, second], axis=1))

    def lerobot_dataset(num_pairs: int) -> None:
        for episode, i in chosen[:num_pairs]:
            theirs[episode * args.num_frames + i]

    container = av.open(str(lerobot.video_files[0]))  # of all episodes
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    stamps = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    assert len(stamps) == args.num_episodes * args.num_frames

    def video_floor(num_pairs: int) -> None:
        for episode, i in chosen[:num_pairs]:
            for number in (i, i + OFFSET):
                stamp = stamps[episode * args.num_frames + number]
                container.seek(stamp, stream=stream)
                for packet in container.demux(stream):
                    frames = packet.decode()
                    if packet.pts == stamp:
                        frames += stream.codec_context.decode(None)
                        break
                assert frames[-1].pts == stamp

    few = args.num_pairs // 4 // args.batch_size * args.batch_size
    sides = {
        "floor": (floor, args.num_pairs),
        "read": (read, args.num_pairs),
        "shards": (batches(pairs_of(source), args.batch_size), args.num_pairs),
        "webdataset": (webdataset, args.num_pairs),
        "LeRobotDataset": (lerobot_dataset, few),
        "lerobot:": (batches(pairs_of(lerobot), args.batch_size), few),
        "video floor": (video_floor, few),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.repeats + 1):
        for name, (side, num_pairs) in sides.items():
            gc.collect()
            start = time.process_time()
            side(num_pairs)
            if turn:
                times[name].append((time.process_time() - start) / num_pairs * 1000)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:16}{medians[name]:8.3f} CPU-ms a pair, {min(values):.3f}..{max(values):.3f}")
    passed = True
    for (ours, other), target in TARGETS.items():
        ratio = medians[other] / medians[ours]
        passed &= ratio >= target
        print(f"{other} / {ours} = {ratio:.2f}; {target:g} are asked for")
    return passed


def write_large(folder: Path, num_shards: int, num_episodes: int = 625, length: int = 43) -> None:
    """Shards whose episodes are one and the same, over and over; the rest of each TAR is a hole."""
    folder.mkdir()
    tar = folder / "000000.tar"
    members = {"json": b'{"task": "drift", "fps": 10}', "action.npy": array_bytes(np.zeros((length, 2), np.float32))}
    for i, image in enumerate(Textures(1, length).read(0, range(length))["frames"]):
        members[f"{i:06d}.jpg"] = encode_jpeg(image, 90).numpy().tobytes()
    start = b"".join(member_bytes(f"e.{name}", data) for name, data in members.items())
    tar.write_bytes(start + END)
    tar.with_suffix(".index").write_bytes(index_tar(tar))
    one = read_index(tar.with_suffix(".index"))
    tables = {name: one.table(name) for name in ("lengths", "fps", "members", "frames")}
    tables = {name: np.concatenate([table] * num_episodes) for name, table in tables.items()}
    size = num_episodes * len(start)
    index = to_safetensors(tables, one.facts | {"tar_size": size})
    for number in range(num_shards):
        path = folder / f"{number:06d}.tar"
        path.write_bytes(start)
        os.truncate(path, size)
        path.with_suffix(".index").write_bytes(index)


def first_sample(folder: Path) -> tuple[float, float, Mixture]:
    """Wall and CPU time of opening, up to the first sample."""
    wall, cpu = time.perf_counter(), time.process_time()
    mixture = pairs_of(Shards(folder))
    mixture[0]
    return time.perf_counter() - wall, time.process_time() - cpu, mixture


def private_memory() -> float:
    """Of this process, not shared with the one it was forked from [MiB]."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def open_and_fork(folder: Path) -> tuple[float, float, float, float]:
    """Wall and CPU time of opening, memory that it takes, and private memory of a worker."""
    torch.set_num_threads(1)
    before = private_memory()
    wall, cpu, mixture = first_sample(folder)
    opened, fork = private_memory() - before, get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    worker = fork.Process(target=read_some, args=(mixture, sender))
    worker.start()
    private = receiver.recv()
    worker.join()
    return wall, cpu, opened, private


def read_some(mixture: Mixture, sender, num_samples: int = 3000) -> None:
    for number in range(num_samples):
        mixture[number]
    sender.send(private_memory())


def measure_size(args: Args, folder: Path) -> bool:
    write_large(folder / "many", args.num_shards)
    write_large(folder / "one", 1)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        wall, cpu, opened, worker = process.submit(open_and_fork, folder / "many").result()

    mixtures = {name: first_sample(folder / name)[2] for name in ("one", "many")}
    clips = mixtures["many"].clips[0]
    print(f"{len(clips) / 1e6:.1f} million pairs in {len(clips.episodes)} episodes and {args.num_shards} shards")
    times: dict[str, list[float]] = {name: [] for name in mixtures}
    for turn in range(args.repeats + 1):
        for name, mixture in mixtures.items():
            start = time.process_time()
            batches(mixture, args.batch_size)(1024)
            if turn:
                times[name].append((time.process_time() - start) / 1024 * 1000)
    one, many = (statistics.median(times[name]) for name in ("one", "many"))
    print(f"from opening to the first sample: {wall:.2f} s, {cpu:.2f} CPU-s; {MAX_OPEN:g} s are allowed")
    print(f"memory: {opened:.0f} MiB to open, {worker:.0f} MiB private to a worker; {MAX_MEMORY} are allowed")
    print(f"a sample: {one:.3f} CPU-ms of one shard, {many:.3f} of all: {many / one:.2f}; {MAX_GROWTH:g} are allowed")
    return wall <= MAX_OPEN and worker <= MAX_MEMORY and many / one <= MAX_GROWTH


def main(args: Args) -> int:
    keep_freed_memory()
    torch.set_num_threads(1)
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        if args.part != "size":
            passed &= measure_speed(args, Path(folder))
        if args.part != "speed":
            passed &= measure_size(args, Path(folder))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
