"""Strategies on the built-in world, whose right answers an oracle knows: a LAQ whose code is the way of the tip."""

from collections import Counter
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from torch import nn

from hlrp import strategies
from hlrp.clips import Clips
from hlrp.data import collate
from hlrp.strategies import STRATEGIES, BucketSamples, Latents, Skip, encoded
from hlrp.world import IMAGE_SIZE, World, moved, picture, pushed, simulate

SPAN = 8.0  # the longest way in Δ [pixel]
BINS = torch.linspace(-0.6, 0.6, 4)  # of an axis: 5 codes
EPISODES = 50


class Oracle(nn.Module):
    """Knows the tip in each frame of its worlds. Two tokens: how far it moves right, and down, over SPAN."""

    def __init__(self, worlds: list[World], target: str = "pixels", is_continuous: bool = False):
        super().__init__()
        self.config = SimpleNamespace(delta=0.2, quantizer="fsq", num_tokens=2)
        self.quantizer = SimpleNamespace(codebook_size=5)
        self.weights, self.is_continuous = {target: 1.0}, is_continuous
        self.unused = nn.Parameter(torch.zeros(()))
        self.scenes = {}  # a frame's bytes -> group, place in it, embodiment, tip, blocks
        for world in worlds:
            for episode in range(EPISODES):
                frames = range(world.lengths[episode])
                read, scene, i = world.read(episode, frames), *self.scene(episode)
                embodiment = ("arm", "hand")[read["embodiment"]]
                for t, frame in zip(frames, read["frames"], strict=True):
                    self.scenes[key(frame)] = (episode, embodiment, scene.tip[i, t], scene.blocks[i, t])

    def scene(self, episode: int):
        return simulate(0, 0), episode

    def encode(self, frames):
        ways = [torch.from_numpy(self.scenes[key(b)][2] - self.scenes[key(a)][2]) / SPAN for a, b in frames.cpu()]
        codes = torch.stack(ways)[..., None]  # b xy 1
        return codes, None if self.is_continuous else torch.bucketize(codes[..., 0], BINS)

    def picture(self, first, code):
        """The frame after the tip has gone on by a code."""
        episode, embodiment, tip, blocks = self.scenes[key(first)]
        tip = moved(tip, SPAN * code[:, 0].numpy()).astype("float32")
        blocks = pushed(tip[None], blocks[None])[0].astype("float32")
        scene, i = self.scene(episode)
        frame = picture(scene, i, embodiment, tip[None], blocks[None])[0]
        self.scenes.setdefault(key(frame), (episode, embodiment, tip, blocks))
        return frame / 255

    def decode(self, first, codes, task, second):
        assert not self.training
        if "pixels" in self.weights:
            return {"pixels": torch.stack([self.picture(*x) for x in zip(first, codes, strict=True)])}
        flow = SPAN * codes[..., 0, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
        return dict.fromkeys(self.weights, flow)

    def errors(self, frames, variants, task):
        seen = [self.decode(frames[:, 0], codes, task, None)["pixels"] for codes in variants]
        return [{"pixels": (x - frames[:, 1] / 255).square().flatten(1).mean(1)} for x in seen]


def key(frame) -> bytes:
    return frame.contiguous().numpy().tobytes()


def samples_of(*variants: str, num: int = 150) -> tuple[list[World], list[dict], torch.Tensor]:
    worlds, samples = [World(name, EPISODES) for name in variants], []
    for number, world in enumerate(worlds):
        clips = Clips(world, range(EPISODES), (0.0, 0.2), IMAGE_SIZE, number)
        picks = torch.randperm(len(clips), generator=torch.Generator().manual_seed(number))[:num]
        samples += clips.__getitems__(picks.tolist())
    return worlds, samples, torch.tensor([sample["source"] for sample in samples])


@pytest.fixture(scope="module")
def clean() -> BucketSamples:
    worlds, samples, source = samples_of("clean")
    oracle = Oracle(worlds).eval()
    return BucketSamples(oracle, lambda batch: encoded(oracle, batch), samples, source, seed=0)


def run(shown: BucketSamples, strategy: str, folder) -> tuple[dict, list, list]:
    """The figures of a strategy, and the sheets and charts that it drew."""
    sheets, saved = [], []
    with pytest.MonkeyPatch.context() as patch:
        real_sheet, real_save = strategies.sheet, strategies.save
        patch.setattr(strategies, "sheet", lambda *a, **o: (sheets.append(a[2]), real_sheet(*a, **o))[1])
        patch.setattr("hlrp.plots.sheet", lambda *a, **o: (sheets.append(a[2]), real_sheet(*a, **o))[1])
        patch.setattr(strategies, "save", lambda *a: (saved.append(a[0]), real_save(*a))[1])
        figures = STRATEGIES[strategy](shown, folder / "picture.png", "a title")
    assert matplotlib.image.imread(folder / "picture.png").ndim == 3
    return figures, sheets, saved


def distance(a, b) -> float:
    return float((a - b).abs().mean())


def test_a_reconstruction_is_the_second_frame_and_another_code_gives_another_one(clean, tmp_path):
    _, (rows,), _ = run(clean, "reconstructions", tmp_path)
    assert rows[0].labels == ["first frame", "0.2 s later", "decoded", "with another code", "|error| x 3"]
    errors = [(distance(row.pictures[2], row.pictures[1]), distance(row.pictures[3], row.pictures[1])) for row in rows]
    true, other = torch.tensor(errors).mean(0)
    assert true < 0.2 * other
    assert all(distance(row.pictures[0], row.pictures[1]) > 0.005 for row in rows)  # pairs that move
    assert "PSNR" in rows[0].caption and "world-clean, episode" in rows[0].caption


def test_predicted_latent_actions_stand_beside_the_true_ones(clean, tmp_path):
    codes, indices = clean.codes, clean.indices
    _, samples, source = samples_of("clean")
    still = Latents(torch.zeros_like(codes), torch.full_like(indices, 2), codes)
    shown = BucketSamples(clean.laq, lambda batch: still, samples, source, seed=0)
    _, (rows,), _ = run(shown, "reconstructions", tmp_path)
    assert rows[0].labels[2:4] == ["decoded, true code", "decoded, predicted"]
    for row in rows:
        assert distance(row.pictures[3], row.pictures[0]) < 0.002  # nothing moves, predicted
        assert distance(row.pictures[2], row.pictures[0]) > 0.003


def test_a_transferred_action_moves_the_other_tip_by_as_much(clean, tmp_path):
    figures, (rows,), _ = run(clean, "transfer", tmp_path)
    assert figures["cycle"] > 0.9
    for row in rows:
        first, second, _, there, applied, _ = row.pictures
        (*_, a, _), (*_, b, _), (*_, c, _), (*_, d, _) = (
            clean.laq.scenes[key((255 * x).round().byte())] for x in (first, second, there, applied)
        )
        expected = torch.from_numpy(moved(c, b - a))
        torch.testing.assert_close(torch.from_numpy(d), expected.float(), atol=1e-3, rtol=0)


def test_permuted_latent_actions_cost_much_and_a_decoder_that_ignores_them_shows_it(clean, tmp_path, monkeypatch):
    figures, (rows,), _ = run(clean, "permuted", tmp_path)
    assert figures["over_true"] > 3
    assert len(rows[0].labels) == 7
    monkeypatch.setattr(type(clean.laq), "picture", lambda self, first, code: first / 255)
    figures, _, _ = run(clean, "permuted", tmp_path)
    assert figures["over_true"] == 1


def test_one_code_on_many_frames_moves_every_tip_by_as_much(clean, tmp_path):
    _, (rows,), _ = run(clean, "one-code", tmp_path)
    anchors = rows[0].pictures[2:]
    assert len(anchors) == 6 and len(rows) == 7
    for row, i in zip(rows[1:], clean.rows, strict=True):
        for anchor, applied in zip(anchors, row.pictures[2:], strict=True):
            expected = clean.laq.picture((255 * anchor).round().byte(), clean.codes[i])
            assert distance(applied, expected) < 1e-6


def test_many_codes_on_one_frame_differ_unless_the_decoder_ignores_them(clean, tmp_path, monkeypatch):
    figures, (rows,), _ = run(clean, "many-codes", tmp_path)
    assert figures["spread"] > 0.5
    labels = [label for row in rows[::2] for label in row.labels[1:]]
    assert len({*labels}) == len(labels) > 8
    monkeypatch.setattr(type(clean.laq), "picture", lambda self, first, code: first / 255)
    assert run(clean, "many-codes", tmp_path)[0]["spread"] == 0


def test_usage_and_sequences_are_counted(clean, tmp_path):
    counted = Counter(map(tuple, clean.indices.tolist()))
    _, _, (figure,) = run(clean, "usage", tmp_path)
    values = torch.tensor(figure.axes[0].patches[0].get_data().values)
    expected = clean.indices[:, 0].bincount(minlength=5) / len(clean.indices)
    torch.testing.assert_close(values.float(), expected)

    figures, _, (figure,) = run(clean, "sequences", tmp_path)
    assert figures["different"] == len(counted)
    assert figures["most_frequent"] == pytest.approx(max(counted.values()) / len(clean.indices))
    assert [int(bar.get_height()) for bar in figure.axes[0].patches][:3] == sorted(counted.values())[::-1][:3]


def test_examples_of_a_sequence_all_have_it(clean, tmp_path):
    _, (rows,), _ = run(clean, "examples", tmp_path)
    assert len(rows) == 6
    for row in rows:
        pairs = torch.stack([*row.pictures]).unflatten(0, (-1, 2))
        _, indices = clean.laq.encode(pairs)
        assert len(indices) > 1 and (indices == indices[0]).all()
        assert " ".join(map(str, indices[0].tolist())) in row.caption


def test_the_map_of_latent_actions_that_are_ways_is_a_plane_of_actions(clean, tmp_path):
    _, _, (figure,) = run(clean, "embedding", tmp_path)
    shown = torch.as_tensor(figure.axes[0].collections[0].get_offsets()).double()
    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))
    far = torch.stack([torch.pdist(shown), torch.pdist(clean.action[order])])
    assert torch.corrcoef(far)[0, 1] > 0.97


def test_codes_explain_actions_and_not_states(clean, tmp_path):
    of_actions, _, (figure,) = run(clean, "actions", tmp_path)
    of_states, _, _ = run(clean, "states", tmp_path)
    assert of_actions["explained"] > 0.8
    assert of_states["explained"] < 0.35
    assert "world-clean" in figure.axes[0].get_title()


def test_the_compass_points_where_the_tip_goes_also_under_a_moving_camera(clean, tmp_path):
    figures, _, (figure,) = run(clean, "compass", tmp_path)
    assert figures["explained"] > 0.35

    def arrows(figure) -> dict[str, torch.Tensor]:
        """Where the arrows of the four panels end: raw and centred, tokens 0 and 1."""
        return {
            axes.get_title(): {
                text.get_text(): torch.tensor(text.get_position()) for text in axes.texts if text.get_text()
            }
            for axes in figure.axes
        }

    still = arrows(figure)
    assert still["token 0, raw"]["0"][0] < 0 < still["token 0, raw"]["4"][0]  # left, right
    assert still["token 1, raw"]["0"][1] > 0 > still["token 1, raw"]["4"][1]  # up, down

    _, samples, source = samples_of("clean")
    batch = collate(samples)
    moving = [
        sample | {"frames": torch.stack([sample["frames"][0], sample["frames"][1].roll(3, dims=-1)])}
        for sample in samples
    ]
    latents = encoded(clean.laq, batch)
    shown = BucketSamples(clean.laq, lambda batch: latents, moving, source, seed=0)
    _, _, (figure,) = run(shown, "compass", tmp_path)
    shaken = arrows(figure)
    assert all(place[0] > 0 for place in shaken["token 0, raw"].values())  # all to the right
    assert shaken["token 0, centred"]["0"][0] < 0 < shaken["token 0, centred"]["4"][0]


def test_two_embodiments_with_the_same_actions_use_the_same_codes(tmp_path):
    worlds, samples, source = samples_of("arm", "hand")
    oracle = Oracle(worlds).eval()
    shown = BucketSamples(oracle, lambda batch: encoded(oracle, batch), samples, source, seed=0)
    figures, _, (figure,) = run(shown, "sources", tmp_path)
    assert figures["apart"] < 0.2
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["world-arm", "world-hand"]
    figures, _, _ = run(shown, "compass", tmp_path)
    assert figures["consistency"] > 0.5
    _, (rows,), _ = run(shown, "transfer", tmp_path)
    assert all(("world-arm" in end) != ("world-arm" in start) for start, end in (r.caption.split("->") for r in rows))

    of_source = source[:, None].repeat(1, 2)
    shown.indices = of_source
    assert run(shown, "sources", tmp_path)[0]["apart"] == 1


def test_a_source_heat_map_of_a_large_codebook_is_no_larger_than_a_screen_or_two(clean, tmp_path):
    worlds, samples, source = samples_of("arm", "hand", num=20)
    oracle = Oracle(worlds).eval()
    oracle.quantizer.codebook_size = 8192
    shown = BucketSamples(oracle, lambda batch: encoded(oracle, batch), samples, source, seed=0)
    assert 0 <= run(shown, "sources", tmp_path)[0]["apart"] <= 1
    assert max(matplotlib.image.imread(tmp_path / "picture.png").shape) < 2000


def skipped(shown: BucketSamples, strategy: str, tmp_path) -> str:
    with pytest.raises(Skip) as reason:
        STRATEGIES[strategy](shown, tmp_path / "picture.png", "")
    assert not [*tmp_path.iterdir()]
    return str(reason.value)


def test_what_cannot_be_shown_is_skipped_with_its_reason(clean, tmp_path):
    assert skipped(clean, "sources", tmp_path) == "its samples are all of one data set"
    worlds, samples, source = samples_of("human", num=40)

    def shown_by(oracle: Oracle, some: list[dict]) -> BucketSamples:
        return BucketSamples(oracle.eval(), lambda batch: encoded(oracle, batch), some, source[: len(some)], seed=0)

    no_actions = shown_by(Oracle(worlds), samples)
    assert skipped(no_actions, "actions", tmp_path) == "its samples have no actions"
    assert skipped(no_actions, "states", tmp_path) == "its samples have no states"
    continuous = shown_by(Oracle(worlds, is_continuous=True), samples)
    for strategy in ("usage", "sequences", "examples", "sources"):
        assert skipped(continuous, strategy, tmp_path) == "latent actions are continuous, there are no codes"
    features = shown_by(Oracle(worlds, target="features"), samples)
    for strategy in ("reconstructions", "transfer", "one-code", "many-codes"):
        assert skipped(features, strategy, tmp_path) == "the LAQ decodes features, neither pixels nor flow"
    one = shown_by(Oracle(worlds), samples[:1])
    assert skipped(one, "permuted", tmp_path) == "it has one sample"
    assert skipped(one, "transfer", tmp_path) == "its samples are all of one episode"
    assert skipped(one, "embedding", tmp_path) == "it has 1 samples, fewer than 3"
    assert skipped(one, "examples", tmp_path) == "no sequence of codes occurs twice"
    assert skipped(one, "compass", tmp_path) == "no code occurs 3 times"


def test_optical_flow_stands_for_pixels_where_a_laq_decodes_none(tmp_path):
    worlds, samples, source = samples_of("clean", num=60)
    oracle = Oracle(worlds, target="flow", is_continuous=True).eval()
    shown = BucketSamples(oracle, lambda batch: encoded(oracle, batch), samples, source, seed=0)
    _, (rows,), _ = run(shown, "reconstructions", tmp_path)
    assert rows[0].labels[-1] == "|change| x 3"
    for strategy in ("transfer", "one-code", "many-codes", "actions", "compass"):  # k-means makes groups of ways
        run(shown, strategy, tmp_path)
    assert run(shown, "actions", tmp_path)[0]["explained"] > 0.5
