import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES, IMAGE_SIZE, TASKS, save_vlm
from torch import nn

from hlrp.backbones import PatchProjection
from hlrp.checkpoints import load_weights, save_pretrained
from hlrp.vlm import VLM, VLMS, VLMConfig, tiny_tokenizer

# what transformers calls deprecated is called by its new name
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """folder, transformers' model and processor of a family."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, *save_vlm(folder, family)
        return made[family]

    return get


def config(folder, family, **options):
    return VLMConfig(str(folder), **{"image_size": IMAGE_SIZE[family], **options})


def images(size, views=1, rows=2):
    generator = torch.Generator().manual_seed(views)
    return torch.randint(256, (rows, views, 3, size, size), dtype=torch.uint8, generator=generator)


def suffix(vlm, length=3):
    return 0.3 * torch.randn(2, length, vlm.dim, generator=torch.Generator().manual_seed(9))


def process(processor, family, views, task, **options):
    """What transformers' own processor gives for one row, without crops of large images."""
    if family == "internvl":
        options["crop_to_patches"] = False
    if family == "paligemma":
        text = "<image>" * len(views) + task
    else:
        content = [{"type": "image"}] * len(views) + [{"type": "text", "text": task}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[text], images=[[*views]], return_tensors="pt", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_at_the_last_image_follow_it_alone_of_all_views(saved, family):
    vlm = VLM.from_config(config(saved(family)[0], family), []).eval()
    pixels, tasks = images(IMAGE_SIZE[family], views=2), [*TASKS]
    with torch.no_grad():
        prompt = vlm(pixels, tasks)
        found = vlm.at_image(prompt, tasks, num_views=2)
    assert found.shape == (2, vlm.num_image_tokens, vlm.dim)
    for row, task in enumerate(tasks):
        ids = vlm.prompt(task, 2).ids
        hidden = prompt.hidden[row, -len(ids) :][ids == vlm.config.image_token_id]
        assert torch.equal(found[row], hidden[-vlm.num_image_tokens :])


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_hidden_states_are_those_of_transformers_own_processor_and_model(saved, family, num_views):
    folder, model, processor = saved(family)
    vlm = VLM.from_config(config(folder, family), []).eval()
    pixels = images(IMAGE_SIZE[family], num_views)
    for row, task in zip(pixels, TASKS, strict=True):
        expected = process(processor, family, row, task)
        expected.pop("labels", None)
        ids = vlm.prompt(task, num_views).ids
        assert ids.tolist() == expected["input_ids"][0].tolist()
        assert (ids == vlm.config.image_token_id).sum() == num_views * vlm.num_image_tokens
        found = vlm.preprocess(row[None])
        torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
        if "qwen" in family:
            assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
        with torch.no_grad():
            hidden, expected = vlm(row[None], [task]).hidden, model.model(**expected).last_hidden_state
            logits = model.lm_head(expected)
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
        if family == "paligemma":
            logits = 30 * torch.tanh(logits / 30)  # Gemma 2 (arXiv:2408.00118), Sec. 2
        torch.testing.assert_close(vlm.vocab_logits(hidden), logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [20, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_resized_pixels_are_those_of_transformers_own_processor(saved, family, size):
    folder, _, processor = saved(family)
    vlm, pixels = VLM.from_config(config(folder, family), []), images(size, rows=1)
    expected = process(processor, family, pixels[0], "push")["pixel_values"]
    tolerance = 1.2 / 255 / min(processor.image_processor.image_std)  # theirs rounds to uint8 in the resize
    torch.testing.assert_close(vlm.preprocess(pixels)["pixel_values"], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_suffix_is_what_transformers_makes_of_the_same_tokens_behind_the_prompt(saved, family):
    folder, model, processor = saved(family)
    vlm = VLM.from_config(config(folder, family), []).eval()
    row, tokens = images(IMAGE_SIZE[family], views=2)[:1], torch.tensor([[40, 50, 60]])
    inputs = process(processor, family, row[0], TASKS[0])
    inputs.pop("labels", None)
    is_causal = int(family == "paligemma")  # what its token_type_ids call so; for Gemma 3, 1 is an image
    suffix_inputs = {"input_ids": tokens, "attention_mask": 1, "token_type_ids": is_causal, "mm_token_type_ids": 0}
    for key, value in suffix_inputs.items():
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.zeros_like(tokens) + value], dim=1)
    with torch.no_grad():
        embeds = vlm.model.get_input_embeddings()(tokens)
        hidden, expected = vlm(row, TASKS[:1], embeds).hidden, model.model(**inputs).last_hidden_state
        changed = vlm(row, TASKS[:1], torch.cat([embeds[:, :2], -embeds[:, 2:]], dim=1)).hidden
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(changed[:, :-1], hidden[:, :-1], atol=1e-5, rtol=0)  # causal
    assert (changed[:, -1] - hidden[:, -1]).abs().max() > 0.01


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_rows_do_not_depend_on_padding_nor_on_the_pieces_in_which_a_suffix_comes(saved, family):
    torch.manual_seed(0)
    settings = VLMConfig() if family == "tiny" else config(saved(family)[0], family)
    vlm = VLM.from_config(settings, TASKS)  # in training mode: nothing may depend on it
    pixels, actions = images(50, views=2), suffix(vlm)
    with torch.no_grad():
        whole, prompts = vlm(pixels, TASKS, actions), vlm(pixels, TASKS, use_cache=True)
        first = vlm.extend(prompts, actions[:, :1])
        other = vlm.extend(prompts, -actions[:, :1])  # a cache may be continued twice
        pieces = vlm.extend(first, actions[:, 1:])
        alone = [vlm(pixels[i : i + 1], TASKS[i : i + 1], actions[i : i + 1]) for i in range(2)]

    assert whole.hidden.shape == (*whole.mask.shape, vlm.dim) and whole.hidden.isfinite().all()
    assert torch.equal(pieces.mask, whole.mask) and not whole.mask.all() and whole.mask[:, -4:].all()
    torch.testing.assert_close(pieces.hidden[whole.mask], whole.hidden[whole.mask], atol=1e-4, rtol=1e-4)
    for i in range(2):
        n = alone[i].hidden.shape[1]
        assert whole.mask[i].sum() == n
        torch.testing.assert_close(whole.hidden[i, -n:], alone[i].hidden[0], atol=1e-4, rtol=1e-4)
    assert (other.hidden[:, -1] - first.hidden[:, -1]).abs().max() > 0.01
    assert (whole.hidden[0, -3:] - whole.hidden[1, -3:]).abs().max() > 0.01


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_a_checkpoint_rebuilds_the_model_without_the_folder_it_came_from(tmp_path, family, is_tied, lora_rank):
    torch.manual_seed(0)
    if family != "tiny":
        save_vlm(tmp_path / "hub", family, is_tied, torch.bfloat16)
    name = "tiny" if family == "tiny" else str(tmp_path / "hub")
    settings = VLMConfig(name, IMAGE_SIZE.get(family), lora_rank=lora_rank)
    vlm = VLM.from_config(settings, TASKS)
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    checkpoint = tmp_path / "pretrained_model"
    checkpoint.mkdir()
    save_pretrained(checkpoint, vlm, {})
    vlm.save_parts(checkpoint / "vlm")
    shutil.rmtree(tmp_path / "hub", ignore_errors=True)

    again = VLM.from_folder(checkpoint / "vlm", settings)
    load_weights(checkpoint, again)
    facts = [(m.dim, m.image_size, m.num_image_tokens, m.vocab_size, m.vocab_head.shape) for m in (vlm, again)]
    assert facts[0] == facts[1] and facts[0][4] == (vlm.vocab_size, vlm.dim)
    trainable = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (vlm, again)]
    assert trainable[0] == trainable[1] and all(("lora" in name) == bool(lora_rank) for name in trainable[0])
    assert ("lm_head.weight" in vlm.state_dict()) == (not is_tied and family != "tiny")
    with torch.no_grad():
        expected, found = (m(images(50), TASKS, suffix(m)).hidden for m in (vlm, again))
    assert torch.equal(found, expected) and {p.dtype for p in vlm.parameters()} == {torch.float32}
    written = "".join(path.read_text() for path in (checkpoint / "vlm").iterdir())
    assert str(tmp_path) not in written


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("norm.weight", None, "missing .*norm.weight"),
        ("projector.weight", (2,), "unexpected projector.weight"),
        ("norm.weight", (5,), r"norm.weight is \(5,\), expected \(16,\)"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_an_error_and_no_random_weight(tmp_path, family, key, shape, message):
    save_vlm(tmp_path, family)
    tensors = load_file(tmp_path / "model.safetensors")
    full = next((name for name in tensors if name.endswith(f"model.{key}")), key)
    tensors.pop(full, None)
    if shape:
        tensors[full] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        VLM.from_config(config(tmp_path, family), [])


@pytest.mark.parametrize("family", FAMILIES)
def test_older_folders_with_a_stored_tied_head_and_a_template_in_json_are_read(tmp_path, saved, family):
    save_vlm(tmp_path, family)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    if (template := tmp_path / "chat_template.jinja").exists():
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
        template.unlink()
    vlm, expected = (VLM.from_config(config(folder, family), []) for folder in (tmp_path, saved(family)[0]))
    assert torch.equal(vlm.prompt(TASKS[0], 1).ids, expected.prompt(TASKS[0], 1).ids)
    assert vlm.state_dict().keys() == expected.state_dict().keys()


def test_a_smolvla_policy_gives_its_vision_language_model(tmp_path, saved):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    base = str(saved("smolvlm")[0])
    torch.manual_seed(1)
    features = {"observation.state": PolicyFeature(FeatureType.STATE, (2,))}
    features["observation.images.top"] = PolicyFeature(FeatureType.VISUAL, (3, 46, 46))
    action = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    sizes = {"num_vlm_layers": 1, "device": "cpu", "vlm_model_name": base, "load_vlm_weights": False}
    policy = SmolVLAPolicy(SmolVLAConfig(input_features=features, output_features=action, **sizes))
    policy.save_pretrained(tmp_path)
    vlm = VLM.from_config(config(tmp_path, "smolvlm"), [])
    theirs = policy.model.vlm_with_expert.vlm.model.state_dict()
    ours = vlm.model.state_dict()
    assert ours.keys() == theirs.keys() and len(vlm.layers) == 1 and vlm.dim == 16
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in ours.items())
    assert torch.equal(
        vlm.prompt(TASKS[0], 1).ids, VLM.from_config(config(base, "smolvlm"), []).prompt(TASKS[0], 1).ids
    )
    vlm.save_parts(tmp_path / "parts")
    assert (
        VLM.from_folder(tmp_path / "parts", config(tmp_path, "smolvlm")).state_dict().keys() == vlm.state_dict().keys()
    )

    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.vlm_with_expert.vlm.model.text_model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is no checkpoint of SmolVLMForConditionalGeneration: missing .*norm.weight"):
        VLM.from_config(config(tmp_path, "smolvlm"), [])


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_hidden_states_survive_autocast(saved, family):
    torch.manual_seed(0)
    settings = VLMConfig() if family == "tiny" else config(saved(family)[0], family)
    vlm = VLM.from_config(settings, TASKS).eval()
    with torch.no_grad():
        exact = vlm(images(50), TASKS, suffix(vlm))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = vlm.extend(vlm(images(50), TASKS, use_cache=True), suffix(vlm))
    torch.testing.assert_close(rounded.hidden[exact.mask].float(), exact.hidden[exact.mask], atol=0.3, rtol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_its_tokenizer_or_processor_is_an_error(tmp_path, family):
    save_vlm(tmp_path, family)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="token"):
        VLM.from_config(config(tmp_path, family), [])
    save_vlm(tmp_path, family)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        VLM.from_config(config(tmp_path, family), [])


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("smolvlm", {"image_size": 30}, "image_size=30; expected 46 or a multiple of 14 up to 42 for"),
        ("smolvlm", {"image_size": 56}, "image_size=56"),
        ("qwen2_5_vl", {"image_size": 28}, "image_size=28; expected .* a multiple of 8 up to 32"),
        ("paligemma", {"image_size": 21}, "image_size=21; expected 28 for [^ ]*$"),
        ("internvl", {"image_size": 14}, "image_size=14; expected 28 for [^ ]*$"),
        ("tiny", {"image_size": 100}, "image_size=100; expected a multiple of 16 from 16 up for tiny"),
        ("tiny", {"freeze_layers": 5}, "freeze_layers=5; expected 0 to 4"),
        ("tiny", {"freeze": ("text",)}, r"freeze=\['text'\]; expected some of vision, language"),
        ("tiny", {"lora_rank": -1}, "lora_rank=-1"),
        ("tiny", {"lora_rank": 2, "freeze_layers": 4}, "lora_rank=2, but .* leave no layer to adapt"),
        ("nobody/nothing", {}, "'nobody/nothing'[\\s\\S]*Expected a hub id such as"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_what_would(saved, family, options, message):
    name = str(saved(family)[0]) if family in FAMILIES else family
    with pytest.raises(ValueError, match=message):
        VLM.from_config(VLMConfig(name, **options), TASKS)


def test_a_family_that_is_not_read_names_those_that_are(tmp_path):
    T.LlavaOnevisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a 'llava_onevision' model; expected one of {', '.join(VLMS)}"):
        VLM.from_config(VLMConfig(str(tmp_path)), [])


def test_an_instruction_that_holds_an_image_token_is_an_error():
    vlm = VLM.from_config(VLMConfig(), TASKS)
    with pytest.raises(ValueError, match=r"'see <\|image_pad\|>'"):
        vlm.prefix(images(64), ["push", "see <|image_pad|>"])


@pytest.mark.parametrize("options", [{}, {"image_size": 28}, {"image_size": 42}])
def test_a_smaller_image_has_fewer_tokens(saved, options):
    vlm = VLM.from_config(VLMConfig(str(saved("smolvlm")[0]), **options), [])
    side = {None: 3, 28: 2, 42: 3}[options.get("image_size")]
    assert vlm.num_image_tokens == side**2 and vlm(images(64), TASKS).hidden.isfinite().all()


@pytest.mark.parametrize("is_biased", [True, False])
def test_patches_are_projected_by_one_product_that_equals_the_convolution(is_biased):
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=is_biased)
    patches = torch.randn(5, 3, 2, 4, 4)
    projection = PatchProjection.of(conv)
    torch.testing.assert_close(projection(patches), conv(patches).flatten(1))
    assert projection.state_dict().keys() == conv.state_dict().keys() and projection.weight is conv.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_gets_no_gradient_and_all_else_does(saved, family):
    folder = saved(family)[0]
    text, vision = (f"model.{getattr(VLMS[family], part)}" for part in ("text", "vision"))
    cases = {
        ("vision",): lambda name: name.startswith(vision) and "merger" not in name,
        ("language",): lambda name: name.startswith(text),
        (): lambda name: name.startswith(f"{text}.layers.0."),
    }
    for freeze, is_frozen in cases.items():
        vlm = VLM.from_config(config(folder, family, freeze=freeze, freeze_layers=int(not freeze)), [])
        encoded = vlm(images(32), TASKS, suffix(vlm))
        encoded.hidden[:, -4:].square().sum().backward()
        for name, parameter in vlm.named_parameters():
            assert parameter.requires_grad != is_frozen(name), name
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_dropout_is_off_in_what_is_frozen_and_on_elsewhere(saved):
    torch.manual_seed(0)
    vlm = VLM.from_config(VLMConfig(str(saved("smolvlm")[0]), freeze=("vision",)), [])
    for layer in [*vlm.layers, *vlm.blocks]:
        layer.self_attn.attention_dropout = layer.self_attn.dropout = 0.5
    pixels = vlm.preprocess(images(64))["pixel_values"]
    features = [vlm.model.get_image_features(pixels).last_hidden_state for _ in range(2)]
    hidden = [vlm(images(64), TASKS).hidden for _ in range(2)]
    assert torch.equal(*features) and not torch.equal(*hidden)
    assert not any(module.training for module in vlm.eval().modules())


def gradients_and_saved_numbers(vlm):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        hidden = vlm(images(32), TASKS, suffix(vlm)).hidden
    hidden[:, -4:].square().sum().backward()
    return [parameter.grad for parameter in vlm.parameters() if parameter.requires_grad], sum(saved)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_saves_activations_and_changes_no_gradient(saved, family, lora_rank):
    results = []
    for is_on in (False, True):
        torch.manual_seed(0)
        settings = config(saved(family)[0], family, lora_rank=lora_rank, gradient_checkpointing=is_on)
        results.append(gradients_and_saved_numbers(VLM.from_config(settings, [])))
    (expected, many), (found, few) = results
    assert few < 0.7 * many and None not in found
    for gradients in zip(found, expected, strict=True):
        torch.testing.assert_close(*gradients)


def test_adapters_start_as_nothing_and_freeze_all_else():
    torch.manual_seed(0)
    vlm = VLM.from_config(VLMConfig(), TASKS)
    adapted = VLM.from_config(VLMConfig(lora_rank=4, freeze_layers=2), TASKS)
    weights = vlm.state_dict()
    adapted.load_state_dict(weights | {k: v for k, v in adapted.state_dict().items() if "lora_" in k}, strict=False)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 7 * 2 and all("lora_" in name and ".layers.0." not in name for name in names)
    assert all(f".layers.{i}." not in name for name in names for i in range(2))


def test_the_repeated_layers_are_named_and_the_model_copies():
    vlm = VLM.from_config(VLMConfig(), TASKS).eval()
    assert {cls.__name__ for cls in vlm.block_classes()} == {"Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"}
    copied = copy.deepcopy(vlm)
    nn.init.zeros_(vlm.vocab_head)
    assert copied.vocab_head.abs().sum() > 0
    assert all(a is not b for a, b in zip(copied.layers, vlm.layers, strict=True))


def test_tiny_is_small_and_its_tokenizer_knows_every_text():
    torch.manual_seed(0)
    vlm = VLM.from_config(VLMConfig(), TASKS)
    assert 1e6 < sum(parameter.numel() for parameter in vlm.parameters()) < 5e6
    assert vlm.image_size == 64 and vlm.num_image_tokens == 16
    assert VLM.from_config(VLMConfig(image_size=32), TASKS).num_image_tokens == 16
    for text in ["push the red cube", "Öffne 抽屉 🤖\n", ""]:
        ids = vlm.tokenizer(text, add_special_tokens=False).input_ids
        assert vlm.tokenizer.decode(ids) == text
    assert len(vlm.tokenizer("push the red cube").input_ids) == 4
    shuffled = tiny_tokenizer([*reversed(TASKS), *TASKS])
    assert shuffled.get_vocab() == vlm.tokenizer.get_vocab()


def test_importing_the_module_imports_no_transformers():
    code = "import sys, hlrp.vlm; assert not {'transformers', 'peft', 'tokenizers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
