import json
import urllib.error

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torchvision.models.optical_flow import raft_small

from hlrp.backbones import (
    VISION_ENCODERS,
    FlowTeacher,
    FrozenEncoder,
    TextEncoder,
    VisionFamily,
    flow_loss,
    flow_to_rgb,
    mean_flow,
    resize_flow,
)
from hlrp.laq import LAQ, LAQConfig
from hlrp.vlm import read_parts

TINY = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = {**TINY, "intermediate_size": 16, "image_size": 28, "patch_size": 7}
NAFLEX = {**TINY, "intermediate_size": 16, "num_patches": 16, "patch_size": 7}
TEXT = {**TINY, "intermediate_size": 16, "vocab_size": 8, "max_position_embeddings": 6}
WORDS = ["[PAD]", "[UNK]", "push", "the", "red", "blue", "cube", "drawer"]

CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}  # as DINOv2: 256, then 224
SQUARE = {"size": {"height": 28, "width": 28}}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def vision_model(family):
    if family == "dinov2":
        return T.Dinov2Model(T.Dinov2Config(**TINY, image_size=42, patch_size=7)), T.BitImageProcessor(**CROP)
    if family == "dinov2_with_registers":
        config = T.Dinov2WithRegistersConfig(**TINY, image_size=42, patch_size=7, num_register_tokens=3)
        return T.Dinov2WithRegistersModel(config), T.BitImageProcessor(**CROP)
    if family == "dinov3_vit":
        config = T.DINOv3ViTConfig(**TINY | {"num_attention_heads": 1}, patch_size=7, num_register_tokens=4)
        return T.DINOv3ViTModel(config), T.DINOv3ViTImageProcessor(**SQUARE)
    if family == "siglip":
        config = T.SiglipConfig(text_config=TEXT, vision_config=SIGLIP)
        return T.SiglipModel(config), T.SiglipImageProcessor(**SQUARE)
    if family == "siglip_vision_model":
        return T.SiglipVisionModel(T.SiglipVisionConfig(**SIGLIP)), T.SiglipImageProcessor(**SQUARE)
    if family == "siglip2":
        config = T.Siglip2Config(text_config=TEXT, vision_config=NAFLEX)
        return T.Siglip2Model(config), T.Siglip2ImageProcessor(patch_size=7, max_num_patches=16)
    predictor = {"pred_hidden_size": 12, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    config = T.VJEPA2Config(**TINY, **predictor, crop_size=28, patch_size=7)
    return T.VJEPA2Model(config), T.VJEPA2VideoProcessor(crop_size=28)


# Each has a grid of 4 x 4 patches of 7 x 7 pixels.
FAMILIES = "dinov2 dinov2_with_registers dinov3_vit siglip siglip_vision_model siglip2 vjepa2".split()


def save_vision(folder, family):
    torch.manual_seed(0)
    model, processor = vision_model(family)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def images(*size):
    return torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def save_text(folder, model):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_model(family):
    torch.manual_seed(0)
    if family == "t5":
        config = T.T5Config(vocab_size=8, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
        return T.T5ForConditionalGeneration(config)
    if family == "bert":
        return T.BertModel(T.BertConfig(**TEXT))
    if family == "clip":
        text = TEXT | {"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}
        return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=SIGLIP))
    if family == "siglip":
        return T.SiglipModel(T.SiglipConfig(text_config=TEXT, vision_config=SIGLIP))
    return T.Siglip2Model(T.Siglip2Config(text_config=TEXT, vision_config=NAFLEX))


TEXT_FAMILIES = ["t5", "bert", "clip", "siglip"]


def test_a_new_family_of_encoders_is_one_class_and_one_line_of_the_table(tmp_path, monkeypatch):
    class ViT(VisionFamily):
        def features(self, encoder, pixels):
            return encoder(pixels).last_hidden_state[:, 1:]  # without the class token

    model = T.ViTModel(T.ViTConfig(**TINY, image_size=28, patch_size=7)).eval()
    model.save_pretrained(tmp_path)
    T.ViTImageProcessor(**SQUARE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'vit' model; expected one of dinov2, .*, vjepa2"):
        FrozenEncoder(str(tmp_path))
    monkeypatch.setitem(VISION_ENCODERS, "vit", ViT("ViTModel"))
    laq = LAQ(LAQConfig(image_size=28, patch_size=7, features=str(tmp_path), encoder="features", feature_weight=1.0))
    loss, _ = laq({"frames": torch.randint(256, (2, 2, 3, 28, 28), dtype=torch.uint8), "step": 0})
    assert laq.grid == (4, 4) and loss.isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_patch_tokens_of_the_checkpoint_in_raster_order(tmp_path, family):
    model, processor = save_vision(tmp_path, family)
    encoder = FrozenEncoder(str(tmp_path))
    frames = images(28, 28)
    features = encoder(frames)

    assert encoder.grid == (4, 4) and encoder.image_size == 28 and features.shape == (2, 16, encoder.dim)
    with torch.no_grad():
        if family == "vjepa2":
            pixels = encoder.preprocess(frames)[:, None].repeat(1, 2, 1, 1, 1)
            expected = model(pixels, skip_predictor=True).last_hidden_state
        elif family == "siglip2":
            expected = model.vision_model(**processor(frames, return_tensors="pt")).last_hidden_state
        else:
            model = getattr(model, "vision_model", model)
            expected = model(encoder.preprocess(frames)).last_hidden_state[:, -16:]
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_of_the_patch_that_changed_changes_most(tmp_path, family):
    save_vision(tmp_path, family)
    encoder = FrozenEncoder(str(tmp_path))
    frames = images(28, 28)
    changed = frames.clone()
    changed[:, :, 7:14, 14:21] = 255 - changed[:, :, 7:14, 14:21]  # row 1, column 2
    change = (encoder(changed) - encoder(frames)).norm(dim=-1)
    assert change.argmax(dim=-1).tolist() == [6, 6]


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (20, 20), (48, 64)])
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_transformers_own_processor_shown_the_whole_frame(tmp_path, family, size):
    if family == "siglip2" and size[0] != size[1]:
        pytest.skip("NaFlex keeps the aspect in its own way")
    _, processor = save_vision(tmp_path, family)
    encoder, frames = FrozenEncoder(str(tmp_path)), images(*size)
    whole = {"size": {"height": 28, "width": 28}, "do_center_crop": False, "return_tensors": "pt"}
    if family == "vjepa2":
        expected = processor(frames[:, None], **whole).pixel_values_videos[:, 0]
    elif family == "siglip2":
        patches = processor(frames, return_tensors="pt").pixel_values  # b (h w) (p q c)
        expected = patches.reshape(2, 4, 4, 7, 7, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 28, 28)
    else:
        expected = processor(frames, **whole).pixel_values
    # Theirs rounds to uint8 in the resize, with fixed-point weights: about 1 level of 255, on noise.
    tolerance = (1.2 if size != (28, 28) else 0.01) / 255 / min(encoder.std)
    torch.testing.assert_close(encoder.preprocess(frames), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_is_frozen_and_stays_in_evaluation_mode(tmp_path, family):
    save_vision(tmp_path, family)
    encoder = FrozenEncoder(str(tmp_path))
    before = encoder(images(28, 28))
    torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not before.requires_grad and torch.equal(before, encoder(images(28, 28)))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_runs_in_the_precision_of_autocast_or_of_its_parameters(tmp_path, family):
    save_vision(tmp_path, family)
    encoder, frames = FrozenEncoder(str(tmp_path)), images(28, 28)
    exact = encoder(frames)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder(frames).float(), exact, atol=0.1, rtol=0.1)
    features = encoder.to(torch.bfloat16)(frames)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("layernorm.weight", None, "missing layernorm.weight"),
        ("projector.weight", (2,), "unexpected projector.weight"),
        ("layernorm.weight", (5,), r"layernorm.weight is \(5,\), expected \(12,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_and_no_random_weight(tmp_path, key, shape, message):
    save_vision(tmp_path, "dinov2")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(key, None)
    if shape:
        tensors[key] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        FrozenEncoder(str(tmp_path))


def test_a_missing_tensor_of_the_tower_in_use_is_an_error_and_of_the_other_tower_is_none(tmp_path):
    save_vision(tmp_path, "siglip")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_model.final_layer_norm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    FrozenEncoder(str(tmp_path))
    del tensors["vision_model.post_layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing post_layernorm.bias"):
        FrozenEncoder(str(tmp_path))


@pytest.mark.parametrize("encoder", [FrozenEncoder, TextEncoder])
@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder", "nothing"])
def test_an_encoder_that_is_not_there_is_named_with_what_would_fit(encoder, name):
    with pytest.raises(ValueError, match=rf"'{name}'[\s\S]*Expected a hub id such as"):
        encoder(name)


def test_a_folder_without_processor_or_safetensors_and_a_foreign_model_are_refused(tmp_path):
    model, _ = save_vision(tmp_path / "vision", "dinov2")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare.*processor"):
        FrozenEncoder(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="'dinov2' model; expected one of t5"):
        TextEncoder(str(tmp_path / "bare"))
    (tmp_path / "vision" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "vision" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="vision.*safetensors"):
        FrozenEncoder(str(tmp_path / "vision"))


def test_the_fingerprint_is_of_the_weights_and_not_of_their_folder(tmp_path):
    model, processor = save_vision(tmp_path / "a", "dinov2")
    save_vision(tmp_path / "b", "dinov2")
    with torch.no_grad():
        model.layernorm.weight[0] += 1e-6
    model.save_pretrained(tmp_path / "c")
    processor.save_pretrained(tmp_path / "c")
    a, b, c = (FrozenEncoder(str(tmp_path / name)).fingerprint for name in "abc")
    assert a == b != c and len(a) == 16


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_mask_marks_tokens_and_hides_the_other_instructions_of_a_batch(tmp_path, family):
    save_text(tmp_path, text_model(family))
    encoder = TextEncoder(str(tmp_path))
    texts = ["push the red cube", "drawer", "push the red cube", "push the drawer " * 3]
    features, mask = encoder(texts)

    assert features.shape == (*mask.shape, encoder.dim) and mask.dtype == torch.bool
    limit = 9 if family == "t5" else 6
    assert mask.sum(dim=1).tolist() == [4, 1, 4, limit]  # T5's positions are relative, the others end at 6
    torch.testing.assert_close(features[0], features[2])
    alone, _ = encoder(["drawer"])
    torch.testing.assert_close(features[1, :1], alone[0, :1])
    assert not features.requires_grad and not encoder.train().model.training


@pytest.mark.parametrize("family", ["bert", "clip", "siglip2"])
def test_a_text_encoder_without_tokenizer_files_is_an_error_and_no_made_up_tokenizer(tmp_path, family):
    text_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a tokenizer of . tokens for a model of 8"):
        TextEncoder(str(tmp_path))


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, "siglip2"])
def test_a_text_encoder_with_a_missing_tensor_is_an_error(tmp_path, family):
    save_text(tmp_path, text_model(family))
    tensors = load_file(tmp_path / "model.safetensors")
    prefixes = {"t5": "encoder.", "bert": "encoder."}
    key = max(key for key in tensors if key.startswith(prefixes.get(family, "text_model.")))
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing {key.removeprefix('text_model.')}"):
        TextEncoder(str(tmp_path))


@pytest.mark.parametrize("encoder", [FrozenEncoder, TextEncoder, read_parts])
def test_a_model_that_brings_code_is_refused_and_no_question_is_asked(tmp_path, monkeypatch, encoder):
    def ask(*args):
        raise AssertionError("a question on stdin")

    monkeypatch.setattr("builtins.input", ask)
    code = {name: f"odd.{name}" for name in ("AutoConfig", "AutoModel", "AutoImageProcessor")}
    code |= {"AutoTokenizer": ["odd.Slow", "odd.Fast"]}
    config = json.dumps(
        {"model_type": "odd", "auto_map": code, "tokenizer_class": "Odd", "image_processor_type": "Odd"}
    )
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(config)
    (tmp_path / "odd.py").write_text("raise AssertionError('code of the hub ran')")
    with pytest.raises(ValueError, match=f"cannot read '{tmp_path}'"):
        encoder(str(tmp_path))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return FlowTeacher("random", num_flow_updates=2)


def frames(b, h, w):
    return torch.randint(256, (b, 2, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(64, 64), (128, 136), (100, 150)])
def test_flow_has_the_size_of_the_frames_even_where_raft_wants_larger_ones(teacher, size):
    flow = teacher(frames(2, *size))
    assert flow.shape == (2, 2, *size) and flow.dtype == torch.float32 and flow.isfinite().all()


def test_flow_of_small_frames_is_in_their_own_pixels(teacher, monkeypatch):
    seen = []

    def moved(first, second, num_flow_updates):
        seen.append(first.shape)
        return [torch.tensor([4.0, -8.0])[:, None, None].expand(len(first), 2, *first.shape[-2:])]

    monkeypatch.setattr(teacher.raft, "forward", moved)
    flow = teacher(frames(3, 64, 128))  # RAFT sees both sides twice as long
    assert seen == [(3, 3, 128, 256)]
    torch.testing.assert_close(mean_flow(flow), torch.tensor([2.0, -4.0]).expand(3, 2))


def test_flow_is_float32_and_the_same_under_autocast_and_twice(teacher):
    pair = frames(1, 128, 128)
    flow = teacher(pair)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = teacher(pair)
    assert under_autocast.dtype == torch.float32 and torch.equal(flow, under_autocast)
    assert torch.equal(flow, teacher(pair))


def test_the_teacher_is_frozen_stays_in_evaluation_mode_and_keeps_no_correlation_volume(teacher):
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(frames(1, 128, 128)).requires_grad
    assert teacher.raft.corr_block.corr_pyramid is None


def test_weights_come_from_a_safetensors_file_strictly(tmp_path):
    torch.manual_seed(1)
    state = raft_small(weights=None).state_dict()
    path = tmp_path / "raft.safetensors"
    save_file(state, path)
    loaded = FlowTeacher(str(path)).raft.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)

    del state["update_block.flow_head.conv1.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"raft\.safetensors[\s\S]*update_block\.flow_head\.conv1\.weight"):
        FlowTeacher(str(path))


@pytest.mark.parametrize("weights", ["C_T_V9", "nowhere/raft.safetensors", "raft.pth"])
def test_weights_that_are_not_there_are_named_with_what_would_fit(weights):
    with pytest.raises(ValueError, match=f"'{weights}'.*C_T_V2.*safetensors"):
        FlowTeacher(weights)


def test_a_failed_download_names_the_weights_and_where_a_file_would_be_found(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(ValueError, match=f"'C_T_V2'.*raft_small_C_T_V2.*no network.*{tmp_path}"):
        FlowTeacher("C_T_V2")


def test_a_flow_of_2_pixels_at_64_is_one_of_4_at_128():
    flow = torch.tensor([2.0, -1.0])[:, None, None].expand(1, 2, 64, 64)
    larger = resize_flow(flow, (128, 192))
    assert larger.shape == (1, 2, 128, 192)
    torch.testing.assert_close(mean_flow(larger), torch.tensor([[6.0, -2.0]]))  # 3x as wide, 2x as high
    torch.testing.assert_close(resize_flow(larger, (64, 64)), flow)


def test_the_picture_of_no_flow_is_white_and_opposite_flows_differ():
    flow = torch.zeros(3, 2, 4, 4)
    flow[1, 0], flow[2, 0] = 1, -1
    rgb = flow_to_rgb(flow)
    assert rgb.shape == (3, 3, 4, 4) and rgb.dtype == torch.uint8
    assert (rgb[0] == 255).all() and (rgb[1] != rgb[2]).any()


def test_the_loss_is_one_number_a_sample_and_zero_at_the_target():
    torch.manual_seed(0)
    pred, target = torch.randn(2, 3, 2, 8, 8)
    loss = flow_loss(pred, target, 0.1)
    assert loss.shape == (3,) and (loss > 0).all()
    torch.testing.assert_close(flow_loss(target, target, 0.1), torch.zeros(3))
    torch.testing.assert_close(flow_loss(pred[:1], target[:1], 0.1), loss[:1])


def test_both_terms_of_the_loss_have_a_gradient():
    torch.manual_seed(0)
    target = torch.randn(2, 2, 8, 8)

    def gradient(mean_flow_weight):
        pred = torch.zeros_like(target, requires_grad=True)
        flow_loss(pred, target, mean_flow_weight).sum().backward()
        return pred.grad

    assert gradient(0.0).abs().min() > 0
    assert (gradient(1.0) - gradient(0.0)).abs().min() > 0


def test_the_mean_flow_term_sees_a_shift_of_the_whole_and_not_noise_about_it():
    noise = torch.tensor([1.0, -1.0]).repeat(1, 2, 4, 2)  # mean zero
    shift = torch.ones(1, 2, 4, 4)
    target = torch.zeros(1, 2, 4, 4)
    assert flow_loss(noise, target, 1.0) == flow_loss(noise, target, 0.0)
    assert flow_loss(shift, target, 1.0) > 1.9 * flow_loss(shift, target, 0.0)
