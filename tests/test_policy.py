"""The policy by LeRobot's own classes and commands."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.datasets.compute_stats import aggregate_stats, get_feature_stats
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.policies.rtc import RTCConfig
from lerobot.utils.import_utils import register_third_party_plugins
from toys import CHUNK, META, STATE, TASKS, TOP, WRIST, make_config, make_policy, write_lerobot

from hlrp.demonstrations import refuse_other_cameras
from hlrp.images import fit
from hlrp.metrics import column_statistics, normalisable
from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors
from hlrp.vla import VLA, LatentSpace, VLAConfig
from hlrp.vlm import VLM, VLMConfig


def make_batch(policy, rows=4) -> dict:
    torch.manual_seed(1)
    steps = (policy.config.n_obs_steps,) if policy.config.n_obs_steps > 1 else ()
    batch = {key: torch.rand(rows, *steps, 3, 40, 40) for key in policy.config.image_features}
    batch |= {"observation.state": torch.randn(rows, STATE), "task": (TASKS * rows)[:rows]}
    batch["action"] = torch.randn(rows, CHUNK, 2).clamp(-1, 1)
    return batch | {"action_is_pad": torch.zeros(rows, CHUNK, dtype=torch.bool)}


def test_a_policy_without_a_device_takes_the_fastest_one_and_warns_of_nothing(caplog):
    config = HLRPConfig(push_to_hub=False)
    assert config.device == ("cuda" if torch.cuda.is_available() else "cpu") and not caplog.records


def loss_of(policy, batch) -> torch.Tensor:
    torch.manual_seed(2)  # the flow's times and noise
    return policy(batch)[0]


def predict(policy, batch) -> torch.Tensor:
    noise = torch.randn(len(batch["task"]), CHUNK, 2, generator=torch.Generator().manual_seed(3))
    return policy.eval().predict_action_chunk(batch, noise)


def nudge(policy) -> HLRPPolicy:
    """As after a few steps of training: no output layer is zero."""
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return policy


@pytest.fixture(scope="module")
def stage2(tmp_path_factory):
    """The checkpoint of a head."""
    folders = {}

    def get(head):
        if head not in folders:
            torch.manual_seed(0)
            config = VLAConfig(head=head, expert_dim=32, expert_depth=1, vlm=VLMConfig(image_size=32))
            space = LatentSpace(0.2, 2, 5, 6, image_size=32, fingerprint="")
            folders[head] = tmp_path_factory.mktemp(head)
            VLA(config, space, VLM.from_config(config.vlm, TASKS)).save_pretrained(folders[head])
        return str(folders[head])

    return get


def test_lerobot_finds_the_policy_by_the_name_of_the_distribution():
    register_third_party_plugins()
    assert PreTrainedConfig.get_choice_class("hlrp") is HLRPConfig
    assert get_policy_class("hlrp") is HLRPPolicy


BOUNDED = {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"}}
BOUNDED["normalization_mapping"] = {k: NormalizationMode(v) for k, v in BOUNDED["normalization_mapping"].items()}


@pytest.mark.parametrize("head", ["flow", "l1", "bins"])
def test_each_head_learns_and_its_checkpoint_predicts_the_same(head, tmp_path):
    policy = make_policy(action_head=head, num_bins=16, **BOUNDED)
    batch, losses = make_batch(policy), []
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    optimizer.param_groups[0]["lr"] = 1e-2
    for _ in range(45):
        losses.append(loss_of(policy, batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    policy.save_pretrained(tmp_path)
    loaded = HLRPPolicy.from_pretrained(tmp_path)
    assert loaded.config.action_head == head and not loaded.training
    torch.testing.assert_close(predict(loaded, batch), predict(policy, batch), rtol=0, atol=0)
    assert predict(policy, batch).shape == (4, CHUNK, 2)


@pytest.mark.parametrize("context", ["latents", "both"])
@pytest.mark.parametrize("latent_weight", [0.0, 1.0])
def test_the_actions_can_be_read_from_the_queries_of_latent_actions(context, latent_weight, stage2, tmp_path):
    """In training, with or without the loss of latent actions, and at inference: the same hidden states."""
    policy = nudge(make_policy(vla=stage2("parallel"), action_context=context, latent_weight=latent_weight))
    assert policy.latent_head.queries.requires_grad
    batch = make_batch(policy)
    labelled = batch | {"latent_indices": torch.randint(5, (4, 1, 2)), "latent_is_pad": torch.zeros(4, 1).bool()}
    _, metrics = policy(labelled)
    assert ("latent_loss" in metrics) == bool(latent_weight)
    torch.manual_seed(2)
    with_latents = policy(labelled)[1]["action_loss"]
    torch.manual_seed(2)
    assert policy(batch)[1]["action_loss"] == pytest.approx(with_latents, rel=1e-4)

    before = predict(policy, batch)
    policy.latent_head.queries.data += 1.0
    assert not torch.allclose(predict(policy, batch), before)
    seen = policy.see(policy.images(batch), batch["task"]).hidden.shape[1]
    prompt = policy.vlm(policy.images(batch), batch["task"]).hidden.shape[1]
    assert seen == (2 if context == "latents" else prompt + 2)  # of two codes
    policy.save_pretrained(tmp_path)
    torch.testing.assert_close(predict(HLRPPolicy.from_pretrained(tmp_path), batch), predict(policy, batch))


def test_only_a_parallel_head_has_queries_to_read_actions_from(stage2):
    for vla in (None, stage2("flow")):
        with pytest.raises(ValueError, match="action_context='both'; expected prompt"):
            make_policy(action_context="both", **({} if vla is None else {"vla": vla}))


@pytest.mark.parametrize("head", ["tokens", "parallel", "flow"])
def test_it_starts_from_stage_2_keeps_its_head_and_needs_its_folder_no_more(head, stage2, tmp_path):
    policy = make_policy(vla=stage2(head))
    stage2_weights = VLA.from_pretrained(stage2(head)).state_dict()
    weights = policy.state_dict()
    for name in ("vlm.model.visual.pos_embed.weight", "vlm.model.language_model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(weights[name], stage2_weights[name])
    batch = make_batch(policy)
    with_latents = batch | {"latent_indices": torch.randint(5, (4, 1, 2)), "latent_vectors": torch.randn(4, 1, 6)}
    loss, metrics = policy(with_latents)
    assert loss.item() == pytest.approx(metrics["action_loss"] + 0.1 * metrics["latent_loss"], rel=1e-5)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.latent_head.parameters())
    assert "latent_loss" not in policy(batch)[1]
    assert (policy.expert is None) == (head == "flow")  # whose expert serves both

    nudge(policy).config.vla = "nowhere"
    policy.save_pretrained(tmp_path)
    loaded = HLRPPolicy.from_pretrained(tmp_path)
    torch.testing.assert_close(predict(loaded, batch), predict(policy, batch), rtol=0, atol=0)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_policy().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("from_state.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="from_state.weight"):
        HLRPPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", ["flow", "l1", "bins"])
def test_padded_actions_say_nothing(head):
    policy = nudge(make_policy(action_head=head, num_bins=16, **BOUNDED))
    batch = make_batch(policy)
    batch["action_is_pad"][0, 2:] = True
    batch["action_is_pad"][1] = True  # a video without actions
    before = loss_of(policy, batch)
    batch["action"][0, 2:], batch["action"][1] = 9.0, float("nan")
    torch.testing.assert_close(loss_of(policy, batch), before)
    before.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    batch["action_is_pad"][:] = True
    assert loss_of(policy, batch) == 0


@pytest.mark.parametrize("head", ["parallel", "flow"])
def test_latent_actions_past_the_episode_say_nothing(head, stage2):
    policy = nudge(make_policy(vla=stage2(head), latent_weight=1.0))
    batch = make_batch(policy) | {"latent_indices": torch.randint(5, (4, 1, 2)), "latent_vectors": torch.randn(4, 1, 6)}
    batch["latent_is_pad"] = torch.tensor([[True], [False], [True], [False]])
    before = loss_of(policy, batch)
    batch["latent_indices"][0], batch["latent_vectors"][0] = -1, float("nan")  # as hlrp.label leaves them
    torch.testing.assert_close(loss_of(policy, batch), before)
    before.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    batch["latent_is_pad"][:] = True
    assert policy(batch)[1]["latent_loss"] == 0


def test_nothing_that_follows_now_is_asked_for():
    config = make_config(n_obs_steps=3)
    assert config.observation_delta_indices == [-2, -1, 0]
    assert config.action_delta_indices == [0, 1, 2, 3] and config.reward_delta_indices is None


def test_a_chunk_is_executed_in_part_and_each_action_held():
    policy = nudge(make_policy(action_repeat=3, action_head="flow")).eval()
    batch = make_batch(policy)
    torch.manual_seed(4)
    first = policy.predict_action_chunk(batch)
    torch.manual_seed(4)
    actions = torch.stack([policy.select_action(batch) for _ in range(7)], dim=1)
    torch.testing.assert_close(actions[:, :6], first[:, :2].repeat_interleave(3, dim=1))
    assert not torch.equal(actions[:, 6], first[:, 0])  # of a new chunk
    policy.reset()
    torch.manual_seed(4)
    torch.testing.assert_close(policy.select_action(batch), first[:, 0])


def test_a_policy_of_cropped_data_crops_what_the_robot_sees():
    frames = torch.randint(256, (2, 3, 40, 60), dtype=torch.uint8)
    whole, cropped = (make_policy(crop=crop).images({TOP: frames / 255})[:, 0] for crop in (False, True))
    assert torch.equal(whole, fit(frames, 32)) and torch.equal(cropped, fit(frames[..., 10:50], 32))
    source = SimpleNamespace(uri="lerobot:robot", action_dim=2, crop=False, camera=TOP, views={})
    refuse_other_cameras([source, SimpleNamespace(**vars(source) | {"action_dim": 0, "crop": True})], make_config())
    with pytest.raises(ValueError, match=r"lerobot:robot: expected it with \?crop=center, as the policy sees"):
        refuse_other_cameras([source], make_config(crop=True))


def test_a_history_of_images_is_the_same_in_training_and_on_a_robot():
    policy = make_policy(cameras=(WRIST, TOP), n_obs_steps=2).eval()
    batch = make_batch(policy)
    seen = policy.images(batch)
    assert seen.shape == (4, 4, 3, 32, 32)
    earlier, later = (batch | {key: batch[key][:, i] for key in (TOP, WRIST)} for i in range(2))
    shown, images = [], policy.images
    policy.images = lambda batch: shown.append(images(batch)) or shown[-1]
    policy.config.n_action_steps = 1
    for moment in (earlier, later):
        policy.select_action(moment)
    assert torch.equal(shown[1], seen)
    assert torch.equal(shown[0][:, 0], seen[:, 0]) and torch.equal(shown[0][:, 1], seen[:, 0])
    with pytest.raises(ValueError, match="top has 1 frames; expected 2"):
        policy.predict_action_chunk(later)


def test_a_history_is_one_frame_of_the_data_apart_where_actions_are_held():
    policy = make_policy(n_obs_steps=2, action_repeat=3, n_action_steps=1, chunk_size=1).eval()
    shown, images = [], policy.images
    policy.images = lambda batch: shown.append(images(batch)) or shown[-1]
    for brightness in range(7):
        batch = {TOP: torch.full((1, 3, 40, 40), brightness / 255), "observation.state": torch.zeros(1, STATE)}
        policy.select_action(batch | {"task": TASKS[:1]})
    assert [frames[0, :, 0, 0, 0].tolist() for frames in shown] == [[0, 0], [0, 3], [3, 6]]


def test_real_time_chunking_goes_on_where_the_last_chunk_was():
    rtc = RTCConfig(enabled=True, execution_horizon=4, max_guidance_weight=100.0)
    policy = nudge(make_policy(rtc_config=rtc, num_inference_steps=20, action_head="flow")).eval()
    assert policy.supports_rtc() and not make_policy().supports_rtc()
    with pytest.raises(ValueError, match="rtc_config.enabled=True with action_head=l1; expected flow"):
        make_policy(rtc_config=rtc)
    batch = make_batch(policy)
    left_over = torch.full((4, CHUNK, 2), 0.7)
    noise = torch.randn(4, CHUNK, 2)
    free = policy.predict_action_chunk(batch, noise)
    bound = policy.predict_action_chunk(batch, noise, inference_delay=2, prev_chunk_left_over=left_over)
    gap, free_gap = ((chunk - left_over)[:, :2].abs().mean() for chunk in (bound, free))
    assert gap < 0.2 * free_gap
    with pytest.raises(ValueError, match="predict_action_chunk"):
        policy.select_action(batch)


def test_no_control_tick_waits_for_a_chunk_that_comes_200_ms_late():
    """LeRobot's real-time chunking at 20 actions a second, as lerobot-rollout --inference.type=rtc runs it."""
    from lerobot.rollout.inference.rtc import RTCInferenceEngine

    rtc, fps = RTCConfig(enabled=True, execution_horizon=8), 20
    flow = {"action_head": "flow", "num_inference_steps": 2, "rtc_config": rtc}
    policy = nudge(make_policy(chunk_size=16, n_action_steps=8, **flow)).eval()
    predict_chunk, delays = policy.predict_action_chunk, []

    def late(batch, *, inference_delay=None, prev_chunk_left_over=None):
        time.sleep(0.2)
        delays.append(inference_delay)
        rest = {"inference_delay": inference_delay, "prev_chunk_left_over": prev_chunk_left_over}
        return predict_chunk(batch, **rest)

    policy.predict_action_chunk = late
    stats = {"observation.state": {"mean": torch.zeros(STATE), "std": torch.ones(STATE)}}
    stats["action"] = {"mean": torch.zeros(2), "std": torch.ones(2)}
    processors = make_hlrp_pre_post_processors(policy.config, stats)
    joints = [f"joint_{i}.pos" for i in range(STATE)]
    features = {"observation.state": {"dtype": "float32", "shape": (STATE,), "names": joints}}
    features[TOP] = {"dtype": "video", "shape": (40, 40, 3), "names": ["height", "width", "channels"]}
    robot = SimpleNamespace(robot_type="toy", action_features={})
    engine = RTCInferenceEngine(policy, *processors, robot, policy.config.rtc_config, features, TASKS[0], fps, "cpu")
    seen = dict.fromkeys(joints, 0.0) | {TOP.split(".")[-1]: np.zeros((40, 40, 3), dtype=np.uint8)}
    engine.start()
    engine.notify_observation(seen)
    engine.resume()
    while engine.get_action(None) is None:
        assert not engine.failed
        time.sleep(0.01)
    actions = []
    for _ in range(3 * fps):
        engine.notify_observation(seen)
        actions.append(engine.get_action(None))
        time.sleep(1 / fps)
    engine.stop()
    assert not [tick for tick, action in enumerate(actions) if action is None]
    assert len(delays) >= 4 and max(delays) >= 4  # 200 ms are four ticks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("observation.state"), "reads observation.state, but the batch has none"),
        (lambda batch: batch.update({WRIST: batch.pop(TOP)}), f"sees {TOP}, the batch has {WRIST}; --rename_map"),
    ],
)
def test_what_the_robot_does_not_send_is_named(change, message):
    policy = make_policy()
    batch = make_batch(policy)
    change(batch)
    with pytest.raises(ValueError, match=message):
        policy.predict_action_chunk(batch)


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 3)])
def test_adapters_of_stage_2_become_weights_and_new_ones_are_added(before, after, tmp_path):
    torch.manual_seed(0)
    vlm = VLMConfig(image_size=32, lora_rank=before, freeze=("vision",))
    vla = VLA(VLAConfig(vlm=vlm), LatentSpace(0.2, 2, 5, 6, 32, ""), VLM.from_config(vlm, TASKS))
    (tmp_path / "vla").mkdir()
    nudge(vla).save_pretrained(tmp_path / "vla")
    policy = make_policy(vla=str(tmp_path / "vla"), lora_rank=after).eval()
    images = torch.randint(256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    same = policy.vlm(images, TASKS).hidden, vla.eval().vlm(images, TASKS).hidden
    torch.testing.assert_close(*same, rtol=1e-3, atol=1e-4)
    trained = [name for name, p in policy.vlm.named_parameters() if p.requires_grad]
    assert trained and all(("lora" in name) == bool(after) for name in trained)
    assert bool(after) or any("visual" in name for name in trained)  # what stage 2 froze, this one does not
    policy.save_pretrained(tmp_path / "policy")
    loaded = HLRPPolicy.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(loaded.vlm(images, TASKS).hidden, same[0])


def test_what_nothing_reads_is_not_trained(stage2):
    policy = make_policy(vla=stage2("flow"), latent_weight=0.0)
    loss_of(policy, make_batch(policy)).backward()
    assert not [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]


def test_another_image_size_than_that_of_stage_2_is_refused(stage2):
    config = make_config(vla=stage2("parallel"))
    config.image_size = 64
    with pytest.raises(ValueError, match="image_size=64, but vla=.* sees 32 pixels"):
        HLRPPolicy(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 2, "n_action_steps": 3}, "n_action_steps=3 is more than chunk_size=2"),
        ({"action_repeat": 0}, "action_repeat=0; expected 1 or more"),
        ({"latent_weight": -1.0}, "latent_weight=-1.0"),
        ({"action_head": "bins"}, "expected MIN_MAX or QUANTILES"),
        ({"action_head": "words"}, "action_head='words'; expected one of flow, l1, bins"),
        ({"cameras": ()}, "no camera among the inputs"),
        ({"vla": "nowhere"}, "nowhere holds no config.json"),
        ({"freeze": ["ears"]}, "freeze=.*ears"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**settings)


def test_statistics_that_are_missing_or_of_another_robot_are_named():
    config = make_config()
    stats = {"observation.state": {"mean": torch.zeros(3), "std": torch.ones(3)}}
    with pytest.raises(ValueError, match="no statistics of action"):
        make_hlrp_pre_post_processors(config, stats)
    stats["action"] = {"mean": torch.zeros(7), "std": torch.ones(7)}
    with pytest.raises(ValueError, match=r"action are of shape \[\(7,\)\], the policy's is \(2,\)"):
        make_hlrp_pre_post_processors(config, stats)
    stats["action"] = {"mean": torch.tensor([1.0, 2.0]), "std": torch.tensor([2.0, 4.0])}
    _, post = make_hlrp_pre_post_processors(config, stats)
    torch.testing.assert_close(post(torch.ones(1, 2)), torch.tensor([[3.0, 6.0]]))


def normalise(preprocessor, actions):
    return preprocessor({"action": actions, TOP: torch.zeros(len(actions), 3, 40, 40)})["action"]


VALUES = (0.0, 0.1, -90.3, 65535.7)  # of joints that never move


@pytest.fixture(scope="module")
def recorded():
    """Actions float32 (100,000, 5): four joints that never move, and one of N(90, .3)."""
    rng = np.random.default_rng(0)
    columns = [np.full(100_000, value) for value in VALUES] + [rng.normal(90, 0.3, 100_000)]
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.mark.parametrize("noise", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("origin", ["hlrp", "lerobot", "lerobot-episodes", "mean-and-std"])
def test_a_joint_that_never_moves_is_0_and_what_lies_beside_it_small(origin, noise, recorded):
    if noise:
        recorded = recorded.copy()
        recorded[::3] = np.nextafter(recorded[::3], np.float32(np.inf))
    parts = np.split(recorded, 100 if origin == "lerobot-episodes" else 1)
    stats = aggregate_stats([{"action": get_feature_stats(part, axis=0, keepdims=False)} for part in parts])["action"]
    if origin == "hlrp":
        stats = column_statistics(recorded)
    elif origin == "mean-and-std":
        stats = {"mean": recorded[0], "std": np.zeros(5)}
    config, joints = make_config(state=0), torch.from_numpy(recorded[:30])
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (5,))}
    for mode in ("MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")[: 1 if origin == "mean-and-std" else 4]:
        config.normalization_mapping["ACTION"] = NormalizationMode(mode)
        pre, post = make_hlrp_pre_post_processors(config, {"action": stats})
        normalised, beside = (normalise(pre, x)[:, :4] for x in (joints, joints + 1e-3))
        assert normalised.abs().max() < 1e-3 and beside.abs().max() < 10, mode
        torch.testing.assert_close(post(torch.zeros(1, 5))[0, :4], torch.tensor(VALUES), rtol=1e-6, atol=1e-6)


def test_statistics_of_many_frames_are_exact_and_rounding_is_no_spread(recorded):
    found = column_statistics(recorded)
    assert found["std"][4] == pytest.approx(0.3, abs=1e-3) and found["mean"][4] == pytest.approx(90, abs=1e-3)
    assert found["std"][:4].max() < 1e-9 and np.array_equal(found["mean"][:4].astype(np.float32), recorded[0, :4])
    few = np.random.default_rng(0).normal(0, 1e-4, (1000, 1))  # small, and it moves
    assert normalisable(column_statistics(few))["std"] == pytest.approx(few.std())


def test_a_gripper_that_hardly_ever_moves_stays_within_its_extremes_by_quantiles():
    gripper = np.zeros((10_000, 2), dtype=np.float32)
    gripper[:20] = 1
    config = make_config(state=0)
    config.normalization_mapping["ACTION"] = NormalizationMode.QUANTILES
    for stats in (column_statistics(gripper), get_feature_stats(gripper, axis=0, keepdims=False)):
        pre, _ = make_hlrp_pre_post_processors(config, {"action": stats})
        torch.testing.assert_close(normalise(pre, torch.eye(2)), 2 * torch.eye(2) - 1)


def test_lerobot_train_gives_a_checkpoint_statistics_that_it_can_use():
    meta = SimpleNamespace(tasks=META.tasks, stats={"action": get_feature_stats(np.ones((9, 2)), 0, False)})
    HLRPPolicy(make_config(), dataset_meta=meta)  # before it hands meta.stats to the saved processors
    assert meta.stats["action"]["std"].tolist() == [1e-3, 1e-3]


def test_statistics_that_are_not_finite_are_named():
    stats = {"action": column_statistics(np.array([[0, 1], [2, np.nan]]))}
    with pytest.raises(ValueError, match=r"statistics of action: min is \[0.0, nan\]; expected finite numbers"):
        make_hlrp_pre_post_processors(make_config(), stats)


def test_lerobot_trains_resumes_and_loads_it(tmp_path):
    dataset = write_lerobot(tmp_path / "data")
    main = "from lerobot.scripts.lerobot_train import main; main()"
    flags = {"policy.type": "hlrp", "policy.device": "cpu", "policy.push_to_hub": "false"}
    flags |= {"policy.chunk_size": 4, "policy.n_action_steps": 2, "dataset.repo_id": "toy/toy"}
    flags |= {"dataset.root": dataset, "dataset.video_backend": "pyav", "batch_size": 4, "num_workers": 0}
    flags |= {"steps": 2, "log_freq": 1, "save_freq": 2, "env_eval_freq": 0, "output_dir": tmp_path / "run"}

    def lerobot_train(**flags):
        command = [sys.executable, "-c", main, *(f"--{name}={value}" for name, value in flags.items())]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})

    lerobot_train(**flags)
    last = tmp_path / "run/checkpoints/last"
    lerobot_train(config_path=last / "pretrained_model/train_config.json", resume="true", steps=3)
    assert last.resolve().name == "000003"

    again = {name: flags[name] for name in flags if name != "policy.type" and "chunk" not in name}
    again |= {"policy.path": last / "pretrained_model", "output_dir": tmp_path / "further", "steps": 1}
    again.pop("policy.n_action_steps")
    lerobot_train(**again)

    folder = Path(tmp_path / "further/checkpoints/last/pretrained_model")
    policy = get_policy_class("hlrp").from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=folder)
    seen = {TOP: torch.rand(3, 64, 64), WRIST: torch.rand(3, 64, 64), "task": "task 1"}
    action = post(policy.select_action(pre(seen | {"observation.state": torch.zeros(3)})))
    assert action.shape == (1, 2) and action.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "camera"), [("hlrp_metaworld", "observation.images.corner2"), ("metaworld", "observation.image")]
)
def test_lerobot_train_tries_it_in_metaworld_on_the_way(env, camera, tmp_path):
    from lerobot.datasets import LeRobotDataset

    vector = {"dtype": "float32", "shape": (4,), "names": None}
    image = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    features = {camera: image, "observation.state": vector, "action": vector}
    dataset = LeRobotDataset.create("toy/toy", 20, features, root=tmp_path / "data")
    rng = np.random.default_rng(0)
    for _ in range(12):
        numbers = {key: rng.standard_normal(4).astype(np.float32) for key in ("observation.state", "action")}
        dataset.add_frame(numbers | {camera: rng.integers(256, size=(32, 32, 3), dtype=np.uint8), "task": "close"})
    dataset.save_episode()
    dataset.finalize()
    flags = {"policy.type": "hlrp", "policy.device": "cpu", "policy.push_to_hub": "false", "num_workers": 0}
    flags |= {"policy.chunk_size": 4, "policy.n_action_steps": 4, "dataset.repo_id": "toy/toy", "batch_size": 4}
    flags |= {"dataset.root": tmp_path / "data", "output_dir": tmp_path / "run", "policy.action_repeat": 4}
    flags |= {"steps": 1, "env_eval_freq": 1, "eval.n_episodes": 1, "eval.batch_size": 1}
    flags |= {"env.type": env, "env.task": "drawer-close-v3"}
    main = "from lerobot.scripts.lerobot_train import main; main()"
    command = [sys.executable, "-c", main, *(f"--{name}={value}" for name, value in flags.items())]
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MUJOCO_GL": "egl"}
    log = subprocess.run(command, check=True, env=os.environ | variables, capture_output=True, text=True)
    assert "pc_success" in log.stdout + log.stderr
    assert [*(tmp_path / "run").rglob("*.mp4")]


def test_a_config_that_hlrp_0_1_0_has_saved_is_read_as_it_was(tmp_path):
    saved = {"type": "hlrp", "n_obs_steps": 2, "device": "cpu", "use_amp": False, "use_peft": False}
    saved |= {"input_features": {TOP: {"type": "VISUAL", "shape": [3, 64, 64]}}}
    saved |= {"output_features": {"action": {"type": "ACTION", "shape": [2]}}, "push_to_hub": False, "repo_id": "me/x"}
    saved |= {"private": None, "tags": ["arm"], "license": None, "pretrained_path": None, "pretrained_revision": None}
    saved |= {"vla": "vla", "vlm": "tiny", "image_size": None, "freeze": ["vision"], "freeze_layers": 0, "lora_rank": 0}
    saved |= {"gradient_checkpointing": False, "chunk_size": 9, "n_action_steps": 8, "action_repeat": 1}
    saved |= {"action_head": "bins", "num_bins": 32, "num_inference_steps": 10, "expert_dim": 32, "expert_depth": 2}
    saved |= {"latent_weight": 0.5, "rtc_config": None, "optimizer_lr": 1e-4, "optimizer_weight_decay": 0.05}
    saved |= {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "QUANTILES"}}
    saved |= {"optimizer_betas": [0.9, 0.95], "optimizer_grad_clip_norm": 1.0, "scheduler_warmup_steps": 500}
    saved |= {"scheduler_decay_steps": 20000, "stage2": {"vla": {"head": "flow"}, "latent_space": {"delta": 0.2}}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert isinstance(config, HLRPConfig) and config.normalization_mapping["ACTION"] is NormalizationMode.QUANTILES
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == saved | {"action_context": "prompt", "crop": False}
