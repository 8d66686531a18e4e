import shutil
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from tiny_vlms import FAMILIES, IMAGE_SIZE, TASKS, save_vlm
from toys import write_lerobot

import hlrp.vla
from hlrp.clips import Clips
from hlrp.data import collate
from hlrp.laq import LAQ, LAQConfig
from hlrp.sources import open_source
from hlrp.vla import VLA, LatentSpace, VLAConfig
from hlrp.vla_validation import label
from hlrp.vlm import VLM, VLMConfig

VOCABULARY = {"head": "tokens", "token_rows": "vocabulary"}
CODE_HEADS = [{"head": "tokens"}, VOCABULARY, {"head": "parallel"}]
HEADS = [*CODE_HEADS, {"head": "flow", "expert_dim": 32, "expert_depth": 1}]


def name(value):
    return "-".join(map(str, [*value.values()][:2])) if isinstance(value, dict) else None


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a family."""
    folders = {}

    def get(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            save_vlm(folders[family], family, is_tied=family != "smolvlm")  # as SmolVLM2 is
        return folders[family]

    return get


def make(folder, family="smolvlm", num_tokens=3, codebook_size=5, vector_dim=6, **settings):
    torch.manual_seed(0)
    vlm_config = VLMConfig(str(folder), IMAGE_SIZE[family])
    space = LatentSpace(0.3, num_tokens, codebook_size, vector_dim, image_size=32, fingerprint="")
    return VLA(VLAConfig(**settings, vlm=vlm_config), space, VLM.from_config(vlm_config, TASKS))


def make_batch(vla, rows=4):
    torch.manual_seed(1)
    chunk_size, space = vla.config.chunk_size, vla.space
    return {
        "images": torch.randint(256, (rows, 1, 3, 40, 40), dtype=torch.uint8),
        "task": (TASKS * rows)[:rows],
        "latent_indices": torch.randint(max(1, space.codebook_size), (rows, chunk_size, space.num_tokens)),
        "latent_vectors": torch.randn(rows, chunk_size, space.vector_dim),
    }


def train(vla, batch, steps, lr=1e-2):
    """The loss of each step; the flow's noise is the same in all."""
    optimizer, losses = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], lr), []
    for _ in range(steps):
        torch.manual_seed(2)
        loss, metrics = vla(batch)
        optimizer.zero_grad()
        loss.backward()
        assert not [name for name, p in vla.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        losses.append(loss.item())
    assert loss == metrics["latent_loss"] and ("accuracy" in metrics) == (vla.config.head in ("tokens", "parallel"))
    return losses


def predict(vla, images, tasks, temperature=0.0):
    torch.manual_seed(3)
    predicted = vla.generate(images, tasks, temperature)
    assert (predicted.indices is None) != (predicted.vectors is None)
    return predicted.vectors if predicted.indices is None else predicted.indices


@pytest.mark.parametrize("row", [{"head": "tokens"}, VOCABULARY], ids=name)
def test_code_dropout_hides_the_codes_before_each_one_in_training_alone(row, saved, monkeypatch):
    vla, logits = make(saved("smolvlm"), chunk_size=2, code_dropout=1.0, **row), []
    score = vla.head.score
    monkeypatch.setattr(vla.head, "score", lambda *args: logits.append(args[0]) or score(*args))
    batch = make_batch(vla)
    other = batch | {"latent_indices": (batch["latent_indices"] + 1) % vla.space.codebook_size}
    vla.train()(batch), vla(other), vla.eval()(batch), vla(other)
    hidden, hidden_too, seen, other_seen = logits
    assert torch.equal(hidden, hidden_too)
    assert not torch.allclose(hidden[:, 1], hidden[:, 4])  # which of the two latent actions it is of
    assert torch.equal(seen[:, 0], other_seen[:, 0]) and not torch.allclose(seen[:, 1:], other_seen[:, 1:])

    vla.head.code_dropout = 0.5
    vla.train()(batch)
    is_dropped = [torch.equal(*rows) for rows in zip(logits[-1], hidden, strict=True)]
    assert 0 < sum(is_dropped) < len(is_dropped)


def test_what_tokens_expects_at_a_place_is_the_mean_over_the_sequences_before_it(saved, monkeypatch):
    """Also where the likeliest sequence is not like the mean."""
    vla = make(saved("smolvlm"), num_tokens=2, head="tokens").eval()
    vla.head.rows.data *= 4
    vla.head.embeddings.data *= 30  # what came before counts
    batch = make_batch(vla, rows=2)
    size, exact = vla.space.codebook_size, torch.zeros(2, 1, 2, vla.space.codebook_size)
    for first in range(size):
        for second in range(size):
            codes = torch.tensor([[[first, second]]]).expand(2, -1, -1)
            joint = (-2 * vla.score(batch | {"latent_indices": codes})).exp()  # the score is a mean over two places
            exact[:, 0, 0, first] += joint
            exact[:, 0, 1, second] += joint
    torch.testing.assert_close(exact.sum(-1), torch.ones(2, 1, 2))
    monkeypatch.setattr("hlrp.vla.NUM_DRAWS", 200)
    found = vla.expected(batch["images"], batch["task"])
    torch.testing.assert_close(found, exact, atol=0.08, rtol=0)
    assert ((found[:, 0, 0] - exact[:, 0, 0]).abs() < 1e-5).all()  # nothing stands before the first
    _, behind_the_likeliest = vla.head.continue_(vla.vlm, vla.vlm(batch["images"], batch["task"], use_cache=True), 0.0)
    assert (behind_the_likeliest[:, 1] - exact[:, 0, 1]).abs().amax() > 0.1


@pytest.mark.parametrize("head", ["parallel", "flow"])
def test_what_a_head_expects_has_a_place_for_each_latent_action(saved, head):
    vla = make(saved("smolvlm"), head=head, chunk_size=2, expert_dim=32, expert_depth=1).eval()
    batch = make_batch(vla)
    expected = vla.expected(batch["images"], batch["task"])
    if head == "flow":
        assert expected.shape == (4, 2, 6)
    else:
        torch.testing.assert_close(expected.sum(-1), torch.ones(4, 2, 3))
        assert torch.equal(expected.argmax(-1), vla.generate(batch["images"], batch["task"]).indices)


@pytest.mark.parametrize("settings", HEADS, ids=name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_alone_predicts_what_the_trained_model_predicts(saved, family, settings, tmp_path):
    hub, checkpoint = tmp_path / "hub", tmp_path / "pretrained_model"
    shutil.copytree(saved(family), hub)
    vla = make(hub, family, chunk_size=2, **settings)
    batch = make_batch(vla)
    train(vla, batch, steps=3)
    vla.eval()
    checkpoint.mkdir()
    vla.save_pretrained(checkpoint, step=3)
    shutil.rmtree(hub)

    again = VLA.from_pretrained(checkpoint)
    assert again.space == vla.space and not again.training
    for temperature in (0.0, 1.0):
        found, expected = (predict(m, batch["images"], batch["task"], temperature) for m in (again, vla))
        assert torch.equal(found, expected) and found.shape[:2] == (4, 2)
    errors = []
    for model in (again, vla):
        torch.manual_seed(4)
        errors.append(model.score(batch))
    assert torch.equal(*errors) and errors[0].shape == (4,)


@pytest.mark.parametrize(("num_tokens", "codebook_size"), [(1, 2), (5, 7)])
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("settings", HEADS, ids=name)
def test_any_number_of_tokens_codes_and_latent_actions_is_learned(
    saved, settings, chunk_size, num_tokens, codebook_size
):
    sizes = {"num_tokens": num_tokens, "codebook_size": codebook_size, "chunk_size": chunk_size}
    vla = make(saved("smolvlm"), **sizes, **settings)
    batch = make_batch(vla)
    losses = train(vla, batch, steps=15)
    assert losses[-1] < 0.8 * losses[0]
    size = 6 if vla.config.head == "flow" else num_tokens
    assert predict(vla.eval(), batch["images"], batch["task"]).shape == (4, chunk_size, size)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_over_the_vocabulary_and_its_gradients_are_those_of_transformers_labels(tmp_path, family, is_tied):
    reference, _ = save_vlm(tmp_path, family, is_tied)
    vla = make(tmp_path, family, chunk_size=2, **VOCABULARY)
    batch, (vlm, head) = make_batch(vla, rows=2), (vla.vlm, vla.head)
    num_words, codes = vlm.vocab_size, torch.arange(3 * 5).view(3, 5)  # rows behind those of the words
    reference.resize_token_embeddings(num_words + codes.numel(), mean_resizing=False)
    with torch.no_grad():
        if is_tied:
            head.rows.copy_(head.embeddings)
        reference.get_input_embeddings().weight[num_words:] = head.embeddings.flatten(0, 1)
        reference.lm_head.weight[num_words:] = head.rows.flatten(0, 1)

    prompts = [vlm.prompt(task, 1).ids for task in batch["task"]]
    longest = max(map(len, prompts))
    prompts = torch.stack([F.pad(ids, (longest - len(ids), 0), value=-1) for ids in prompts])
    suffix = num_words + codes[torch.arange(3), batch["latent_indices"]].flatten(1)
    ids = torch.cat([prompts, suffix], dim=1)
    inputs = {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}
    inputs |= {"labels": ids.masked_fill(ids < num_words, -100), **vlm.preprocess(batch["images"])}
    if vlm.is_qwen:
        inputs["mm_token_type_ids"] = (ids == vlm.config.image_token_id).int()
    if vlm.is_paligemma:
        inputs["token_type_ids"] = (ids >= num_words).long()
    if family == "gemma3":  # the tokens of an image attend to each other in both directions
        inputs["token_type_ids"] = (ids == vlm.config.image_token_id).long()
    expected = reference.train()(**inputs).loss
    expected.backward()
    loss, _ = vla(batch)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found = {key.removeprefix("vlm."): parameter.grad for key, parameter in vla.named_parameters()}
    rows, embeddings = (found.pop(f"head.{key}").flatten(0, 1) for key in ("rows", "embeddings"))
    embedding = next(key for key in found if key.endswith("embed_tokens.weight"))
    found[embedding] = torch.cat([found[embedding], embeddings + rows if is_tied else embeddings])
    if not is_tied:
        found["lm_head.weight"] = torch.cat([found["lm_head.weight"], rows])
    gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-4 * largest + 1e-6, msg=key)


@pytest.mark.parametrize("settings", CODE_HEADS[:2], ids=name)
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_one_after_another_are_those_of_a_greedy_search_without_a_cache(saved, family, settings):
    vla = make(saved(family), family, chunk_size=2, **settings).eval()
    batch, head, errors = make_batch(vla), vla.head, []
    codes = torch.empty(4, 0, dtype=torch.int64)
    with torch.no_grad():
        head.embeddings.normal_()  # so that each code changes the next
        for i in range(6):
            suffix = vla.vlm.embed_scale * head.embed(codes)
            logits = vla.vlm(batch["images"], batch["task"], suffix).hidden[:, -1] @ head.rows[i % 3].T
            codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
            errors.append(F.cross_entropy(logits, codes[:, -1], reduction="none"))
    codes = codes.view(4, 2, 3)
    assert torch.equal(predict(vla, batch["images"], batch["task"]), codes) and len(codes.unique(dim=0)) > 1
    if settings != VOCABULARY:  # there, words take part in the softmax
        score = vla.score(batch | {"latent_indices": codes})
        torch.testing.assert_close(score, torch.stack(errors).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", CODE_HEADS, ids=name)
def test_ten_thousand_samples_are_valid_codes_as_frequent_as_the_softmax_says(saved, settings):
    vla = make(saved("smolvlm"), num_tokens=4, **settings).eval()
    image, task, rows = torch.randint(256, (1, 1, 3, 46, 46), dtype=torch.uint8), TASKS[:1], 2500
    codes = predict(vla, image.expand(rows, -1, -1, -1, -1), task * rows, temperature=1.0)
    assert codes.shape == (rows, 1, 4) and codes.min() == 0 and codes.max() == 4
    with torch.no_grad():
        is_parallel = vla.config.head == "parallel"
        hidden = (
            vla.head.encode(vla.vlm, image, task).hidden[:, -vla.head.length :]
            if is_parallel
            else vla.vlm(image, task).hidden
        )
        first = hidden[:, :1] if is_parallel else hidden[:, -1:]
        expected = rows * vla.head.logits(first).softmax(-1).flatten()
    counts = codes[:, 0, 0].bincount(minlength=5)
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 1).all() and (counts > 0).sum() > 1


def labelled_batch(vla):
    batch = make_batch(vla)
    is_pad = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]]).bool()
    action = torch.randn(4, 3, 2)
    return batch | {"action": action, "action_is_pad": is_pad, "source": torch.tensor([0, 1, 0, 1])}


def action_loss(vla, batch):
    torch.manual_seed(2)
    vla.zero_grad()
    loss, metrics = vla(batch)
    ((loss - metrics["latent_loss"]) / vla.config.action_weight).backward()  # what is left: the action's
    return metrics["action_loss"], vla.to_action.weight.grad.clone()


@pytest.mark.parametrize("settings", HEADS, ids=name)
def test_the_action_loss_is_of_labelled_samples_alone_and_exact_however_they_are_split(saved, settings):
    vla = make(saved("smolvlm"), action_weight=0.5, action_dim=2, action_sources=2, **settings)
    torch.nn.init.normal_(vla.to_action.weight)
    batch = labelled_batch(vla)
    loss, metrics = vla(batch)
    torch.testing.assert_close(loss, metrics["latent_loss"] + 0.5 * metrics["action_loss"])
    whole, gradient = action_loss(vla, batch)

    other = batch["action"].masked_fill(batch["action_is_pad"][..., None], 1e4)
    assert torch.equal(action_loss(vla, batch | {"action": other})[0], whole)
    without = {k: [x for i, x in enumerate(v) if i != 1] for k, v in batch.items()}
    without = {k: v if k == "task" else torch.stack(v) for k, v in without.items()}
    torch.testing.assert_close(action_loss(vla, without), (whole, gradient))

    halves = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]  # 1 and 2 labelled samples
    parts = [action_loss(vla, half | {"num_labelled": torch.tensor(3 / 2)}) for half in halves]
    mean = tuple(torch.stack(values).mean(0) for values in zip(*parts, strict=True))
    torch.testing.assert_close(mean, (whole, gradient))
    unlabelled = batch | {"action_is_pad": torch.ones(4, 3, dtype=torch.bool)}
    assert action_loss(vla, unlabelled)[0] == 0


class Poisoned:
    """A source of whose frames all behind `last` are inverted."""

    def __init__(self, source, last):
        self.source, self.last = source, last

    def __getattr__(self, key):
        return getattr(self.source, key)

    def read(self, episode, indices):
        read = self.source.read(episode, indices)
        is_later = torch.as_tensor(indices)[:, None, None, None] > self.last
        return read | {"frames": torch.where(is_later, 255 - read["frames"], read["frames"])}


@pytest.mark.parametrize("settings", HEADS, ids=name)
def test_latent_actions_past_the_episode_count_for_nothing(saved, settings):
    vla = make(saved("smolvlm"), chunk_size=3, **settings)
    train(vla, make_batch(vla), steps=2)
    batch = make_batch(vla) | {"latent_is_pad": torch.zeros(4, 3, dtype=torch.bool)}
    batch["latent_is_pad"][0, 1:], batch["latent_is_pad"][1, 2] = True, True

    def scores(batch):
        torch.manual_seed(4)
        return vla.eval().score(batch)

    before = scores(batch)
    assert not torch.equal(before[:2], scores(batch | {"latent_is_pad": torch.zeros(4, 3, dtype=torch.bool)})[:2])
    batch["latent_indices"][0, 1:], batch["latent_vectors"][0, 1:] = (-1, float("nan"))  # as hlrp.label leaves them
    assert torch.equal(scores(batch), before)


def learned(vla, batch, term, weight=2.0) -> list[float]:
    """What a term that has this weight beside the latent loss is in each of 20 steps."""
    optimizer, values = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], 1e-2), []
    for _ in range(20):
        loss, metrics = vla(batch)
        torch.testing.assert_close(loss.detach(), metrics["latent_loss"] + weight * metrics[term])
        values.append(metrics[term].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values


@pytest.mark.parametrize("settings", HEADS, ids=name)
def test_image_tokens_learn_to_tell_the_features_of_the_image(saved, settings):
    vla = make(saved("smolvlm"), feature_weight=2.0, feature_dim=24, **settings)
    batch = make_batch(vla)
    batch["features"] = torch.randn(4, 4 * vla.vlm.num_image_tokens, 6)  # 2 x 2 patches a token
    terms = learned(vla, batch, "feature_loss")
    assert terms[-1] < 0.9 * terms[0]


@pytest.mark.parametrize("settings", HEADS, ids=name)
def test_the_last_word_learns_where_the_named_thing_is_from_the_samples_that_know_it(saved, settings):
    vla = make(saved("smolvlm"), point_weight=2.0, **settings)
    batch = make_batch(vla)
    batch["point"] = torch.rand(4, 2) * 2 - 1
    batch["point"][1] = torch.nan
    terms = learned(vla, batch, "point_loss")
    assert terms[-1] < 0.7 * terms[0]

    hidden, point, known = torch.randn(4, vla.vlm.dim), batch["point"], [0, 2, 3]
    expected = vla.point_loss(hidden, {"point": point})
    torch.testing.assert_close(vla.point_loss(hidden[known], {"point": point[known]}), expected)
    count = {"num_points": torch.tensor(3 / 2)}
    halves = [vla.point_loss(hidden[half], {"point": point[half]} | count) for half in ([0, 1], [2, 3])]
    torch.testing.assert_close(sum(halves) / 2, expected)
    vla.zero_grad()
    nothing = vla.point_loss(hidden, {})
    nothing.backward()  # every rank takes part, whatever its samples know
    assert nothing == 0 and not vla.to_point.weight.grad.any()


@pytest.mark.parametrize("scheme", ["world", "lerobot"])
def test_poisoned_futures_change_the_labels_and_nothing_that_a_model_sees_or_predicts(saved, scheme, tmp_path):
    uri = "world:clean?episodes=3" if scheme == "world" else f"lerobot:{write_lerobot(tmp_path / 'data', codec=None)}"
    source = open_source(uri)
    laq = LAQ(LAQConfig(image_size=16, patch_size=8, codebook_size=16, num_tokens=4)).eval()

    def batch_of(source_at):
        samples = []
        for i in (0, 3, 9, 14):
            t = Clips(source, range(3), (0.0, 0.3, 0.6))[i]["index"]
            clips = Clips(source_at(t), range(3), (0.0, 0.3, 0.6), image_size=16, input_size=46)
            samples.append(clips[i])
        batch = collate(samples)
        return batch | label(laq, batch["frames"])

    clean, poisoned = batch_of(lambda t: source), batch_of(lambda t: Poisoned(source, t))
    changed = {
        key
        for key, value in clean.items()
        if not (torch.equal(value, poisoned[key]) if torch.is_tensor(value) else value == poisoned[key])
    }
    assert changed == {"frames", "latent_vectors", "latent_indices"} and "images" in clean
    assert torch.equal(clean["frames"][:, 0], poisoned["frames"][:, 0])
    sizes = {"num_tokens": 4, "codebook_size": 16, "vector_dim": clean["latent_vectors"].shape[-1]}
    for settings in HEADS:
        vla = make(saved("smolvlm"), chunk_size=2, **sizes, **settings)
        found, expected = (predict(vla, batch["images"], batch["task"], 1.0) for batch in (poisoned, clean))
        assert torch.equal(found, expected)
        assert train(vla, clean, steps=1) != train(vla, poisoned, steps=1)


def test_a_new_head_is_one_class_and_one_line_of_the_table(monkeypatch):
    class Regression(hlrp.vla.Head):
        target = "latent_vectors"

        def __init__(self, dim, space, config):
            super().__init__()
            self.to_vectors = torch.nn.Linear(dim, space.vector_dim)

        def expected(self, vlm, images, tasks):
            return self.to_vectors(vlm(images, tasks).hidden[:, -1:])

        def forward(self, vlm, images, tasks, latents, is_pad):
            prompt = vlm(images, tasks)
            errors = (self.to_vectors(prompt.hidden[:, -1:]) - latents).square().mean((1, 2))
            return hlrp.vla.Scored(errors, prompt, {})

        def generate(self, vlm, images, tasks, temperature):
            return hlrp.vla.Predicted(None, self.expected(vlm, images, tasks))

    assert get_args(hlrp.vla.HeadName) == tuple(hlrp.vla.HEADS)  # what --help lists
    monkeypatch.setitem(hlrp.vla.HEADS, "regression", Regression)
    config = VLAConfig(head="regression", vlm=VLMConfig(image_size=32))
    space = LatentSpace(0.3, 0, 0, vector_dim=6, image_size=32, fingerprint="")
    vla = VLA(config, space, VLM.from_config(config.vlm, TASKS))
    batch = make_batch(vla)
    losses = train(vla, batch, steps=10)
    assert losses[-1] < 0.9 * losses[0]
    assert vla.generate(batch["images"], batch["task"]).vectors.shape == (4, 1, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "words"}, "head='words'; expected one of tokens, parallel, flow"),
        ({"head": "tokens", "token_rows": "words"}, "token_rows='words'; expected one of codes, vocabulary"),
        ({"head": "flow", "token_rows": "vocabulary"}, "token_rows='vocabulary' .* head=flow has none"),
        ({"feature_weight": -1.0}, "feature_weight=-1.0; expected 0 or more"),
        ({"chunk_size": 0}, "chunk_size=0; expected 1 or more"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"head": "flow", "expert_dim": 30}, "expert_dim=30; expected a multiple of 4"),
        ({"head": "flow", "expert_depth": 0}, "expert_depth=0"),
        ({"action_weight": -1.0}, "action_weight=-1.0; expected 0 or more"),
        ({"point_weight": -1.0}, "point_weight=-1.0; expected 0 or more"),
        ({"head": "tokens", "code_dropout": 1.5}, "code_dropout=1.5; expected 0 to 1"),
        ({"head": "flow", "code_dropout": 0.5}, "code_dropout=0.5; expected .* with head=tokens alone"),
        ({"action_weight": 1.0}, "action_weight=1.0, but no source in the data has actions"),
        ({"head": "tokens", "num_tokens": 0}, "head=tokens predicts codes, and this LAQ has none; expected head=flow"),
        (
            {"head": "parallel", "num_tokens": 0},
            "head=parallel predicts codes, and this LAQ has none; expected head=flow",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named_with_what_would(saved, settings, message):
    with pytest.raises(ValueError, match=message):
        make(saved("smolvlm"), **settings)
