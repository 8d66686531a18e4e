import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hlrp.contract import split_episodes
from hlrp.inverse import ACTIONS, Args, PseudoLabelled, actions_of, main
from hlrp.laq import LAQ, LAQConfig, LatentActions
from hlrp.sources import open_source

DATA = "world:arm?episodes=40"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inverse") / "labels"
    main(Args(DATA, folder, features="pixels", delta=0.1, demonstrations=1, val_fraction=0.2, image_size=32, steps=120))
    return folder


@pytest.fixture(scope="module")
def laq(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laq")
    torch.manual_seed(0)
    model = LAQ(LAQConfig(image_size=32, patch_size=8, quantizer="none"))
    torch.nn.init.normal_(model.to_change.weight)
    model.save_pretrained(folder, data=(DATA,), step=0, report=None)
    return folder


def test_few_demonstrations_label_the_other_video(folder):
    facts, source = json.loads((folder / "inverse.json").read_text()), open_source(DATA)
    assert facts["action_r2"] > 0.15
    assert load_file(folder / ACTIONS)["actions"].shape == (source.lengths.sum(), 2)
    shown = np.array(facts["demonstrations"])
    labelled = PseudoLabelled(source, folder, shown)
    other = next(e for e in range(40) if e not in shown)
    true, pseudo = (s.actions(other, range(source.lengths[other] - 1)) for s in (source, labelled))
    assert not torch.equal(true, pseudo)
    assert torch.equal(labelled.actions(int(shown[0]), [0, 1]), source.actions(int(shown[0]), [0, 1]))
    assert labelled.fingerprint != source.fingerprint
    assert labelled.instructions(other, [0]) == source.instructions(other, [0])


class CoarseChange:
    """Stands for a LAQ whose latent action is the change of 8 x 8 pixels."""

    config, image_size, num_views = SimpleNamespace(delta=0.2), 64, 1

    fingerprint = "coarse"

    def requires_grad_(self, value):
        return self

    def to(self, device):
        return self

    def observe(self, frames):
        return frames.float() / 255

    def embed(self, frames):  # b t c h w -> b t 1 (c 8 8)
        return F.adaptive_avg_pool2d(frames.flatten(0, 1), 8).flatten(1)[None, :, None]

    def between(self, first, second):
        return LatentActions(second - first, None)


def test_actions_are_read_off_latent_actions_and_not_off_those_of_other_pairs(monkeypatch, tmp_path):
    monkeypatch.setattr("hlrp.inverse.LAQ.from_pretrained", lambda folder: CoarseChange())

    def score(**settings):
        folder = tmp_path / "-".join(map(str, settings.values()))
        main(Args("world:arm?episodes=100&kinds=move", folder, demonstrations=12, val_fraction=0.2, **settings))
        facts = json.loads((folder / "inverse.json").read_text())
        assert len(facts["action_r2_per_dim"]) == len(facts["mean_action_r2_per_dim"]) == 2
        return facts["mean_action_r2"]

    assert score(features="laq") > 0.15 and score(features="pca") > 0.15
    assert score(features="laq", shuffle_latents=True) < 0


def test_an_action_is_the_mean_of_what_all_pairs_around_it_say():
    pairs = torch.tensor([[[1.0], [10.0]], [[3.0], [30.0]], [[5.0], [50.0]]])  # p n a, of frames 0 to 4
    found = actions_of(pairs, 5, torch.tensor([7.0]))
    assert found.flatten().tolist() == [1.0, (10 + 3) / 2, (30 + 5) / 2, 50.0, 50.0]
    assert actions_of(pairs[:0], 2, torch.tensor([7.0])).flatten().tolist() == [7.0, 7.0]


def test_labels_of_other_data_or_demonstrations_are_refused(folder):
    shown = np.array(json.loads((folder / "inverse.json").read_text())["demonstrations"])
    with pytest.raises(ValueError, match="are of other data than world:hand"):
        PseudoLabelled(open_source("world:hand?episodes=40"), folder, shown)
    with pytest.raises(ValueError, match="of other demonstrations; expected the same --demonstrations, --seed"):
        PseudoLabelled(open_source(DATA), folder, shown[1:])
    with pytest.raises(ValueError, match="holds no inverse.json"):
        PseudoLabelled(open_source(DATA), folder.parent, shown)


def test_a_stream_is_refused_before_training(tmp_path):
    fixture = Path(__file__).parent / "data" / "rlds_fixture"
    with pytest.raises(ValueError, match="is a stream; make a source with python -m hlrp.shards --data 'rlds:"):
        main(Args(f"rlds:{fixture}?fps=5&camera=image", tmp_path / "out", features="pca"))


@pytest.mark.parametrize("features", ["laq", "pca", "pixels"])
def test_every_frame_has_a_row_also_that_of_an_episode_of_one_frame(features, laq, monkeypatch, tmp_path):
    source = open_source("world:arm?episodes=12&kinds=move")
    train, val = split_episodes(source, 0.2, 0)
    source.lengths[[train[0], val[0]]] = 1  # of the frames that are there
    monkeypatch.setattr("hlrp.inverse.open_source", lambda uri: source)
    main(Args("world:arm", tmp_path / "out", demonstrations=1, val_fraction=0.2, features=features, laq=laq, steps=2))
    facts = json.loads((tmp_path / "out" / "inverse.json").read_text())
    labelled = PseudoLabelled(source, tmp_path / "out", np.array(facts["demonstrations"]))
    assert [len(part) for part in labelled.pseudo_actions] == source.lengths.tolist()
    assert all(part.isfinite().all() for part in labelled.pseudo_actions) and np.isfinite(facts["action_r2"])

    source.lengths[:] = [40 if i == train[0] else 1 for i in range(12)]  # the training needs the long one
    with pytest.raises(ValueError, match="no held-out episode lasts 0.2 s"):
        main(Args("world:arm", tmp_path / "other", demonstrations=1, val_fraction=0.2, features=features, laq=laq))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "world:human"}, "has no actions"),
        ({"steps": 0}, "steps=0"),
        ({"image_size": 30}, "image_size=30; expected a multiple of 8"),
        ({"delta": -1.0}, "delta=-1.0; expected a positive number"),
        ({"features": "laq", "laq": Path("nowhere")}, "nowhere holds no config.json"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        values = {"data": DATA, "output_dir": tmp_path / "out", "demonstrations": 1, "features": "pixels"}
        main(Args(**values | settings))
    assert not (tmp_path / "out").exists()
