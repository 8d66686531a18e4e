"""The frames of the videos made here show their own numbers as bar codes: the right one can be told."""

import logging
import shutil
import struct
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toys import SIZE, numbers, picture, write_video

from hlrp import shards
from hlrp.clips import Clips
from hlrp.contract import split_episodes
from hlrp.data import Mixture
from hlrp.images import fit
from hlrp.sources import named_apart, open_source, open_sources
from hlrp.video_index import probe
from hlrp.videos import SUFFIXES, VideoReader, Videos, open_video

FORMATS = [
    ("b_frames.mp4", "libx264", 30, {"g": "12", "bf": "3"}),
    ("short_gop.mp4", "libx264", 10, {"g": "2", "preset": "ultrafast"}),
    ("open_gop.mkv", "libx264", 60, {"g": "20", "x264-params": "open-gop=1", "bf": "2"}),
    ("av1.mp4", "libaom-av1", 25, {"g": "30", "cpu-used": "8"}),
    ("vp9.webm", "libvpx-vp9", 30, {"g": "16"}),
    ("ntsc.mov", "libx264", Fraction(30000, 1001), {}),
    ("old.avi", "mpeg4", 30, {"g": "12", "bf": "2"}),
    ("apple.m4v", "libx264", 24, {"g": "12"}),
    ("phone.3gp", "mpeg4", 15, {"g": "12"}),
    ("broadcast.ts", "libx264", 25, {"g": "12", "bf": "2"}),
    ("camera.m2ts", "mpeg2video", 25, {"g": "12"}),
    ("camera.mts", "libx264", 25, {"g": "25", "bf": "2"}),
    ("disc.mpg", "mpeg2video", 25, {"g": "12", "bf": "2"}),
    ("disc.mpeg", "mpeg1video", 25, {"g": "12"}),
    ("web.flv", "flv1", 20, {"g": "12"}),
    ("windows.wmv", "wmv2", 25, {"g": "12"}),
    ("windows.asf", "msmpeg4", 20, {"g": "12"}),
    ("loop.gif", "gif", 10, {}),
]


def test_every_suffix_that_is_read_is_tried_here():
    assert sorted({name[name.index(".") :] for name, *_ in FORMATS}) == sorted(SUFFIXES)


def set_matrix(path, a, b, c, d):
    """Gives an MP4 a display matrix."""
    data, struct_ = path.read_bytes(), struct.Struct(">9i")
    matrix = [round(65536 * x) for x in (a, b, 0, c, d, 0, 0, 0, 16384)]
    at = data.index(struct_.pack(65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    path.write_bytes(data[:at] + struct_.pack(*matrix) + data[at + struct_.size :])


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HLRP_CACHE", str(tmp_path_factory.mktemp("cache")))
    av.logging.set_level(av.logging.PANIC)


@pytest.mark.parametrize(("name", "codec", "fps", "options"), FORMATS)
def test_any_frame_in_any_order_is_the_right_one(tmp_path, name, codec, fps, options):
    reader = VideoReader(write_video(tmp_path / name, codec, fps, options))
    header = probe(tmp_path / name)
    assert header.fps == pytest.approx(float(fps))
    order = np.random.default_rng(0).permutation(50)
    for wanted in [*np.array_split(order, 9), order, range(50), [49], [7, 7, 0, 7], [8], [9], [9]]:
        times = header.first + np.array(wanted) / float(fps)
        assert numbers(reader.frames(times)) == list(wanted)
    assert (header.last - header.first) * float(fps) == pytest.approx(49, abs=0.1)


class Counting:
    """A container that counts seeks and the packets that it gives."""

    def __init__(self, container):
        self.container, self.seeks, self.packets = container, 0, 0

    def seek(self, *args, **kwargs):
        self.seeks += 1
        self.container.seek(*args, **kwargs)

    def demux(self, stream):
        for packet in self.container.demux(stream):
            self.packets += 1
            yield packet


def test_a_reader_seeks_only_where_that_leads_nearer(tmp_path):
    reader = VideoReader(write_video(tmp_path / "a.mp4", options={"g": "20", "x264-params": "scenecut=0"}))
    reader.container = counting = Counting(reader.container)
    for wanted, num_seeks in [([1, 2, 5], 1), ([7, 12], 0), ([19, 20, 30], 0), ([47, 31], 1), ([3, 45], 2)]:
        counting.seeks = 0
        assert numbers(reader.frames(np.array(wanted) / 30)) == wanted
        assert counting.seeks == num_seeks


def test_a_reader_decodes_nothing_behind_a_frame_near_its_key_frame(tmp_path):
    reader = VideoReader(write_video(tmp_path / "a.mp4", options={"g": "2"}))  # as LeRobot writes videos
    reader.container = counting = Counting(reader.container)
    for wanted, num_packets in [([8], 1), ([3], 2), ([20, 27], 3), ([30, 31, 32, 33], 4), ([40, 41, 43], 4)]:
        counting.packets = 0
        assert numbers(reader.frames(np.array(wanted) / 30)) == wanted
        assert counting.packets == num_packets


@pytest.mark.parametrize("name", ["phone.mp4", "phone.mkv"])
def test_a_variable_frame_rate_is_read_on_a_regular_grid(tmp_path, name):
    steps = np.random.default_rng(0).choice([0.02, 0.033, 0.1], 59)
    times = np.concatenate([[0], steps.cumsum()])
    write_video(tmp_path / name, num_frames=60, times=times)
    source = Videos(tmp_path)
    grid = np.arange(source.lengths[0]) / source.fps[0]
    assert times[-1] - 1 / source.fps[0] < grid[-1] < times[-1] + 0.01
    shown = np.searchsorted(times, grid + 0.001, side="right") - 1
    assert numbers(source.read(0, range(len(grid)))["frames"]) == shown.tolist()


def test_frames_that_an_edit_list_hides_do_not_exist(tmp_path):
    write_video(tmp_path / "cut.mp4", options={"g": "12"}, cut=17, container={"avoid_negative_ts": "disabled"})
    header, reader = probe(tmp_path / "cut.mp4"), VideoReader(tmp_path / "cut.mp4")
    times = header.first + np.arange(33) / 30
    assert numbers(reader.frames(times)) == list(range(17, 50))
    assert numbers(reader.frames(times[20:])) == list(range(37, 50))
    assert header.last == pytest.approx(times[-1])


def test_a_video_filmed_upright_stands_upright(tmp_path):
    set_matrix(write_video(tmp_path / "upright.mp4"), 0, 1, -1, 0)
    frames = VideoReader(tmp_path / "upright.mp4").frames([5 / 30, 44 / 30])
    assert frames.shape == (2, 3, SIZE[0], SIZE[1])
    assert numbers(frames.rot90(1, (2, 3))) == [5, 44]  # turned clockwise, so back counter-clockwise


MATRICES = {  # of the track header, and what they make of an image (h, w, c)
    "upright": ((1, 0, 0, 1), lambda x: x),
    "quarter turn clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "half turn": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "quarter turn counter-clockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "left and right exchanged": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "top and bottom exchanged": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    "transposed along the other diagonal": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
}


@pytest.mark.parametrize("sar", [None, Fraction(2, 1), Fraction(4, 3), Fraction(8, 9)])
@pytest.mark.parametrize("name", MATRICES)
def test_a_frame_has_the_orientation_and_the_shape_in_which_a_player_shows_it(tmp_path, name, sar):
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32] = (220, 30, 30), (30, 220, 30), (30, 30, 220)  # no symmetry
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"qp": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        if sar is not None:
            stream.codec_context.sample_aspect_ratio = sar
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode())
    (a, b, c, d), as_shown = MATRICES[name]
    set_matrix(tmp_path / "a.mp4", a, b, c, d)
    found = open_source(f"videos:{tmp_path}").read(0, [1])["frames"][0].permute(1, 2, 0).numpy()
    width = round(64 * (sar or 1))
    columns = ((np.arange(width) + 0.5) * 64 / width).astype(int)
    expected = as_shown(image[:, columns])
    assert found.shape == expected.shape
    assert (np.abs(found.astype(int) - expected).max(axis=2) < 40).mean() > 0.9  # all but the borders of colours


def test_a_video_that_is_shown_aslant_is_refused_by_name(tmp_path):
    set_matrix(write_video(tmp_path / "a.mp4"), 0.7071, 0.7071, -0.7071, 0.7071)
    with pytest.raises(ValueError, match="a.mp4: not a readable video: .* by 45 degrees; expected 0, 90, 180 or 270"):
        Videos(tmp_path).read(0, [0])


ORDERS = {  # file, codec, container, options: packets that do not say which frames there are, in which order
    "mpeg4.avi": ("mpeg4", "avi", {"g": "12", "bf": "2"}),
    "h264.avi": ("libx264", "avi", {"g": "12", "bf": "3"}),
    "raw.mp4": ("libx264", "h264", {"g": "12", "bf": "3"}),
    "mpeg.mp4": ("mpeg2video", "mpeg", {"g": "12", "bf": "2"}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_frames_come_in_the_decoders_order_where_no_time_of_showing_is_stored(tmp_path, name):
    codec, container, options = ORDERS[name]
    with av.open(str(tmp_path / name), "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = SIZE
        for number in range(50):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), "rgb24")))
        out.mux(stream.encode())
    source = Videos(tmp_path)
    assert source.lengths.tolist() == [50] and source.fps.tolist() == [25]
    for order in (range(50), np.random.default_rng(0).permutation(50)):
        assert [numbers(source.read(0, [i])["frames"])[0] for i in order] == list(order)


def test_an_mp4_that_has_lost_its_order_is_read_in_the_decoders(tmp_path):
    write_video(tmp_path / "b.mkv", options={"g": "12", "bf": "3"})
    with av.open(str(tmp_path / "b.mkv")) as file, av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for number, packet in enumerate(p for p in file.demux(video=0) if p.size):
            packet.pts = packet.dts = round(number / 30 / packet.time_base)
            packet.stream = stream
            out.mux(packet)
    (tmp_path / "b.mkv").unlink()
    source = Videos(tmp_path)
    assert numbers(source.read(0, range(50))["frames"]) == list(range(50))
    assert numbers(source.read(0, [40, 3])["frames"]) == [40, 3]


@pytest.mark.parametrize(
    ("name", "codec", "first"), [("a.mp4", "libx264", 12), ("a.mkv", "libvpx-vp9", 12), ("b.mp4", "mpeg4", 12)]
)
def test_a_recording_that_begins_between_key_frames_has_the_frames_that_can_be_decoded(tmp_path, name, codec, first):
    write_video(tmp_path / name, codec, options={"g": "12", "bf": "0", "sc_threshold": "0"}, lost=5)
    source = Videos(tmp_path)
    assert source.lengths.tolist() == [50 - first]
    assert numbers(source.read(0, range(50 - first))["frames"]) == list(range(first, 50))
    assert numbers(source.read(0, [30, 0, 7])["frames"]) == [first + 30, first, first + 7]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_a_last_picture_that_stays_does_not_change_the_rate_and_is_not_cut_off(tmp_path, name):
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    write_video(tmp_path / "b.mkv", codec, fps=10, num_frames=30, options={"bf": "0"})
    with av.open(str(tmp_path / "b.mkv")) as file, av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        packets = [packet for packet in file.demux(video=0) if packet.size]
        packets[-1].duration = round(10 / packets[-1].time_base)
        for packet in packets:
            packet.stream = stream
            out.mux(packet)
    (tmp_path / "b.mkv").unlink()
    source = Videos(tmp_path)
    assert source.lengths.tolist() == [30] and source.fps.tolist() == pytest.approx([10])
    assert numbers(source.read(0, [0, 15, 29])["frames"]) == [0, 15, 29]


def test_the_rate_of_a_webm_is_that_of_its_times_whatever_its_header_says(tmp_path):
    times = np.concatenate([[0], np.random.default_rng(0).choice([0.02, 0.033, 0.05, 0.1], 59).cumsum()])
    path = write_video(tmp_path / "a.webm", "libvpx", num_frames=60, times=times)
    for length in (None, 2**27):  # without, and with a wrong duration of frames
        data, at = bytearray(path.read_bytes()), path.read_bytes().find(b"\x23\xe3\x83")
        if at > 0 and length is None:
            size = 4 + (data[at + 3] & 0x7F)
            data[at : at + size] = bytes([0xEC, 0x80 | (size - 2)]) + bytes(size - 2)
        path.write_bytes(data)
        source = Videos(tmp_path)
        assert source.fps.tolist() == pytest.approx([59 / times[-1]], rel=1e-3) and source.lengths.tolist() == [60]


def test_frames_whose_times_only_tremble_come_one_after_another(tmp_path):
    times = np.arange(40) / 30 + np.random.default_rng(0).uniform(-0.012, 0.012, 40) + 0.02
    write_video(tmp_path / "a.mp4", num_frames=40, times=times)
    source = Videos(tmp_path)
    assert source.lengths.tolist() == [40]
    assert numbers(source.read(0, range(40))["frames"]) == list(range(40))


def test_a_file_whose_pictures_change_their_size_is_named(tmp_path):
    parts = [
        write_video(tmp_path / f"{i}.webm", "libvpx", num_frames=20, size=s) for i, s in enumerate((SIZE, (32, 32)))
    ]
    with (
        av.open(str(parts[0])) as first,
        av.open(str(parts[1])) as second,
        av.open(str(tmp_path / "a.webm"), "w") as out,
    ):
        stream = out.add_stream_from_template(first.streams.video[0])
        for number, packet in enumerate(p for file in (first, second) for p in file.demux(video=0) if p.size):
            packet.pts = packet.dts = round(number / 30 / packet.time_base)
            packet.stream = stream
            out.mux(packet)
    for path in parts:
        path.unlink()
    source = Videos(tmp_path)
    assert numbers(source.read(0, [19, 2])["frames"]) == [19, 2]
    for indices in ([25], [3, 25]):
        with pytest.raises(ValueError, match=r"a.webm: .* change their size: frame 25 has 32 x 32 .* expected 64 x 48"):
            source.read(0, indices)


def test_a_frame_that_no_seek_leads_to_is_decoded_from_the_start(tmp_path, caplog):
    reader = VideoReader(write_video(tmp_path / "a.mp4", options={"g": "12"}))
    reader._packets_from = lambda key: iter(())  # as if a seek led to the end
    with caplog.at_level(logging.INFO):
        assert [numbers(reader.numbered(np.array([i])))[0] for i in (40, 3, 4, 30)] == [40, 3, 4, 30]
    assert "a.mp4: frame 40 is decoded from the start" in caplog.text


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("colorspace", [1, 2, 5])  # BT.709, unknown, BT.601
def test_colours_are_those_that_were_encoded(tmp_path, pix_fmt, colorspace):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(tmp_path / "colours.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, pix_fmt
        stream.codec_context.colorspace = colorspace
        frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), "rgb24").reformat(
            format=pix_fmt, dst_colorspace=colorspace, dst_color_range=2 if pix_fmt == "yuvj420p" else 1
        )
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    frame = VideoReader(tmp_path / "colours.mp4").frames([0.0])[0].permute(1, 2, 0).numpy()
    assert np.abs(frame.astype(int) - image).mean() < 6


def test_times_outside_a_video_are_refused(tmp_path):
    reader = VideoReader(write_video(tmp_path / "short.mp4"))
    for time in (-0.1, 1.8):
        with pytest.raises(ValueError, match="short.mp4: no frames at .* it lasts from 0.000 to 1.633 s"):
            reader.frames([0.5, time])


def test_a_folder_is_searched_and_every_file_is_an_episode(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    write_video(tmp_path / "b.webm", "libvpx-vp9", fps=10, num_frames=20)
    write_video(tmp_path / "a" / "deep" / "z.MP4", fps=30)
    (tmp_path / "a" / "deep" / "z.txt").write_text("open the door\n")
    (tmp_path / "a" / "._z.mp4").write_bytes(b"what a Mac leaves behind")
    source = open_source(f"videos:{tmp_path}")
    assert source.name == f"videos-{tmp_path.name}"
    assert [path.name for path in source.paths] == ["z.MP4", "b.webm"]
    assert source.lengths.tolist() == [50, 20] and source.fps.tolist() == [30, 10]
    assert [source.instructions(e, [3])[0] for e in (0, 1)] == ["open the door", ""]
    assert (source.action_dim, source.state_dim, source.num_skipped) == (0, 0, 0)

    clips = Clips(source, [0, 1], (0.0, 0.5), image_size=64)
    assert len(clips) == 35 + 15
    for i in (0, 34, 35, 49):
        sample = clips[i]
        start = i if i < 35 else i - 35
        inside = sample["frames"][:, :, 8:56]  # 64 x 48 pixels between black bars
        assert numbers(inside) == [start, start + (15 if i < 35 else 5)]


def test_a_crop_shows_the_middle_without_bars_wherever_frames_are_made_square(tmp_path):
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mp4", size=SIZE[::-1])
    whole, source = open_source(f"videos:{tmp_path}"), open_source(f"videos:{tmp_path}?crop=center")
    assert source.fingerprint != whole.fingerprint
    middles = [whole.read(0, [9, 30])["frames"][..., 8:56], whole.read(1, [9, 30])["frames"][..., 8:56, :]]
    for episode, middle in enumerate(middles):
        sample = Clips(source, [episode], (0.0, 0.7), image_size=48, input_size=24)[9]
        assert torch.equal(sample["frames"], middle)
        assert torch.equal(sample["images"], fit(middle[:1], 24))
    shards.main(shards.Args(tmp_path / "shards", data=(source.uri,), codec="png"))
    written = open_source(f"shards:{tmp_path / 'shards'}")
    assert torch.equal(written.read(0, [9, 30])["frames"], middles[0]) and not written.crop
    cropped = open_source(f"shards:{tmp_path / 'shards'}?crop=center")  # an encoded source
    assert torch.equal(Clips(cropped, [1], (0.0, 0.7), image_size=48)[9]["frames"], middles[1])
    with pytest.raises(ValueError, match="expected crop of type center, got 'left'"):
        open_source(f"videos:{tmp_path}?crop=left")


def test_files_that_are_no_videos_are_counted_by_their_suffixes(tmp_path, caplog):
    write_video(tmp_path / "a.mp4")
    for name in ("a.txt", "b.txt", "c.jpg", "d.JPG", "readme"):
        (tmp_path / name).touch()
    for _ in range(2):
        Videos(tmp_path)
    expected = f"videos:{tmp_path}: left out 4 files that are no videos by their names: 2 .jpg, 1 .txt, 1 readme"
    assert len(caplog.messages) == 1 and sorted(caplog.messages[0].split(", ")) == sorted(expected.split(", "))


TABLE = {  # the same clips
    "csv": 'file,start,end,text,mark\na.mp4,0.5,1.0,wave,x\ndeep/b.webm,0:00:00.4,,,\na.mp4,,,"open, slowly",\n',
    "tsv": "file\tstart\tend\ttext\na.mp4\t0.5\t1.0\twave\ndeep/b.webm\t0.4\t\t\na.mp4\t\t\topen, slowly\n",
    "jsonl": '{"file": "a.mp4", "start": 0.5, "end": "1.0", "text": "wave"}\n'
    '{"file": "deep/b.webm", "start": 0.4, "text": ""}\n\n{"file": "a.mp4", "text": "open, slowly"}\n',
}


@pytest.mark.parametrize("kind", TABLE)
def test_the_rows_of_a_table_are_the_episodes(tmp_path, kind):
    (tmp_path / "deep").mkdir()
    write_video(tmp_path / "a.mp4", fps=30)
    write_video(tmp_path / "deep" / "b.webm", "libvpx-vp9", fps=10, num_frames=20)
    (tmp_path / f"clips.{kind}").write_text(TABLE[kind])
    source = open_source(f"videos:{tmp_path}?table=clips.{kind}")
    assert source.lengths.tolist() == [15, 16, 50] and source.fps.tolist() == [30, 10, 30]
    assert [source.instructions(episode, [0])[0] for episode in range(3)] == ["wave", "", "open, slowly"]
    assert numbers(source.read(0, [14, 0, 7])["frames"]) == [29, 15, 22]
    assert numbers(source.read(1, [0, 15])["frames"]) == [4, 19]
    assert numbers(source.read(2, [49, 3])["frames"]) == [49, 3]
    assert source.place(1) == f"{tmp_path}/deep/b.webm, {tmp_path}/clips.{kind}, row 2"
    with pytest.raises(ValueError, match="a.mp4: expected frame numbers below 15, got 15"):
        source.read(0, [15])
    assert len(Clips(source, range(3), (0.0, 0.2), 32)) == 9 + 14 + 44
    later = TABLE[kind].replace("0.5", "0.6").replace("1.0", "1.1")
    (tmp_path / f"clips.{kind}").write_text(later)
    moved = open_source(f"videos:{tmp_path}?table={tmp_path}/clips.{kind}")
    assert moved.lengths.tolist() == source.lengths.tolist() and moved.fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b.mp4,0,1,", "clips.csv, row 2: .*b.mp4: not a readable video: .*No such file"),
        ("a.mp4,1,1,", "clips.csv, row 2: expected 0 <= start < end .*, got start=1 and end=1"),
        ("a.mp4,soon,1,", "clips.csv, row 2: expected start in seconds, such as 12.5, got 'soon'"),
        ("a.mp4,0,1.8,", r"clips.csv, row 2: .*a.mp4 lasts 1.667 s, got 0 to 1.8 s"),
        ("a.mp4,1.7,,", r"clips.csv, row 2: .*a.mp4 lasts 1.667 s, got 1.7 to inf s"),
    ],
)
def test_a_row_that_no_file_can_show_is_named(tmp_path, row, message):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "clips.csv").write_text(f"file,start,end,text\na.mp4,0,1,\n{row}\n")
    with pytest.raises(ValueError, match=message):
        Videos(tmp_path, table="clips.csv")
    is_read = "lasts" in message or "video" in message
    if is_read:
        source = Videos(tmp_path, table="clips.csv", skip_broken=True)
        assert source.num_skipped == 1 and source.lengths.tolist() == [30]
    with pytest.raises(ValueError, match="other.csv: not a readable table in CSV, TSV or JSONL"):
        Videos(tmp_path, table="other.csv")
    (tmp_path / "clips.csv").write_text("path,start\na.mp4,0\n")
    with pytest.raises(ValueError, match="row 1: expected file and, where known, start, end and text, got path, start"):
        Videos(tmp_path, table="clips.csv")


def test_folders_behind_links_are_searched_once_each(tmp_path):
    (tmp_path / "far").mkdir()
    write_video(tmp_path / "far" / "a.mp4")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "near")
    assert [path.name for path in Videos(tmp_path / "near").paths] == ["a.mp4"]


def test_an_instruction_is_utf_8_with_or_without_a_mark_or_an_error_that_names_its_file(tmp_path):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes("\ufefföffne\r\n".encode())
    assert Videos(tmp_path).instructions(0, [0])[0] == "öffne"
    (tmp_path / "a.txt").write_bytes("öffne".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt: expected a text in UTF-8"):
        Videos(tmp_path)


def test_sound_that_outlasts_the_pictures_is_no_fault(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        video, sound = out.add_stream("libx264", rate=10), out.add_stream("aac", rate=8000)
        video.width, video.height = SIZE
        for number in range(20):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(number), "rgb24")))
        out.mux(video.encode())
        for i in range(24):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
            frame.rate, frame.pts = 8000, 1024 * i
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    assert Videos(tmp_path).lengths.tolist() == [20]
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ValueError, match="a.mkv"):
        Videos(tmp_path)


def test_sources_of_one_name_are_told_apart_by_what_distinguishes_them(tmp_path):
    for folder in ("alice/videos", "bob/videos"):
        (tmp_path / folder).mkdir(parents=True)
        write_video(tmp_path / folder / "a.mp4")
    uris = [f"videos:{tmp_path}/{owner}/videos" for owner in ("alice", "bob")]
    for order in (uris, uris[::-1]):
        names = {source.uri: source.name for source in open_sources(order, False, 0)[0]}
        assert names == {uris[0]: "videos-videos-alice", uris[1]: "videos-videos-bob"}
    mixture = Mixture([Clips(source, [0], (0.0, 0.5), 32) for source in open_sources(uris, False, 0)[0]])
    assert {mixture[i]["dataset"] for i in range(8)} == {"videos-videos-alice", "videos-videos-bob"}
    worlds = [f"world:clean?episodes=2&seed={seed}" for seed in (1, 2, 2)]
    names = [source.name for source in open_sources(worlds, False, 0)[0]]
    assert names == ["world-clean-seed-1", "world-clean-seed-2", "world-clean-seed-2-2"]
    repos = [SimpleNamespace(uri=f"lerobot:{owner}/pick", name="lerobot-pick") for owner in ("alice", "bob")]
    assert [source.name for source in named_apart(repos)] == ["lerobot-pick-alice", "lerobot-pick-bob"]


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match=".mp4, .m4v"):
        Videos(tmp_path)


def test_the_fingerprint_is_of_the_files_and_not_of_the_place(tmp_path):
    (tmp_path / "one").mkdir()
    write_video(tmp_path / "one" / "a.mp4")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert Videos(tmp_path / "one").fingerprint == Videos(tmp_path / "two").fingerprint
    write_video(tmp_path / "two" / "a.mp4", num_frames=49)
    assert Videos(tmp_path / "one").fingerprint != Videos(tmp_path / "two").fingerprint
    data = bytearray((tmp_path / "one" / "a.mp4").read_bytes())
    data[data.index(b"mdat") + 400] ^= 1  # of equal size
    (tmp_path / "two" / "a.mp4").write_bytes(data)
    assert Videos(tmp_path / "one").fingerprint != Videos(tmp_path / "two").fingerprint


def broken_files(folder):
    write_video(folder / "good.mp4")
    write_video(folder / "front.mp4", container={"movflags": "faststart"}, options={"qp": "0"})
    write_video(folder / "back.mp4")
    write_video(folder / "web.webm", "libvpx-vp9", num_frames=200, options={"g": "16"})
    for name, share in [("front.mp4", 0.6), ("back.mp4", 0.6), ("web.webm", 0.5)]:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])
    (folder / "empty.mp4").touch()
    (folder / "letter.mov").write_text("Dear reader, this is no video. " * 100)
    with av.open(str(folder / "song.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return {"front.mp4", "back.mp4", "web.webm", "empty.mp4", "letter.mov", "song.mp4"}


def test_broken_files_are_errors_that_name_them_or_are_skipped_and_counted(tmp_path, caplog):
    broken = broken_files(tmp_path)
    for name in broken:
        with pytest.raises(ValueError, match=name):
            probe(tmp_path / name)
    with pytest.raises(ValueError, match="6 of 7 files cannot be read, first: .*/back.mp4"):
        Videos(tmp_path)
    with caplog.at_level(logging.WARNING):
        source = Videos(tmp_path, skip_broken=True)
    assert [path.name for path in source.paths] == ["good.mp4"] and source.num_skipped == len(broken)
    assert all(name in caplog.text for name in broken)
    (tmp_path / "good.mp4").unlink()
    with pytest.raises(ValueError, match="/back.mp4"):
        Videos(tmp_path, skip_broken=True)


def test_a_file_too_coarse_or_too_short_is_left_out_by_its_path_and_counted(tmp_path, caplog):
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", fps=30, num_frames=60)
    write_video(tmp_path / "timelapse.mp4", fps=2, num_frames=20)
    assert len(Clips(Videos(tmp_path), range(4), (0.0, 0.2), 32)) == 162
    (message,) = caplog.messages
    expected = f"1 of 4 episodes, first {tmp_path}/timelapse.mp4: delta=0.2 s is 0.40 frames at its 2 fps"
    assert message.startswith(f"videos:{tmp_path}: left out {expected}")
    write_video(tmp_path / "blink.mp4", fps=30, num_frames=4)
    write_video(tmp_path / "wink.mp4", fps=30, num_frames=3)
    source = Videos(tmp_path)
    clips = Clips(source, range(6), (0.0, 0.2), 32)
    places = {clips[i]["place"] for i in range(0, 162, 54)}
    assert len(clips) == 162 and places == {f"{tmp_path}/{number}.mp4" for number in range(3)}
    assert f"2 of 6 episodes, first {tmp_path}/blink.mp4: shorter than the 0.2 s of a clip" in caplog.messages[-1]
    odd = [i for i, path in enumerate(source.paths) if len(path.stem) > 1]
    with pytest.raises(ValueError, match=r"no clip is left: 1 of 3 episodes, first .*timelapse.mp4: .*blink.mp4"):
        Clips(source, odd, (0.0, 0.2), 32)
    for seed in range(8):  # one file is held out, which would be an odd one in half of the cases
        train, val = split_episodes(source, 0.1, seed)
        assert sorted([*train, *val]) == list(range(6))
        assert min(len(Clips(source, side, (0.0, 0.2), 32)) for side in (train, val)) >= 54


def test_a_file_that_breaks_after_the_index_was_made_is_named_and_never_replaced(tmp_path):
    path = write_video(tmp_path / "breaks.mp4", container={"movflags": "faststart"}, options={"qp": "0"})
    write_video(tmp_path / "good.mp4")
    clips = Clips(Videos(tmp_path), [0, 1], (0.0, 0.5), image_size=16)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"videos:{tmp_path}, episode 0: {path}"):
        clips.__getitems__([30, 60])
    assert clips[60]["episode"] == 1


def test_a_forked_worker_opens_its_own_files(tmp_path):
    write_video(tmp_path / "long.mp4", num_frames=200, options={"g": "10"})
    clips = Clips(Videos(tmp_path), [0], (0.0, 0.1), image_size=64)
    assert numbers(clips[0]["frames"][:, :, 8:56]) == [0, 3]  # open in this process before the fork
    loader = DataLoader(clips, batch_size=16, num_workers=2, multiprocessing_context="fork", collate_fn=list)
    samples = [sample for batch in loader for sample in batch]
    assert [numbers(s["frames"][:, :, 8:56]) for s in samples] == [[i, i + 3] for i in range(197)]
    assert numbers(open_video(tmp_path / "long.mp4").frames([1.0])) == [30]
