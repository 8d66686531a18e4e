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

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from hlrp.checkpoints import sync, write_json
from hlrp.cli import tell_mistakes
from hlrp.contract import Stream
from hlrp.shard_data import PLAN, find_tars, missing_shards, read_plan
from hlrp.shard_index import FORMAT, SUFFIX, faults, index_tar, read_index
from hlrp.shard_writer import Codec, Job, Settings, frame_numbers, naming, opened, view_of, write_shard
from hlrp.sources import parse_uri


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


def main(args: Args) -> int:
    if args.verify:
        return verify(args.output_dir)
    if args.index:
        return index_all(args)
    check(args)
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    jobs = plan(args, settings)
    record_plan(args, settings, jobs)

    mine = jobs[args.part :: args.num_parts]
    missing = [job for job in mine if not job.path.with_suffix(SUFFIX).is_file()]
    finished = [read_index(job.path.with_suffix(SUFFIX)) for job in mine if job not in missing]
    num_broken, start = sum(len(index.facts["skipped"]) for index in finished), time.monotonic()
    for num_new in tqdm(written(args, settings, missing), total=len(missing), unit="shard", disable=None):
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


def plan(args: Args, settings: Settings) -> list[Job]:
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
                frame_numbers(view_of(source, episode), settings)
            except ValueError as error:
                raise ValueError(f"{uri}, episode {episode}: {error}") from error
        lengths = source.lengths if args.fps is None else source.lengths * args.fps / source.fps
        shard = (np.cumsum(lengths) - lengths) // args.frames_per_shard
        borders = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(lengths)]
        spans += [(uri, start, stop) for start, stop in pairwise(borders)]
    return [Job(args.output_dir / f"{number:06d}.tar", *span) for number, span in enumerate(spans)]


def record_plan(args: Args, settings: Settings, jobs: Sequence[Job]) -> None:
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
        **asdict(settings),
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


def written(args: Args, settings: Settings, jobs: Sequence[Job]) -> Iterator[int]:
    """Writes shards. Each time one is finished, yields how many episodes were left out of it."""
    if args.num_processes == 1:
        for job in jobs:
            yield write_shard(job, settings, args.skip_broken)
        return
    context = get_context("spawn")  # forked processes would share open decoders
    with ProcessPoolExecutor(args.num_processes, context, torch.set_num_threads, initargs=(1,)) as processes:
        futures = [processes.submit(write_shard, job, settings, args.skip_broken) for job in jobs]
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


if __name__ == "__main__":
    tell_mistakes()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(main(tyro.cli(Args, description=__doc__)))
