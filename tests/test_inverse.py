import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hlrp.contract import split_episodes
from hlrp.inverse import ACTIONS, Args, PseudoLabelled, main
from hlrp.sources import open_source

DATA = "world:arm?episodes=40"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inverse") / "labels"
    main(Args(DATA, folder, demonstrations=1, val_fraction=0.2, steps=120))
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
        main(Args(f"rlds:{fixture}?fps=5&camera=image", tmp_path / "out"))


def test_every_frame_has_a_row_also_that_of_an_episode_of_one_frame(monkeypatch, tmp_path):
    source = open_source("world:arm?episodes=12&kinds=move")
    train, val = split_episodes(source, 0.2, 0)
    source.lengths[[train[0], val[0]]] = 1  # of the frames that are there
    monkeypatch.setattr("hlrp.inverse.open_source", lambda uri: source)
    main(Args("world:arm", tmp_path / "out", demonstrations=1, val_fraction=0.2, steps=2))
    facts = json.loads((tmp_path / "out" / "inverse.json").read_text())
    labelled = PseudoLabelled(source, tmp_path / "out", np.array(facts["demonstrations"]))
    assert [len(part) for part in labelled.pseudo_actions] == source.lengths.tolist()
    assert all(part.isfinite().all() for part in labelled.pseudo_actions) and np.isfinite(facts["action_r2"])

    source.lengths[:] = [40 if i == train[0] else 1 for i in range(12)]  # the training needs the long one
    with pytest.raises(ValueError, match="no held-out episode has two frames"):
        main(Args("world:arm", tmp_path / "other", demonstrations=1, val_fraction=0.2, steps=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "world:human"}, "has no actions"),
        ({"steps": 0}, "steps=0"),
        ({"image_size": 30}, "image_size=30; expected a multiple of 8"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(Args(**{"data": DATA, "output_dir": tmp_path / "out", "demonstrations": 1} | settings))
    assert not (tmp_path / "out").exists()
