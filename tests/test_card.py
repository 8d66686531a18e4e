from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hlrp.card import (
    BOTH,
    CEILING,
    CHANGE,
    OBSERVATION,
    RANDOM,
    Pairs,
    Z,
    dependence,
    episode_identity,
    few_shots,
    health,
    information,
    leakage,
    ratio_of_transfer,
    transfer,
)
from hlrp.card_plots import neighbours, transfer_matrix
from hlrp.card_verdict import of_few_shots, passed, verdict, worth
from hlrp.laq import LatentActions
from hlrp.laq_validation import algebra
from hlrp.metrics import episode_split

SIZE = {"pairs": 800, "health": {"dims": 2, "effective_dims": 2.0}}


@pytest.fixture(scope="module")
def pairs():
    """Actions that frames say nothing of, and a ball whose motion is no action; 80 episodes of ten pairs."""
    generator = torch.Generator().manual_seed(0)
    episodes = torch.arange(80).repeat_interleave(10)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    frames = torch.randint(0, 256, (2, 800, 3, 8, 8), generator=generator, dtype=torch.uint8)
    ball, constant = random(800, 2), torch.ones(800, 1, dtype=torch.float64)
    return Pairs(
        episodes,
        episode_split(episodes, 0.6, seed=0),
        *frames,
        torch.cat([random(800, 2), constant], dim=1),
        {"motion of ball": ball, "always the same": constant},
        episodes % 2,
        {},
        tasks=[f"task {episode % 4}" for episode in episodes.tolist()],
    )


def judged(pairs, z, **others):
    card, _ = information(pairs, {Z: z, **others}, {"first": [0], "constant": [2]}, seed=0)
    return card, verdict("toy", SIZE | {"information": card})


def test_the_true_action_scores_above_99_percent_and_passes(pairs):
    card, lines = judged(pairs, 100 * pairs.actions + 7)
    for probe in ("ridge", "mlp"):
        found = card["probes"][Z][probe]
        assert found["r2"] > 0.99 and found["error"] < 0.01
        assert found["r2_per_dim"][2] is None
        assert found["interval"][0] <= found["r2"] <= found["interval"][1]
    assert card["constant_dims"] == 1 and [*card["probes"][Z]["ridge"]["groups"]] == ["first"]
    assert card["gains"][OBSERVATION]["interval"][0] > 0.9 and card["gains"]["increment"]["r2"] > 0.9
    assert passed(lines)


def test_few_demonstrations_of_each_task_tell_the_actions_from_latents_that_hold_them(pairs):
    """Four tasks: one demonstration each is 40 pairs. Frames and random vectors say nothing."""
    random = torch.randn(800, 2, generator=torch.Generator().manual_seed(1))
    figures = few_shots(pairs, {Z: pairs.actions[:, :2].float(), RANDOM: random}, seed=0)
    assert [*figures] == [1, 5]
    for count, least in {1: 0.3, 5: 0.75}.items():
        assert figures[count][Z]["r2"] > least and figures[count]["true action"]["r2"] > least
        assert max(figures[count][name]["r2"] for name in (OBSERVATION, RANDOM, CHANGE)) < 0.1
    few = pairs._replace(tasks=[f"task {episode}" for episode in pairs.episodes.tolist()])
    assert [*few_shots(few, {Z: random}, seed=0)] == [1]  # a task with one episode has no five


def test_the_verdict_compares_few_demonstrations_with_what_needs_no_learning():
    def level(z, change):
        values = {Z: z, CHANGE: change, OBSERVATION: 0.4}
        (line,) = of_few_shots({"few_shots": {1: {name: {"r2": r2} for name, r2 in values.items()}}})
        assert "From one demonstration of each task" in line.text
        return line.level

    assert [level(0.74, 0.65), level(0.67, 0.65), level(0.6, 0.65)] == ["good", "note", "alarm"]


def test_random_vectors_score_within_5_percent_of_0_and_are_called_useless(pairs):
    card, lines = judged(pairs, torch.randn(800, 16, generator=torch.Generator().manual_seed(1)))
    for probe in ("ridge", "mlp"):
        assert abs(card["probes"][Z][probe]["r2"]) < 0.05
    assert not passed(lines)
    assert "useless" in lines[0].text and "their mean with 0" in lines[0].text


def test_a_copy_of_the_observation_adds_nothing_beyond_the_observation_control(pairs):
    first = pairs.first.flatten(1).double() / 255
    tilted = pairs._replace(actions=first[:, :2] + 0.1 * pairs.actions[:, :2])  # which the frame does tell
    card, _ = information(tilted, {Z: first}, {}, seed=0)
    assert card["probes"][Z]["ridge"]["r2"] > 0.8
    assert abs(card["gains"]["increment"]["r2"]) < 0.02
    lines = verdict("toy", SIZE | {"information": card})
    assert any("add nothing: to the observation's R2" in line.text for line in lines if line.level == "fail")

    card, lines = judged(tilted, tilted.actions)
    assert card["gains"]["increment"]["r2"] > 0.1
    assert best(card, BOTH) > best(card, OBSERVATION)
    assert passed(lines)


def best(card, name):
    return max(probe["r2"] for probe in card["probes"][name].values())


@pytest.fixture(scope="module")
def expert():
    """Pairs of an expert whose action is told by the place of a dot, but for a sixth of its variance."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    episodes = torch.arange(120).repeat_interleave(8)
    place = 2 * torch.rand(960, 2, generator=generator, dtype=torch.float64) - 1
    action = 0.5 * torch.sin(3 * place) + 0.16 * random(960, 2)

    def frame(place):
        axis = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64)
        x, y = (torch.exp(-((axis - p[:, None]) ** 2) / 0.3) for p in place.unbind(1))
        picture = y[:, None, :, None] * x[:, None, None, :]
        return (255 * picture).expand(-1, 3, -1, -1).to(torch.uint8)

    first, second = frame(place), frame(place + 0.4 * action)
    split, facts = episode_split(episodes, 0.6, seed=0), {"state": place}
    return Pairs(episodes, split, first, second, action, facts, None, {}, state_change=0.4 * action)


def unlearned(pairs, seed, dim=2):
    """What a random network of one layer makes of both frames."""
    frames = torch.cat([pairs.first.flatten(1), pairs.second.flatten(1)], dim=1).float() / 255
    weight = torch.randn(frames.shape[1], dim, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(frames @ weight / frames.shape[1] ** 0.5)


def noisy(pairs, r2):
    """Actions with so much noise that they tell the true ones with `r2`."""
    noise = torch.randn(pairs.actions.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return pairs.actions + noise * pairs.actions.std(dim=0) * (1 / r2 - 1) ** 0.5


@pytest.mark.parametrize(
    ("latents", "word"),
    [
        (lambda pairs: pairs.actions, "good"),
        (lambda pairs: noisy(pairs, 0.9), "good"),
        (lambda pairs: noisy(pairs, 0.6), "weak"),
        (lambda pairs: noisy(pairs, 0.3), "weak"),
        (lambda pairs: unlearned(pairs, seed=0), "useless"),
        (lambda pairs: pairs.actions[torch.randperm(960, generator=torch.Generator().manual_seed(0))], "useless"),
        (lambda pairs: pairs.facts["state"], "useless"),
        (lambda pairs: torch.ones(960, 4), "useless"),
    ],
    ids=["true", "R2 .9", "R2 .6", "R2 .3", "random encoder", "shuffled", "state", "constant"],
)
def test_latents_of_known_worth_get_the_word_that_they_deserve_though_the_observation_foretells_an_expert(
    expert, latents, word, monkeypatch
):
    monkeypatch.setattr("hlrp.metrics.MLP_STEPS", 120)
    z = latents(expert).float()
    card, _ = information(expert, {Z: z, RANDOM: unlearned(expert, seed=9)}, {}, seed=0)
    assert 0.75 < best(card, OBSERVATION) < 0.9 and card["ceiling"]["name"] == CEILING
    assert worth(card) == word
    lines = verdict("toy", SIZE | {"information": card})
    assert passed(lines) == (word != "useless")
    assert any(f"latent actions are {word}" in line.text for line in lines)
    assert any(f"ceiling here is R2 {card['ceiling']['r2']:.2f}" in line.text for line in lines)


def test_a_model_no_better_than_an_unlearned_one_is_weak_where_it_adds_and_the_card_names_the_rival(pairs):
    noisy = pairs.actions + torch.randn(800, 3, generator=torch.Generator().manual_seed(2))
    card, lines = judged(pairs, noisy, **{RANDOM: noisy})
    assert card["probes"][Z]["ridge"]["r2"] > 0.3
    assert worth(card) == "weak" and passed(lines)
    assert any("no better than an encoder that has learned nothing" in line.text for line in lines)


def test_where_the_observation_foretells_everything_the_worth_is_unknown_and_nobody_fails(expert, monkeypatch):
    monkeypatch.setattr("hlrp.metrics.MLP_STEPS", 120)
    blind = expert._replace(actions=expert.facts["state"].sin(), state_change=None)
    card, _ = information(blind, {Z: blind.actions.float()}, {}, seed=0)
    assert card["share"] is None and worth(card) == "unknown" and card["ceiling"]["name"] in (OBSERVATION, CHANGE)
    lines = verdict("toy", SIZE | {"information": card})
    assert passed(lines) and "The observation alone foretells the actions" in lines[0].text


def test_a_change_described_in_as_many_numbers_excuses_what_z_leaks_and_a_copy_of_the_state_has_no_excuse(expert):
    copy = leakage(expert, {Z: expert.facts["state"].float()}, seed=0)["state"]
    assert copy[Z]["r2"] > 0.99 and copy[CHANGE]["r2"] < 0.7
    assert any("also tell the state" in line.text for line in verdict("toy", SIZE | {"leakage": {"state": copy}}))
    same = {Z: copy[CHANGE], CHANGE: copy[CHANGE]}
    assert not any("also tell" in line.text for line in verdict("toy", SIZE | {"leakage": {"state": same}}))


def test_leakage_is_what_z_tells_of_a_ball_and_the_true_action_does_not(pairs):
    ball = pairs.facts["motion of ball"]
    figures = leakage(pairs, {Z: torch.cat([pairs.actions, ball], dim=1)}, seed=0)
    assert [*figures] == ["motion of ball"]  # what never changes cannot leak
    assert figures["motion of ball"][Z]["r2"] > 0.99 and figures["motion of ball"]["true action"]["r2"] < 0.05
    (line,) = [x for x in verdict("toy", SIZE | {"leakage": figures}) if x.level == "alarm"]
    assert "also tell the motion of ball" in line.text
    assert leakage(pairs, {Z: pairs.actions}, seed=0)["motion of ball"][Z]["r2"] < 0.05


def test_episodes_are_told_apart_by_what_is_constant_in_them(pairs):
    code = torch.randn(80, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[pairs.episodes]
    figures = episode_identity(pairs, {Z: code})
    assert figures[Z] == 1 and figures["true action"] < 0.2 and figures["chance"] == pytest.approx(1 / 50)
    alone = pairs._replace(episodes=torch.arange(800))
    assert episode_identity(alone, {Z: code}) is None


def test_codes_depend_on_actions_beyond_their_null_where_they_are_read_off_them(pairs):
    codes = (pairs.actions[:, :2] > 0).long()
    figures = dependence(codes, pairs.actions, seed=0)
    assert figures["sequence"]["nmi"] > 0.4 > 0.1 > figures["sequence"]["null_95"]
    assert all(part["nmi"] > part["null_95"] for part in figures["positions"])
    random = torch.randint(0, 4, (800, 1), generator=torch.Generator().manual_seed(3))
    figures = dependence(random, pairs.actions, seed=0)
    assert figures["sequence"]["nmi"] < 2 * figures["sequence"]["null_95"]


def test_a_latent_action_that_means_the_opposite_elsewhere_does_not_transfer(pairs):
    sign = torch.where(pairs.embodiments == 0, 1.0, -1.0)[:, None]
    names = {0: "arm", 1: "hand"}
    same, opposite = (
        transfer(x, pairs.actions, pairs, pairs.embodiments, names, seed=0)
        for x in (pairs.actions, sign * pairs.actions)
    )
    assert ratio_of_transfer(same) > 0.99
    assert ratio_of_transfer(opposite) < -1
    assert [cell["r2"] > 0.99 for cell in opposite] == [True, False, False, True]
    assert ratio_of_transfer(same[:1]) is None


def test_the_matrix_of_transfer_shows_what_was_only_scored(tmp_path):
    cells = [{"fitted": "a", "scored": "a", "r2": 0.9}, {"fitted": "a", "scored": "b", "r2": 0.2}]
    axes = transfer_matrix(cells).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.20"]


def test_neighbours_are_of_other_episodes_each_of_its_own():
    vectors = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [1, 0.3], [-1, 0]])
    (near,) = neighbours(vectors, torch.tensor([0, 0, 1, 1, 2]), rows=[0], count=2)
    assert near == [2, 4]


def test_health_counts_the_dimensions_in_use_of_continuous_latents():
    x = torch.randn(500, 1, 6, generator=torch.Generator().manual_seed(0))
    x[..., 2:] = 0
    figures = health(LatentActions(x, None), None)
    assert figures["dims"] == 6 and figures["effective_dims"] == pytest.approx(2, abs=0.1)


def test_without_actions_the_verdict_says_that_it_is_silent_on_them():
    lines = verdict("toy", SIZE)
    assert passed(lines) and "has no actions" in lines[-1].text


def lines_of(**card) -> dict[str, list[str]]:
    """The verdict's sentences by level."""
    found = {"good": [], "alarm": [], "fail": [], "note": []}
    for level, text in verdict("toy", SIZE | card):
        found[level].append(text)
    return found


@pytest.mark.parametrize(
    ("shuffled", "true", "level", "words"),
    [
        (1.0, 0.5, "fail", "The decoder ignores the code"),
        (1.1, 0.5, "alarm", "makes little use of the code"),
        (3.0, 0.5, "good", "The decoder uses the code"),
        (3.0, 1.2, "fail", "no better than the first frame shown again"),
    ],
)
def test_the_verdict_on_the_decoder_follows_its_errors_with_true_and_others_codes(shuffled, true, level, words):
    use = {"true_over_copy": {"pixels": true}, "shuffled_over_true": {"pixels": shuffled}}
    assert any(words in text for text in lines_of(use=use)[level])


def test_a_collapsed_codebook_fails_and_a_camera_that_counts_as_an_action_is_an_alarm():
    collapsed = {"unique_sequences": 3, "possible_sequences": 800}
    assert "the codebook has collapsed" in lines_of(health=collapsed)["fail"][0]
    rule = {"true": 0.2, "shuffled": 1.0, "linear": 0.2, "linear_shuffled": 1.0}
    figures = {"zero_transition": 0.0, "camera_shift": 0.9, "reversal": rule, "additivity": None, "cycle": rule}
    found = lines_of(algebra=figures)
    assert not found["fail"] and len(found["good"]) == 3
    assert "only the camera moves" in found["alarm"][0]
    found = lines_of(algebra=figures | {"reversal": rule | {"linear": 1.0}})
    assert any("do not undo" in text for text in found["alarm"])


def square(place: torch.Tensor) -> torch.Tensor:
    """Frames (b, 3, 32, 32) with a bright square of 4 pixels at the places int (b, 2)."""
    frames = torch.full((len(place), 3, 32, 32), 20, dtype=torch.uint8)
    for frame, (x, y) in zip(frames, place.tolist(), strict=True):
        frame[:, y : y + 4, x : x + 4] = 200
    return frames


def found(frames: torch.Tensor) -> torch.Tensor:
    weight = (frames[..., 0, :, :].float() > 100).flatten(1).float()
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return torch.stack([weight @ x.flatten(), weight @ y.flatten()], dim=1) / 16


class Motion(nn.Module):
    """A LAQ whose latent action is the motion of the square, plus a constant; it decodes what it says, or does not."""

    def __init__(self, decodes: bool = True):
        super().__init__()
        self.decodes, self.weights = decodes, {"pixels": 1.0}
        self.config = SimpleNamespace(image_size=32)
        self.unused = nn.Parameter(torch.zeros(()))

    def label(self, frames):
        motion = found(frames[:, 1]) - found(frames[:, 0]) + 7
        return LatentActions(motion[:, None, None], motion[:, None].round().long())

    def encode(self, frames):
        return self.label(frames).vectors[:, 0], None

    def decode(self, first, codes, task, second):
        motion = codes[:, 0] - 7 if self.decodes else 0 * codes[:, 0]
        return {"pixels": square((found(first) - 1.5 + motion).round().long()).float() / 255}


@pytest.fixture
def triples():
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(10, 18, (60, 2), generator=generator)
    steps = torch.randint(-4, 5, (60, 2, 2), generator=generator)
    places = torch.cat([start[:, None], start[:, None] + steps.cumsum(1)], dim=1)
    frames = torch.stack([square(places[:, t]) for t in range(3)], dim=1)
    return frames, [""] * 60, torch.arange(60) // 2, torch.ones(60, dtype=torch.bool)


def test_true_motions_obey_every_rule_and_others_do_not(triples):
    figures = algebra(Motion(), *triples)
    assert figures["zero_transition"] == 0
    assert figures["crop"] == figures["brightness"] == 0
    assert figures["camera_shift"] == pytest.approx(1 / 3.5, abs=0.15)  # one pixel, where motions are of some
    for rule in ("reversal", "additivity", "cycle"):
        assert figures[rule]["true"] < 1e-6
        assert figures[rule]["shuffled"] > 0.5
    for rule in ("reversal", "additivity"):
        assert figures[rule]["linear"] < 1e-3 < 0.3 < figures[rule]["linear_shuffled"]
    assert figures["cycle_tokens"]["true"] == 1 > 0.5 > figures["cycle_tokens"]["shuffled"]


def test_a_decoder_that_shows_no_motion_breaks_the_cycle(triples):
    figures = algebra(Motion(decodes=False), *triples)
    assert figures["cycle"]["true"] > 0.9
    assert figures["cycle_tokens"]["true"] < 0.5


def test_what_cannot_be_measured_is_none(triples):
    frames, tasks, episodes, has_third = triples
    laq = Motion()
    laq.weights = {"features": 1.0}
    figures = algebra(laq, frames, tasks, episodes, has_third & (episodes < 3))
    assert figures["additivity"] is figures["cycle"] is figures["cycle_tokens"] is None


def test_lengths_are_relative_to_nothing_where_half_of_the_latent_actions_are_that_of_no_change(triples):
    frames, *rest = triples
    still = frames[:, :1].expand(-1, 3, -1, -1, -1).contiguous()
    figures = algebra(Motion(), still, *rest)
    assert figures["zero_transition"] is figures["camera_shift"] is None
