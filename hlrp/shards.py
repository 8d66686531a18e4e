"""Video and robot data as shards: TAR files that `webdataset` reads too, each with an index for random access.

    python -m hlrp.shards --data lerobot:REPO videos:DIR --output-dir shards --image-size 256 --num-processes 16
    sbatch --array=0-63 --wrap "python -m hlrp.shards --data videos:DIR --output-dir shards"     # each does its part
    python -m hlrp.shards --output-dir shards --verify         # every checksum; prints each fault, exits 1
    python -m hlrp.shards --output-dir others --index          # TARs that plain webdataset wrote (`hlrp.tars`)
    python train_laq.py --data shards:shards

One sample of a TAR is one episode: its JSON, its arrays, and each frame once. After a crash, the same command goes on:
a shard is finished when it has an index, and finished shards are left as they are. shards.json has the settings and the
plan. The plan follows from the sources alone, so the parts of a job array share the work without messages.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import count, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from hlrp.checkpoints import sync, write_json
from hlrp.cli import tell_mistakes
from hlrp.contract import EncodedSource, Indices, Source, Stream
from hlrp.idle import episode_scores
from hlrp.images import JPEG, NPY, PNG, fit, middle, point_in_middle
from hlrp.shard_data import PLAN, find_tars, missing_shards, read_plan
from hlrp.shard_index import FORMAT, SUFFIX, faults, index_tar, read_index
from hlrp.sources import open_source, parse_uri
from hlrp.streams import Episode, VideoFrames
from hlrp.tars import END, array_bytes, changes_of, member_bytes

Codec = Literal["jpeg", "png", "yuv420"]
EXTENSIONS = {"jpeg": "jpg", "png": "png", "yuv420": "yuv.npy"}
FIRST_BYTES = {"jpeg": JPEG, "png": PNG, "yuv420": NPY}
CHUNK = 64  # frames that are decoded together
SAME_RATE = 0.001  # frame rates that differ by a smaller share count as the same
# settings that the content of a shard depends on
CONTENT = ("image_size", "fps", "drop_actions", "instruction", "codec", "quality", "idle_span")
IDLE_SIZE = 64  # side of the frames in which motion is measured, as in `hlrp.idle` [pixel]


def slurm(name: str, default: int) -> int:
    return int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))


def slurm_part() -> int:
    return (slurm("ID", 0) - slurm("MIN", 0)) // slurm("STEP", 1)


@dataclass
class Args:
    output_dir: Path  # folder of the shards
    # sources to write: videos:DIR lerobot:REPO_OR_DIR?camera=KEY world:NAME rlds:DIR shards:DIR ...
    data: tuple[str, ...] = ()

    # side of the square that frames are letterboxed into [pixel]; None: as they are
    image_size: int | None = None
    fps: float | None = None  # keep the frames nearest to this rate [1/s]; None: all
    drop_actions: bool = False  # leave out actions and cached latent actions, which --fps cannot resample
    instruction: str | None = None  # name of the fact of an episode that is its instruction; None: its task
    codec: Codec = "jpeg"  # how frames are stored: png is lossless, yuv420 is raw and the fastest to read
    quality: int = 90  # quality of JPEG, 1 to 100
    idle_span: float | None = None  # also measure motion over this time, for --idle.motion [s]; None: do not

    frames_per_shard: int = 20000  # frames after which the next episode begins another shard; a stream keeps its shards
    num_processes: int = 1  # processes that read and write
    part: int = field(default_factory=slurm_part)  # number of the part to do, from 0 on; a Slurm array sets it
    num_parts: int = field(default_factory=lambda: slurm("COUNT", 1))  # number of parts; a Slurm array sets it
    skip_broken: bool = False  # leave out episodes that cannot be read, and list them in the index
    max_broken: int = 100  # with --skip-broken: stop after this many unreadable episodes of this part

    verify: bool = False  # check all shards of the folder, and write nothing
    index: bool = False  # only write the indexes that are missing beside the TARs of the folder
    ignore: tuple[str, ...] = ()  # with --index: extensions of members to leave out


class Job(NamedTuple):
    """One shard to write: the episodes start, ..., stop - 1 of a source, or the shard `start` of a stream."""

    path: Path  # the TAR to write
    uri: str
    start: int
    stop: int


@dataclass
class View:
    """One episode of a source or a stream: the methods of a source, without the number of the episode."""

    length: int
    fps: float
    read: Callable[[Indices], dict]
    actions: Callable[[Indices], Tensor] | None
    instructions: Callable[[Indices], list[str]]
    labels: Callable[[Indices], dict[str, Tensor]] | None = None
    encoded: Callable[[Indices], list[bytes]] | None = None


def main(args: Args) -> int:
    if args.verify:
        return verify(args.output_dir)
    if args.index:
        return index_all(args)
    check(args)
    jobs = plan(args)
    record_plan(args, jobs)

    mine = jobs[args.part :: args.num_parts]
    missing = [job for job in mine if not job.path.with_suffix(SUFFIX).is_file()]
    finished = [read_index(job.path.with_suffix(SUFFIX)) for job in mine if job not in missing]
    num_broken, start = sum(len(index.facts["skipped"]) for index in finished), time.monotonic()
    for num_new in tqdm(written(args, missing), total=len(missing), unit="shard", disable=None):
        num_broken += num_new
        if num_broken > args.max_broken:
            raise ValueError(f"{num_broken} episodes cannot be read; max_broken={args.max_broken}")
    summary(args, jobs, missing, time.monotonic() - start)
    return 0


def check(args: Args) -> None:
    if not args.data:
        raise ValueError("data is empty; expected sources such as videos:DIR or lerobot:REPO_OR_DIR")
    for name in ("frames_per_shard", "num_processes", "num_parts", "image_size", "fps", "idle_span"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}; expected a number above 0")
    if not 1 <= args.quality <= 100:
        raise ValueError(f"quality={args.quality}; expected 1 to 100")
    if not 0 <= args.part < args.num_parts:
        raise ValueError(f"part={args.part}; expected 0 to num_parts - 1 = {args.num_parts - 1}")


def plan(args: Args) -> list[Job]:
    """All shards to write: whole episodes of a source up to frames_per_shard frames; for a stream, its own shards."""
    spans = []
    for text in args.data:
        uri, *_, weight = parse_uri(text)
        if weight != 1:
            raise ValueError(f"{text}: expected {uri}, without a weight; a weight is given when shards are read")
        source = opened(uri, args.skip_broken)
        if source.views:
            raise ValueError(f"{uri}: expected one camera, such as ?camera={source.camera}; shards have no more")
        if isinstance(source, Stream):
            spans += [(uri, number, number + 1) for number in range(source.num_shards)]
            continue
        _, examples = np.unique(source.fps, return_index=True)
        for episode in examples.tolist():
            try:
                frame_numbers(view_of(source, episode), args)
            except ValueError as error:
                raise ValueError(f"{uri}, episode {episode}: {error}") from error
        lengths = source.lengths if args.fps is None else source.lengths * args.fps / source.fps
        shard = (np.cumsum(lengths) - lengths) // args.frames_per_shard
        borders = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(lengths)]
        spans += [(uri, start, stop) for start, stop in pairwise(borders)]
    return [Job(args.output_dir / f"{number:06d}.tar", *span) for number, span in enumerate(spans)]


def record_plan(args: Args, jobs: Sequence[Job]) -> None:
    """Writes shards.json. Raises ValueError if the folder has another one, naming what differs, or TARs of no plan."""
    sources = [opened(uri, args.skip_broken) for uri in dict.fromkeys(job.uri for job in jobs)]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"expected data sets of different names, got {', '.join(names)}")
    content = {
        "format": FORMAT,
        "hlrp_version": version("lerobot_policy_hlrp"),
        "data": [source.uri for source in sources],
        "datasets": names,
        "cameras": [source.camera for source in sources],
        "fingerprints": [source.fingerprint for source in sources],
        "num_broken": [source.num_skipped for source in sources],  # what the sources themselves have left out
        **{name: getattr(args, name) for name in CONTENT},
        "frames_per_shard": args.frames_per_shard,
        "shards": [[job.uri, job.start, job.stop] for job in jobs],
    }
    path = args.output_dir / PLAN
    if path.is_file():
        before = read_plan(args.output_dir)
        for name in content:
            if name != "hlrp_version" and before.get(name) != content[name]:
                was, now = (str(c.get(name))[:200] for c in (before, content))
                raise ValueError(
                    f"{path}: made with {name}={was}, but now {name}={now}; give the same, or another output_dir"
                )
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for tar in sorted(args.output_dir.glob("*.tar")):
        raise ValueError(f"output_dir={args.output_dir} has {tar.name}, but no {PLAN}; expected a new folder")
    mine = args.output_dir / f"{PLAN}.{args.part}"  # parts may start at the same time; all write the same plan
    write_json(mine, content)
    mine.replace(path)


def written(args: Args, jobs: Sequence[Job]) -> Iterator[int]:
    """Writes shards. Each time one is finished, yields how many episodes were left out of it."""
    if args.num_processes == 1:
        for job in jobs:
            yield write_shard(job, args)
        return
    context = get_context("spawn")  # forked processes would share open decoders
    with ProcessPoolExecutor(args.num_processes, context, torch.set_num_threads, initargs=(1,)) as processes:
        futures = [processes.submit(write_shard, job, args) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            processes.shutdown(wait=False, cancel_futures=True)


def summary(args: Args, jobs: Sequence[Job], new: Sequence[Job], seconds: float) -> None:
    indexes = [read_index(job.path.with_suffix(SUFFIX)) for job in new]
    num_frames = sum(int(index.lengths.sum()) for index in indexes)
    num_bytes = sum(index.facts["tar_size"] for index in indexes)
    print(
        f"{len(new)} shards written: {sum(len(index.lengths) for index in indexes)} episodes, {num_frames} frames, "
        f"{num_bytes / 1e9:.3g} GB, {num_frames / max(seconds, 1e-9):.0f} frames/s"
    )
    for index in indexes:
        for number, error in index.facts["skipped"].items():
            print(f"{index.tar}: without episode {number}: {error}")
    num_missing = sum(not job.path.with_suffix(SUFFIX).is_file() for job in jobs)
    if num_missing:
        print(f"{args.output_dir}: {num_missing} of {len(jobs)} shards are left to other parts")
    else:
        print(f"next: python train_laq.py --data shards:{args.output_dir}")


def verify(folder: Path) -> int:
    """Prints one line for each fault in the shards of a folder. Returns the exit code: 1 if there is a fault."""
    tars = [Path(tar) for tar in find_tars(str(folder))]
    missing = missing_shards(folder, tars)
    print(*missing, sep="\n", end="\n" * bool(missing))
    num_faults = len(missing)
    for tar in tqdm(tars, unit="shard", disable=None):
        for fault in faults(tar):
            tqdm.write(fault)
            num_faults += 1
    print(f"{folder}: {len(tars)} shards, {num_faults or 'no'} faults")
    return 1 if num_faults else 0


def index_all(args: Args) -> int:
    """Writes the indexes that are missing beside the TARs of a folder. Returns the exit code."""
    tars = [Path(tar) for tar in find_tars(str(args.output_dir))]
    if packed := [tar for tar in tars if tar.suffix != ".tar"]:
        raise ValueError(f"{packed[0]}: compressed, and so streamed; expected plain .tar for an index")
    missing = [tar for tar in tars if not tar.with_suffix(SUFFIX).is_file()]
    for tar in tqdm(missing, unit="shard", disable=None):
        content = index_tar(tar, args.fps, args.ignore, {"ignore": args.ignore, "skipped": {}})
        index = tar.with_suffix(SUFFIX)
        partial = index.with_name(index.name + ".partial")
        with naming(index):
            partial.write_bytes(content)
        sync(partial)
        partial.replace(index)
    print(f"{args.output_dir}: {len(missing)} indexes written, {len(tars) - len(missing)} were there already")
    return 0


@lru_cache
def opened(uri: str, skip_broken: bool):
    """Opens a source, once in each process."""
    return open_source(uri, skip_broken)


def write_shard(job: Job, args: Args) -> int:
    """Writes the TAR and its index, both or none. Returns how many episodes were left out.

    A killed process leaves `.partial` files, which the next one overwrites.

    With `skip_broken`, episodes that cannot be read are left out, logged, and listed in the index.
    Raises ValueError that names the episode, or OSError that names the file that could not be written.
    """
    source = opened(job.uri, args.skip_broken)
    index = job.path.with_suffix(SUFFIX)
    partial_tar, partial_index = (path.with_name(path.name + ".partial") for path in (job.path, index))
    skipped, scores = {}, []
    try:
        with naming(job.path), open(partial_tar, "wb") as tar:
            for number, view in views(source, job):
                key = f"{job.path.stem}_{number:06d}"
                try:
                    if isinstance(view, Exception):
                        raise view
                    members, score = record(source, number, view, args)
                except (ValueError, OSError) as error:
                    message = f"{job.uri}, episode {number}: {error}"
                    if not args.skip_broken:
                        raise ValueError(message) from error
                    logging.getLogger(__name__).warning("skipped %s", message)
                    skipped[number] = str(error)
                    continue
                scores.append(score)
                for suffix, data in members.items():
                    tar.write(member_bytes(f"{key}.{suffix}", data))
            if not scores:
                raise ValueError(
                    f"{job.uri}, episodes from {job.start} on: no episode of this shard can be read: {skipped}; "
                    "take them out of the source, or give a larger frames_per_shard and another folder"
                )
            tar.write(END)
        sync(partial_tar)
        facts: dict[str, Any] = {"skipped": skipped}
        if args.idle_span is not None:
            facts["idle_span"] = args.idle_span
        columns = {name: np.concatenate([score[name] for score in scores]) for name in scores[0]}
        content = index_tar(partial_tar, facts=facts, scores=columns)
        with naming(index):
            partial_index.write_bytes(content)
        sync(partial_index)
        partial_tar.replace(job.path)
        partial_index.replace(index)
        sync(job.path.parent)
        return len(skipped)
    except BaseException:
        partial_tar.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to an error of the disk, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def views(source, job: Job) -> Iterator[tuple[int, View | Exception]]:
    """The episodes of a job with their numbers. Where a stream cannot give an episode, its error takes the place."""
    if not isinstance(source, Stream):
        for number in range(job.start, job.stop):
            yield number, view_of(source, number)
        return
    episodes = iter(source.episodes(job.start))
    for number in count():
        try:
            view = view_passing(next(episodes))
        except StopIteration:
            return
        except (ValueError, OSError) as error:
            view = error
        yield number, view


def view_of(source, number: int) -> View:
    return View(
        int(source.lengths[number]),
        float(source.fps[number]),
        partial(source.read, number),
        partial(source.actions, number) if source.action_dim else None,
        partial(source.instructions, number),
        partial(source.labels, number) if source.latent_space is not None else None,
        partial(source.encoded, number) if isinstance(source, EncodedSource) else None,
    )


def view_passing(episode: Episode) -> View:
    is_video = isinstance(episode.frames, VideoFrames)  # whose frames are no files
    return View(
        len(episode.frames),
        episode.fps,
        episode.read,
        None if episode.action is None else episode.actions,
        episode.instructions,
        encoded=lambda indices: [] if is_video else [episode.frames[i] for i in indices],
    )


def record(source, number: int, view: View, args: Args) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """The members of an episode, in their order and named by what follows the key; and its idle scores, {} without
    `idle_span`."""
    if (times := source.uneven.get(number)) is not None:
        away = np.abs((times - times[0]) * view.fps - np.arange(len(times)))
        if away.max() > 0.5:
            raise ValueError(
                f"expected frames {1 / view.fps:.4g} s apart, because an episode in a shard has one frame rate, got "
                f"frame {away.argmax()} at {times[away.argmax()] - times[0]:.3f} s"
            )
    fps = view.fps if args.fps is None else args.fps
    indices = frame_numbers(view, args)
    encoded, small, facts = [], [], {}
    parts: dict[str, list[Tensor]] = {}
    for chunk in np.split(indices, range(CHUNK, len(indices), CHUNK)):
        read = view.read(chunk)
        native, _ = read.pop("frames"), read.pop("task")  # the tasks of all frames stand in the header
        if source.crop and "point" in read:
            read["point"] = point_in_middle(read["point"], *native.shape[-2:])
        native = middle(native) if source.crop else native
        frames = native if args.image_size is None else fit(native, args.image_size)
        data = view.encoded(chunk) if view.encoded and frames is native and not source.crop else []
        if not data or not all(d.startswith(FIRST_BYTES[args.codec]) for d in data):
            data = [encode(frame, args.codec, args.quality) for frame in frames]
        encoded += data
        if args.idle_span is not None:
            small.append(fit(native, IDLE_SIZE))
        for name, value in read.items():
            if isinstance(value, Tensor):
                parts.setdefault(name, []).append(value)
            else:
                facts.setdefault(name, value)

    columns = {name: torch.cat(part) for name, part in parts.items()}
    header = changes_of(view.instructions(indices)) | {"fps": fps, "dataset": source.name, "episode": number}
    header |= {"camera": source.camera, "source": source.uri}
    if args.instruction is not None:
        if args.instruction not in facts:
            raise ValueError(f"instruction={args.instruction}; expected one of {', '.join(facts) or 'no facts'}")
        header["task"] = str(facts[args.instruction])
    if view.actions and not args.drop_actions:
        columns["action"] = view.actions(indices)
    if view.labels and not args.drop_actions:
        columns |= view.labels(indices)
        header["latent_space"] = source.latent_space
    header["facts"] = {name: v.item() if isinstance(v, np.generic) else v for name, v in facts.items()}
    columns["timestamp"] = torch.from_numpy(indices / view.fps)  # float64 [s]

    members = {"json": json.dumps(header).encode()}
    for name in sorted(columns, key=lambda name: (name != "state", name != "action", name != "timestamp", name)):
        members[f"{name}.npy"] = array_bytes(columns[name].numpy())
    for i, data in enumerate(encoded):
        members[f"{i:06d}.{EXTENSIONS[args.codec]}"] = data
    return members, idle_scores(small, fps, columns.get("action"), args.idle_span)


def frame_numbers(view: View, args: Args) -> np.ndarray:
    """The numbers of the frames to write: all, or the nearest ones to the times of a lower rate.

    Raises ValueError for a higher rate, and if frames with actions would be left out without `drop_actions`.
    """
    fps = args.fps
    if fps is None or abs(view.fps / fps - 1) <= SAME_RATE:
        return np.arange(view.length)
    if fps > view.fps:
        raise ValueError(f"fps={fps:g}; expected at most the {view.fps:g} fps of the episode")
    if (view.actions or view.labels) and not args.drop_actions:
        raise ValueError(
            f"fps={fps:g}, but the episode has an action for each of its frames at {view.fps:g} fps, and no rule joins "
            "several into one; --drop-actions writes the video alone"
        )
    num_frames = int((view.length - 1) * fps / view.fps + 1e-6) + 1
    return np.rint(np.arange(num_frames) * view.fps / fps).astype(np.int64).clip(max=view.length - 1)


def encode(frame: Tensor, codec: Codec, quality: int) -> bytes:
    """frame: uint8 (c, h, w)."""
    from torchvision.io import encode_jpeg, encode_png

    if codec == "jpeg":
        encoded = encode_jpeg(frame.contiguous(), quality)
        assert isinstance(encoded, Tensor)  # one frame gives one
        return encoded.numpy().tobytes()
    if codec == "png":
        return encode_png(frame.contiguous()).numpy().tobytes()
    import av

    height, width = frame.shape[1:]
    if height % 2 or width % 2:
        raise ValueError(f"codec=yuv420; expected frames of an even width and height, got {width} x {height} pixels")
    image = frame.permute(1, 2, 0).contiguous().numpy()
    return array_bytes(av.VideoFrame.from_ndarray(image, "rgb24").to_ndarray(format="yuv420p"))


def idle_scores(small: list[Tensor], fps: float, actions: Tensor | None, span: float | None) -> dict[str, np.ndarray]:
    """The scores of `hlrp.idle.episode_scores`, from frames that are decoded and small already."""
    if span is None:
        return {}
    frames = torch.cat(small)
    return episode_scores(OneEpisode(frames, fps, actions), 0, span)


class OneEpisode(Source):
    """An episode in memory."""

    def __init__(self, frames: Tensor, fps: float, actions: Tensor | None):
        self.frames, self.taken = frames, actions
        self.lengths, self.fps = np.array([len(frames)]), np.array([fps])
        self.action_dim = 0 if actions is None else actions.shape[1]

    def read(self, episode: int, indices: Indices) -> dict:
        return {"frames": self.frames[list(indices)]}

    def actions(self, episode: int, indices: Indices) -> Tensor:
        assert self.taken is not None
        return self.taken[list(indices)]


if __name__ == "__main__":
    tell_mistakes()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(main(tyro.cli(Args, description=__doc__)))
