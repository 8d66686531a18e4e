import json

import pytest
import torch

from hlrp.laq import LAQ, LAQConfig

TINY = {"image_size": 32, "patch_size": 8, "codebook_size": 8, "num_tokens": 2}


@pytest.fixture(scope="module")
def features_folder(tmp_path_factory):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BitImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return str(folder)


def laq(**settings) -> LAQ:
    torch.manual_seed(0)
    model = LAQ(LAQConfig(**TINY | settings))
    for head in model.decoder.to_outputs.values():  # a fresh decoder says that nothing changes
        torch.nn.init.normal_(head.weight, std=0.1)
    return model


def batch(size=4, seed=0) -> dict:
    frames = torch.randint(256, (size, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {"frames": frames, "step": 0}


def test_a_fresh_model_predicts_that_nothing_changes():
    frames = batch()["frames"]
    model = LAQ(LAQConfig(**TINY)).eval()
    codes, _ = model.encode(frames)
    with_codes, copied = model.errors(frames, [codes, None])
    torch.testing.assert_close(with_codes, copied)
    torch.testing.assert_close(model.decode(frames[:, 0], codes)["pixels"], frames[:, 0] / 255)


def test_a_later_version_gives_a_checkpoint_the_same_fingerprint():
    """Stage 3 would refuse it otherwise. A setting that is added belongs into `hlrp.laq.ADDED`."""

    def fingerprint(**settings) -> str:
        model = LAQ(LAQConfig(image_size=16, patch_size=8, **settings))
        for tensor in model.state_dict().values():
            tensor.zero_()
        return model.fingerprint

    assert fingerprint() == "4d45bd6f36c1f814"
    assert fingerprint(num_views=2) == "1b16a7d07c558b5c"


def test_the_future_reaches_the_decoder_by_the_codes_alone():
    model = laq()
    observed = model.observe(batch()["frames"])
    codes = model.quantizer(model.latents(*model.embed(observed).unbind(1))).codes
    predictions = model.decoder(model.inputs(observed), codes.detach(), None)["pixels"]
    predictions.square().mean().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"decoder"}

    model.eval()
    frames = batch()["frames"]
    codes, _ = model.encode(frames)
    poisoned = frames.clone()
    poisoned[:, 1] = 255 - poisoned[:, 1]
    assert torch.equal(model.decode(frames[:, 0], codes)["pixels"], model.decode(poisoned[:, 0], codes)["pixels"])
    assert not torch.equal(model.encode(poisoned)[0], codes)


def test_the_encoding_of_a_frame_does_not_depend_on_the_frame_after_it():
    model, frames = laq(), batch()["frames"]
    poisoned = frames.clone()
    poisoned[:, 1] = 255 - poisoned[:, 1]
    encodings = []
    model.encoder.register_forward_hook(lambda module, inputs, output: encodings.append(output))
    model.encode(frames)
    model.encode(poisoned)
    first, second = (encoded.unflatten(0, (-1, 2)).unbind(dim=1) for encoded in encodings)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_each_camera_is_seen_by_a_frozen_encoder_alone_and_one_may_show_no_change(features_folder):
    model = laq(num_views=2, view_dropout=0.999, features=features_folder)
    frames = torch.cat([batch(seed=0)["frames"], batch(seed=1)["frames"]], dim=-2)  # b 2 c (2 h) w
    features = model.observe(frames).features
    alone = [laq(features=features_folder).observe(part).features for part in frames.split(32, dim=-2)]
    assert torch.equal(features, torch.cat(alone, dim=2))

    first, second = model.embed(model.observe(frames)).unbind(1)  # b n d each
    seen = model.without_one_view(first, second)
    changed = [(seen != first).any(2).any(1) for seen, first in zip(seen.chunk(2, 1), first.chunk(2, 1), strict=True)]
    assert (changed[0] ^ changed[1]).all() and changed[0].any() and changed[1].any()
    assert torch.equal(torch.where(seen != first, seen, second), second)
    loss, _ = model({"frames": frames})
    loss.backward()
    model.eval()
    codes, _ = model.encode(frames)
    assert model.decode(frames[:, 0], codes)["pixels"].shape == (4, 3, 64, 32)
    assert torch.equal(model.encode(frames)[0], codes)  # evaluation hides nothing


def test_a_scene_that_stays_has_one_code_whatever_it_shows():
    frames = batch(size=6)["frames"]
    frames[:, 1] = frames[:, 0]
    codes, indices = laq().eval().encode(frames)
    torch.testing.assert_close(codes, codes[:1].expand_as(codes))
    assert (indices == indices[0]).all()


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 6, 8])
def test_any_number_of_tokens_trains(num_tokens):
    model = laq(num_tokens=num_tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss, _ = model(batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    assert model.encode(batch()["frames"])[1].shape == (4, num_tokens)


@pytest.mark.parametrize("target", ["pixel_weight", "feature_weight", "flow_weight", "action_weight"])
def test_every_loss_term_moves_parameters(target, features_folder):
    weights = {"pixel_weight": 0.0, "feature_weight": 0.0, "flow_weight": 0.0, "action_weight": 0.0}
    if target == "action_weight":  # is no target of the decoder, which needs one
        weights |= {"pixel_weight": 1e-30, "action_dim": 3, "action_sources": 2}
    model = laq(**weights | {target: 1.0}, features=features_folder, flow_teacher="random", flow_warmup_steps=0)
    actions = {"action": torch.randn(4, 5, 3), "action_is_pad": torch.zeros(4, 5, dtype=torch.bool)}
    if target == "action_weight":
        torch.nn.init.normal_(model.to_action.weight)
    loss, metrics = model(batch() | actions | {"source": torch.tensor([0, 1, 0, 1])})
    loss.backward()
    assert f"{target.removesuffix('_weight').replace('pixel', 'pixels').replace('feature', 'features')}_loss" in metrics
    assert model.from_input.weight.grad.abs().sum() > 1e-6
    assert all(p.grad is None for module in (model.features, model.flow_teacher) if module for p in module.parameters())


def test_the_flow_weight_grows_with_the_step():
    model = laq(pixel_weight=0.0, flow_weight=1.0, flow_teacher="random", flow_warmup_steps=10)
    early, late = (model(batch() | {"step": step})[0] for step in (0, 9))
    torch.testing.assert_close(10 * early, late)


def test_unlabelled_samples_do_not_touch_the_action_loss():
    model = laq(action_weight=1.0, action_dim=3, action_sources=1)
    torch.nn.init.normal_(model.to_action.weight)
    codes = torch.randn(4, 2, 128)
    action, is_pad = torch.randn(4, 5, 3), torch.zeros(4, 5, dtype=torch.bool)
    labelled = {"action": action[:2], "action_is_pad": is_pad[:2], "source": torch.zeros(2, dtype=torch.long)}
    expected = model.to_action.loss(codes[:2].flatten(1), labelled)
    is_pad[2:], action[2:] = True, 1e30
    mixed = {"action": action, "action_is_pad": is_pad, "source": torch.zeros(4, dtype=torch.long)}
    torch.testing.assert_close(model.to_action.loss(codes.flatten(1), mixed), expected)
    mixed["action_is_pad"] = torch.ones(4, 5, dtype=torch.bool)
    assert model.to_action.loss(codes.flatten(1), mixed) == 0


@pytest.mark.parametrize("quantizer", ["fsq", "vq", "vq-ema", "gaussian"])
def test_a_checkpoint_folder_rebuilds_the_model_and_evaluation_is_deterministic(quantizer, tmp_path):
    model = laq(quantizer=quantizer)
    model(batch())
    model.eval().save_pretrained(tmp_path, report={"a": 1})
    again = LAQ.from_pretrained(tmp_path)
    frames = batch(seed=1)["frames"]
    (codes, indices), (codes_again, indices_again) = model.encode(frames), again.encode(frames)
    assert torch.equal(codes, codes_again) and (indices is None or torch.equal(indices, indices_again))
    assert torch.equal(model.decode(frames[:, 0], codes)["pixels"], again.decode(frames[:, 0], codes)["pixels"])
    assert again.config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["report"] == {"a": 1}


@pytest.mark.parametrize("quantizer", ["simvq", "lfq", "bsq", "residual-vq"])
def test_a_checkpoint_of_a_dropped_quantizer_says_which_version_reads_it(quantizer, tmp_path):
    laq().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["laq"]["quantizer"] = quantizer
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = f"{tmp_path}: quantizer '{quantizer}' of hlrp 0.1.0 is no longer offered; hlrp 0.1.0 reads it"
    with pytest.raises(ValueError, match=message):
        LAQ.from_pretrained(tmp_path)


def test_frozen_features_lie_outside_the_checkpoint_and_may_not_change(features_folder, tmp_path):
    model = laq(features=features_folder, encoder="features", feature_weight=1.0)
    model.save_pretrained(tmp_path)
    assert not [name for name in model.state_dict() if name.startswith("features")]
    LAQ.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["frozen"]["features"] = "another"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="features .* has changed"):
        LAQ.from_pretrained(tmp_path)


def test_the_task_centric_split_learns_beside_the_codes_of_the_first_run(tmp_path):
    laq(quantizer="fsq").save_pretrained(tmp_path)
    model = laq(task_irrelevant=str(tmp_path))
    model(batch())[0].backward()
    assert model.from_irrelevant.weight.grad.any() and model.from_input.weight.grad.any()
    assert not [name for name in model.state_dict() if name.startswith("irrelevant")]


def test_bf16_autocast_trains_close_to_float32():
    model = laq()
    loss, _ = model(batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss_bf16, _ = model(batch())
    loss_bf16.backward()
    assert loss_bf16.dtype == torch.float32 and abs(loss_bf16 / loss - 1) < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "image_size=30; expected a multiple of patch_size=8"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"view_dropout": 0.2}, "view_dropout=0.2 with one camera; expected several, as by .camera=A,B"),
        ({"delta": -1.0}, "delta=-1.0"),
        ({"pixel_weight": 0.0}, "nothing to predict"),
        ({"feature_weight": 1.0}, "need features="),
        ({"action_weight": 1.0}, "no source in the data has actions"),
        ({"size": "huge"}, "size='huge'; expected one of tiny, small, base"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LAQ(LAQConfig(**TINY | settings))


def test_frames_of_another_size_or_type_are_named():
    with pytest.raises(ValueError, match=r"torch.uint8 \(1, 2, 3, 16, 16\); expected uint8"):
        laq()({"frames": torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8)})
