"""Cached latent actions: copies a dataset and adds what a LAQ says of every frame.

    python -m hlrp.label --data metaworld:mt10 --output-dir data/mt10_labelled                # after train_laq.py
    python -m hlrp.label --data videos:DIR --output-dir data/videos_labelled --image-size 256 --laq FOLDER
    python train_vla.py --data lerobot:data/mt10_labelled

It writes a LeRobot v3 dataset and leaves the source as it is. Two columns are new. They hold NaN and -1 at a frame
whose delta reaches past its episode:
    latent_action           float32 (e,): the vectors of all tokens, see `hlrp.laq.LatentActions`
    latent_action_indices   int64 (m,): their codes, if the LAQ is discrete
meta/latent_actions.json names the LAQ and the data, and meta/stats.json has the statistics of latent_action: any model
that reads LeRobot datasets can learn from them, with delta_timestamps={"latent_action": [0.0, 0.2]}. A LeRobot dataset
keeps all its columns, and the camera of the URI is labelled. Other video (videos:, world:) becomes a LeRobot dataset
first, and the written frames are labelled.
"""

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from hlrp.checkpoints import whole_folder, write_json
from hlrp.cli import tell_mistakes
from hlrp.clips import Clips, cameras_of, read_frames
from hlrp.contract import Stream
from hlrp.images import fit, middle, point_in_middle
from hlrp.laq import LAQ, LatentActions
from hlrp.lerobot_data import ACTION, LATENT_ACTION, LATENT_INDICES, LATENT_SPACE, STATE, LeRobotData, find_dataset
from hlrp.lerobot_files import POINT
from hlrp.sources import open_source, parse_uri
from hlrp.vla import LatentSpace

CAMERA = "observation.images.camera"  # of video that becomes a dataset here
QUEUE_SIZE = 64  # frames that wait for the encoder


@dataclass
class Args:
    data: str  # source to label: videos:DIR lerobot:REPO_OR_DIR world:NAME metaworld:TASKS
    output_dir: Path  # folder to write; it must not exist yet
    laq: Path = Path("outputs/laq/checkpoints/last/pretrained_model")  # checkpoint of stage 1, which labels
    # for videos: and world:, side of the square that frames are letterboxed into [pixel]; None: as they are
    image_size: int | None = None
    batch_size: int = 64  # frames that the LAQ encodes together
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # number format of the encoder; auto: bf16 on a GPU


def main(args: Args) -> None:
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)  # LeRobot decodes nothing here
    _, scheme, location, options, _ = parse_uri(args.data)
    is_lerobot = scheme in ("lerobot", "metaworld")
    if args.output_dir.exists():
        raise ValueError(f"output_dir={args.output_dir} exists already; delete it or choose another folder")
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size}; expected 1 or more")
    if is_lerobot and args.image_size is not None:
        raise ValueError(f"image_size={args.image_size}, but {args.data} keeps its frames; leave it out")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    bf16 = args.mixed_precision == "bf16" or (args.mixed_precision == "auto" and device.type != "cpu")

    laq = LAQ.from_pretrained(args.laq).requires_grad_(False).to(device)
    if scheme == "lerobot":
        find_dataset(location, "*", revision=options.get("revision"))  # also the cameras that are not labelled
    source = open_source(args.data)
    if isinstance(source, Stream):
        raise ValueError(f"{source.uri} is a stream; make a source with python -m hlrp.shards --data '{source.uri}'")
    if is_lerobot and source.latent_space is not None:
        origin = source.latent_space["source"]
        raise ValueError(f"{source.uri} has latent actions already; label the data that it was made from, {origin}")
    frame_offsets(laq, source)  # raises before anything is written
    facts = asdict(latent_space(laq)) | {
        "camera": cameras_of(source, laq.num_views) if is_lerobot else CAMERA,
        "crop": is_lerobot and source.crop,  # of video, the frames that are written are cut
        "source": source.uri,
        "source_fingerprint": source.fingerprint,
        "mixed_precision": "bf16" if bf16 else "no",
        "hlrp_version": version("lerobot_policy_hlrp"),
    }

    videos = args.output_dir.with_name(args.output_dir.name + ".videos.partial")
    with whole_folder(args.output_dir) as folder:
        if not is_lerobot:
            shutil.rmtree(videos, ignore_errors=True)
            write_dataset(source, videos, args.image_size)
            source = LeRobotData(videos, uri=source.uri)
        assert isinstance(source, LeRobotData)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            columns = label_dataset(laq, source, args.batch_size)
        folder.rmdir()  # LeRobot makes it itself
        add_columns(source.root, folder, columns)
        add_statistics(folder, columns[LATENT_ACTION])
        write_json(folder / LATENT_SPACE, facts)
        shutil.rmtree(videos, ignore_errors=True)
    print(f"{args.output_dir}: {len(source.lengths)} episodes with latent actions")


def latent_space(laq: LAQ) -> LatentSpace:
    """Describes the LAQ's latent actions. It labels a blank pair of frames and reads the sizes off the result."""
    blank = torch.zeros(1, 2, 3, laq.num_views * laq.image_size, laq.image_size, dtype=torch.uint8)
    actions = laq.label(blank.to(laq.queries.device))
    return LatentSpace(
        delta=laq.config.delta,
        num_tokens=0 if actions.indices is None else actions.indices.shape[-1],
        codebook_size=laq.quantizer.codebook_size or 0,
        vector_dim=actions.vectors[0, 0].numel(),
        image_size=laq.image_size,
        fingerprint=laq.fingerprint,
        num_views=laq.num_views,
    )


def cached_space(sources: list, space: LatentSpace) -> tuple[dict | None, str]:
    """The latent_space for `hlrp.clips.Clips` if all sources have cached latent actions, else None; and one sentence
    that says where a run takes its latent actions from."""
    without = [source.uri for source in sources if not source.latent_space]
    if not without:
        return asdict(space), "latent actions are read from the data"
    told = "latent actions are computed along the way"
    if having := [source.uri for source in sources if source.uri not in without]:
        told += f", also where {', '.join(having)} has them, since {', '.join(without)} has none; hlrp.label makes them"
    return None, told


def frame_offsets(laq: LAQ, source) -> np.ndarray:
    """Delta of the LAQ in frames of each episode, int64 (episodes,). ValueError if no frames are so far apart."""
    episodes = range(len(source.lengths))
    return Clips(source, episodes, (0.0, laq.config.delta), laq.image_size, num_views=laq.num_views).offsets[:, 1]


def label_dataset(laq: LAQ, source: LeRobotData, batch_size: int) -> dict[str, np.ndarray]:
    """The new columns, one row a frame, in the order of the data files."""
    for stray in sorted(set(source.root.glob("data/*/*.parquet")) - set(source.data_files)):
        raise ValueError(f"{stray} belongs to no episode, but LeRobot would copy it; delete it")
    space = latent_space(laq)
    num_frames = int(source.lengths.sum())
    columns = {LATENT_ACTION: np.full((num_frames, space.vector_dim), np.nan, dtype=np.float32)}
    if space.num_tokens:
        columns[LATENT_INDICES] = np.full((num_frames, space.num_tokens), -1)
    for episode, offset in enumerate(tqdm(frame_offsets(laq, source), unit="episode", disable=None)):
        first = source.episodes["first_row"][episode]
        for part in label_episode(laq, source, episode, int(offset), batch_size):
            rows = source.places[first : (first := first + len(part.vectors))]
            columns[LATENT_ACTION][rows] = part.vectors.flatten(1).cpu().numpy()
            if part.indices is not None:
                columns[LATENT_INDICES][rows] = part.indices.cpu().numpy()
    return columns


@torch.inference_mode()
def label_episode(laq: LAQ, source, episode: int, offset: int, batch_size: int) -> list[LatentActions]:
    """The latent actions of all frames but the last `offset`, which no other frame follows at that distance.

    Each frame is embedded once, and at most batch_size + offset embeddings stay in memory.
    """
    parts, embedded = [], None
    length = int(source.lengths[episode])
    for start in range(0, length, batch_size):
        indices = np.arange(start, min(start + batch_size, length))
        frames = read_frames(source, episode, indices, laq.image_size, laq.num_views)  # t c h w
        new = laq.embed(laq.observe(frames[None].to(laq.queries.device)))[0]  # t n d
        embedded = new if embedded is None else torch.cat([embedded, new])
        if len(embedded) > offset:
            parts.append(laq.between(embedded[:-offset], embedded[offset:]))
            embedded = embedded[-offset:]
    return parts


def add_columns(root: Path, output_dir: Path, columns: dict[str, np.ndarray]) -> None:
    """Copies a LeRobot dataset, and adds columns to it."""
    import datasets
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.dataset_tools import add_features

    datasets.disable_progress_bars()
    features: dict = {
        name: (column, {"dtype": str(column.dtype), "shape": column.shape[1:], "names": None})
        for name, column in columns.items()
    }
    repo_id = f"hlrp/{output_dir.stem}"
    add_features(LeRobotDataset(repo_id, root=root), features, output_dir, repo_id)


def add_statistics(folder: Path, vectors: np.ndarray) -> None:
    """Adds those of the latent vectors to a dataset's own, as LeRobot's normalisation reads them. Frames without a
    latent action do not count."""
    from lerobot.datasets.compute_stats import get_feature_stats

    labelled = vectors[~np.isnan(vectors).any(1)]
    found = get_feature_stats(labelled, axis=0, keepdims=False)
    stats = json.loads((folder / "meta/stats.json").read_text())
    stats[LATENT_ACTION] = {name: value.tolist() for name, value in found.items()}
    write_json(folder / "meta/stats.json", stats)


def write_dataset(source, folder: Path, image_size: int | None) -> None:
    """Writes a source as a LeRobot dataset of one camera, with its states, actions and points.

    Raises ValueError if episodes differ in frame rate or size, because a dataset has one of each.
    """
    import av
    import datasets
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)  # x264 reports on each episode
    datasets.disable_progress_bars()
    fps = common_fps(source)
    height, width = (image_size, image_size) if image_size is not None else common_size(source)
    if source.crop:
        height = width = min(height, width)
    if height % 2 or width % 2 or min(height, width) < 16:
        raise ValueError(
            f"{source.uri}: expected frames of an even size from 16 pixels on, got {width} x {height}; "
            "--image-size 256 letterboxes them into one"
        )
    image = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    features = {CAMERA: image}
    point_dim = 2 if "point" in source.read(0, [0]) else 0
    for key, dim in ((STATE, source.state_dim), (ACTION, source.action_dim), (POINT, point_dim)):
        if dim:
            features[key] = {"dtype": "float32", "shape": (dim,), "names": None}
    dataset = LeRobotDataset.create(
        f"hlrp/{source.name}",
        fps,
        features,
        root=folder,
        rgb_encoder=RGBEncoderConfig(vcodec="h264", g=2, crf=18, preset="veryfast"),
        streaming_encoding=True,
        encoder_queue_maxsize=QUEUE_SIZE,
        encoder_threads=1,
    )
    writer: Any = dataset.writer
    queues = writer._streaming_encoder._frame_queues
    for episode, length in enumerate(tqdm(source.lengths, unit="episode", disable=None)):
        for start in range(0, length, QUEUE_SIZE):
            indices = np.arange(start, min(start + QUEUE_SIZE, length))
            read = source.read(episode, indices)
            size = read["frames"].shape[-2:]
            frames = middle(read["frames"]) if source.crop else read["frames"]
            frames = frames if image_size is None else fit(frames, image_size)
            columns = {CAMERA: frames.permute(0, 2, 3, 1).numpy()}
            if source.state_dim:
                columns[STATE] = read["state"].numpy()
            if source.action_dim:
                columns[ACTION] = source.actions(episode, indices).numpy()
            if point_dim:
                point = point_in_middle(read["point"], *size) if source.crop else read["point"]
                columns[POINT] = point.numpy()
            tasks = source.instructions(episode, indices)
            for i in range(len(indices)):
                while any(queue.full() for queue in queues.values()):  # LeRobot would drop the frame
                    time.sleep(0.001)
                frame = {key: column[i] for key, column in columns.items()}
                dataset.add_frame(frame | {"task": tasks[i]})
        dataset.save_episode()
    dataset.finalize()


def common_fps(source) -> int:
    """The frame rate of all episodes as a whole number, which LeRobot needs: 29.97 becomes 30."""
    fps = max(1, round(float(source.fps[0])))
    for episode in np.flatnonzero(np.abs(source.fps - fps) > 0.01 * fps):
        names = [f"{source.place(i)}: {source.fps[i]:.4g}" for i in sorted({0, int(episode)})]
        raise ValueError(
            f"{source.uri}: expected one whole number of frames per second, as a dataset has, got {', '.join(names)}"
        )
    return fps


def common_size(source) -> tuple[int, int]:
    """Height and width of all episodes."""
    sizes = [tuple(source.read(i, [0])["frames"].shape[-2:]) for i in range(len(source.lengths))]
    for episode, (height, width) in enumerate(sizes):
        if (height, width) != sizes[0]:
            raise ValueError(
                f"{source.uri}: {source.place(0)} has frames of {sizes[0][1]} x {sizes[0][0]} pixels and "
                f"{source.place(episode)} of {width} x {height}; --image-size 256 letterboxes them into one size"
            )
    return sizes[0]


if __name__ == "__main__":
    tell_mistakes()
    main(tyro.cli(Args, description=__doc__))
