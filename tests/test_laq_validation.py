import copy
import gc
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from toys import Counting

from hlrp.clips import Clips
from hlrp.data import choose_clips, open_data
from hlrp.laq import LatentActions
from hlrp.laq_validation import Share, alarms, encode_all, evaluate, joined, partners
from hlrp.training_log import scalars


class Brightening(torch.utils.data.Dataset):
    """Pairs whose second frame is brighter by the action, -8 to 8; five an episode, and a last one alone."""

    def __init__(self, first_episode: int, num_episodes: int, with_actions: bool = True):
        self.first_episode, self.with_actions = first_episode, with_actions
        self.num_pairs = 5 * num_episodes + 1

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, i: int) -> dict:
        episode = self.first_episode + i // 5
        generator = torch.Generator().manual_seed(1000 * episode + i)
        first = torch.randint(60, 160, (3, 8, 8), generator=generator)
        shift = torch.randint(-8, 9, (), generator=generator)
        frames = torch.stack([first, first + shift]).byte()
        sample = {"frames": frames, "task": "", "dataset": "toy", "episode": episode, "index": i}
        if self.with_actions:
            sample["action"] = torch.tensor([[shift - 1, 0.1], [shift + 1, 0.1], [99, 99]])  # shift, 0.1
            sample["action_is_pad"] = torch.tensor([False, False, True])
        return sample


class Oracle(nn.Module):
    """A LAQ whose code is the change of brightness; its decoder adds it, or does not listen."""

    def __init__(self, listens: bool = True, num_codes: int = 17, continuous: bool = False):
        super().__init__()
        self.listens, self.num_codes, self.continuous = listens, num_codes, continuous
        self.quantizer = SimpleNamespace(codebook_size=None if continuous else 17, levels=() if continuous else (17,))
        self.unused = nn.Parameter(torch.zeros(()))

    def encode(self, frames):
        assert not self.training
        first, second = frames.float().unbind(1)
        codes = (second - first).mean(dim=(1, 2, 3))[:, None, None]
        indices = codes[:, :, 0].round().long() + 8
        return codes, None if self.continuous else indices % self.num_codes

    def errors(self, frames, variants, task):
        first, second = frames.float().unbind(1)
        changes = [0 if codes is None else codes[..., None] if self.listens else 1 for codes in variants]
        return [{"pixels": (first + x - second).square().flatten(1).mean(dim=1)} for x in changes]


SET, FIT = Brightening(0, num_episodes=12), Brightening(100, num_episodes=12)


def test_a_perfect_decoder_has_no_error_and_pays_for_every_other_code():
    figures = evaluate(Oracle(), {"toy": SET})["toy"]
    assert figures["error"] == {"pixels": 0}
    assert figures["copy_error"]["pixels"] > 10
    assert figures["true_over_copy"]["pixels"] < 1e-9
    for control in ("zero_over_true", "shuffled_over_true", "shuffled_in_episode_over_true"):
        assert figures[control]["pixels"] > 1e6
    assert alarms({"toy": figures}) == []


def test_a_decoder_that_ignores_the_code_has_ratio_1_and_the_alarm_names_it():
    report = evaluate(Oracle(listens=False), {"toy": SET})
    for control in ("zero_over_true", "shuffled_over_true", "shuffled_in_episode_over_true"):
        assert report["toy"][control] == {"pixels": 1}
    (alarm,) = alarms(report)
    assert "toy: the decoder ignores the code" in alarm
    assert "1.000" in alarm and "1.2" in alarm


def test_a_collapsed_codebook_is_a_stop_and_a_small_one_in_full_use_is_not():
    report = evaluate(Oracle(num_codes=3), {"toy": SET})
    assert report["toy"]["unique_sequences"] == 3
    (alarm,) = alarms(report)
    assert "stop, the codebook has collapsed" in alarm
    assert "3 in 61 pairs, where 17 were possible" in alarm

    figures = report["toy"] | {"possible_sequences": 3}
    assert alarms({"toy": figures}) == []


def test_usage_and_sequences_are_counted_over_the_whole_pass():
    figures = evaluate(Oracle(), {"toy": SET}, batch_size=7)["toy"]
    shifts = [int(SET[i]["action"][:2, 0].mean()) for i in range(len(SET))]
    assert figures["usage"] == pytest.approx(len(set(shifts)) / 17)
    assert figures["unique_sequences"] == len(set(shifts))
    assert (figures["pairs"], figures["episodes"], figures["pairs_alone"]) == (61, 13, 1)


def test_the_action_probe_reads_the_mean_over_the_span_and_random_codes_read_nothing():
    sets, fit_sets = {"toy": Brightening(0, num_episodes=150)}, {"toy": Brightening(200, num_episodes=150)}
    for fit in (None, fit_sets):
        figures = evaluate(Oracle(), sets, fit)["toy"]
        assert figures["action_r2"] > 0.99
        assert abs(figures["action_r2_random"]) < 0.05
        assert figures["action_constant_dims"] == 1


def test_few_labels_in_much_video_are_what_the_probe_is_fitted_on():
    """A batch without any labelled sample has actions, too: all of them padding."""
    source = Counting([20] * 60, action_dim=1)
    settings = {"val_fraction": 0.1, "val_samples": 8, "demonstrations": None, "seed": 0}
    settings |= {"skip_broken": False, "temperature": None}
    for label_fraction, num_episodes in ((0.1, 5), (0.0, 0)):
        args = SimpleNamespace(label_fraction=label_fraction, **settings)
        fit = open_data(args, [source], [1.0], (0.0, 0.5), image_size=8).fit.get("counting", [])
        assert all("action" in sample for sample in fit)
        assert len({sample["episode"] for sample in fit}) == num_episodes

    clips = Clips(source, range(60), (0.0, 0.5), image_size=8, labelled_episodes=[31, 32])
    few = encode_all(Oracle().eval(), choose_clips(clips, 60, seed=0), Share(0, 1, 4, 0, torch.device("cpu")))
    assert few.has_action.tolist() == [episode in (31, 32) for episode in few.episodes]
    assert few.has_action.sum() == 2 and few.actions.shape == (60, 1)


def test_a_fit_set_that_shares_an_episode_with_the_validation_set_is_an_error():
    with pytest.raises(ValueError, match=r"episodes \[12\]"):
        evaluate(Oracle(), {"toy": SET}, {"toy": Brightening(12, num_episodes=4)})


def test_sources_without_actions_and_continuous_codes_leave_their_figures_out():
    video = Brightening(0, num_episodes=3, with_actions=False)
    report = evaluate(Oracle(continuous=True), {"video": video, "toy": SET})
    assert not {"usage", "action_r2"} & report["video"].keys()
    assert report["toy"]["action_r2"] > 0.99
    assert alarms(report) == []


def test_one_pair_has_no_shuffle():
    report = evaluate(Oracle(), {"toy": Brightening(0, num_episodes=0)})
    figures = report["toy"]
    assert figures["shuffled_over_true"] is figures["shuffled_in_episode_over_true"] is None
    assert figures["action_r2"] is None
    assert alarms(report) == []
    assert "toy/shuffled_over_true" not in scalars(report)


def test_every_sample_gets_another_of_its_group_and_each_is_given_once():
    groups = torch.tensor([3, 1, 1, 3, 2, 1, 3, 3])
    given = partners(groups, seed=0)
    assert torch.equal(given.sort().values, torch.arange(8))
    assert torch.equal(groups[given], groups)
    assert (given == torch.arange(8)).tolist() == [False] * 4 + [True] + [False] * 3
    assert torch.equal(given, partners(groups, seed=0))


def test_scalars_are_flat_numbers_and_the_report_is_json():
    report = evaluate(Oracle(), {"toy": SET}, {"toy": FIT})
    flat = scalars(report)
    assert flat["toy/true_over_copy"] == report["toy"]["true_over_copy"]["pixels"]
    assert flat["toy/action_r2_per_dim/0"] > 0.99
    assert all(type(value) is float for value in flat.values())
    assert json.loads(json.dumps(report, allow_nan=False)) == report

    two = {"toy": {"error": {"pixels": 1.0, "flow": 3.0}, "true_over_copy": {"pixels": 0.2, "flow": 0.4}}}
    assert scalars(two) == pytest.approx(
        {
            "toy/error/pixels": 1.0,
            "toy/error/flow": 3.0,
            "toy/true_over_copy": 0.3,
            "toy/true_over_copy/pixels": 0.2,
            "toy/true_over_copy/flow": 0.4,
        }
    )


def test_evaluation_repeats_itself_and_leaves_mode_weights_and_random_state_alone():
    laq = Oracle().train()
    weights, state = copy.deepcopy(laq.state_dict()), torch.get_rng_state()
    report = evaluate(laq, {"toy": SET}, {"toy": FIT})
    assert evaluate(laq, {"toy": SET}, {"toy": FIT}) == report
    assert laq.training
    assert torch.equal(torch.get_rng_state(), state)
    assert laq.state_dict() == weights


def test_memory_stays_flat_over_repeated_evaluations():
    def tensors_alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    laq = Oracle()
    evaluate(laq, {"toy": SET})
    before = tensors_alive()
    for _ in range(3):
        evaluate(laq, {"toy": SET})
    assert tensors_alive() == before


def test_a_set_smaller_than_the_ranks_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="toy has 1 pairs for 2 ranks"):
        evaluate(Oracle(), {"toy": Brightening(0, num_episodes=0)}, num_ranks=2)


def evaluate_as_rank(rank: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    report = evaluate(Oracle(num_codes=5), {"toy": SET}, {"toy": FIT}, rank=rank, num_ranks=2, batch_size=9)
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def test_two_processes_return_the_report_of_one(tmp_path):
    torch.multiprocessing.spawn(evaluate_as_rank, args=(tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = evaluate(Oracle(num_codes=5), {"toy": SET}, {"toy": FIT}, batch_size=9)
    assert scalars(first) == pytest.approx(scalars(alone), rel=1e-9)


def test_batches_are_joined_field_by_field_and_what_none_of_them_has_stays_none():
    parts = [LatentActions(torch.full((n, 2), float(n)), None) for n in (1, 3)]
    whole = joined(parts, torch.neg)
    assert whole.vectors[:, 0].tolist() == [-1, -3, -3, -3] and whole.indices is None
