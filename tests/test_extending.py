"""The examples of CONTRIBUTING.md: each adds its own by one class and one line, and touches no other file."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers as T
from lerobot.envs import EnvConfig

from hlrp.backbones import FrozenEncoder
from hlrp.clips import Clips
from hlrp.contract import Source
from hlrp.data import Mixture, loader
from hlrp.envs import env_configs
from hlrp.envs_parallel import make_envs
from hlrp.laq import LAQ, LAQConfig
from hlrp.sources import open_sources
from hlrp.vla import VLA, LatentSpace, VLAConfig
from hlrp.vlm import VLM, VLMConfig

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLES = {block[: block.index(".py")]: block for block in TEXT.split("```python\n# hlrp/")[1:]}


def add(name, monkeypatch, table=None, within=None):
    """Runs an example at the end of its module. Its entry in the table within (by default the same) is taken back."""
    module = import_module(within or f"hlrp.{name}")
    if table is not None:
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    code = EXAMPLES[name].partition("\n")[2].partition("```")[0]
    names = vars(module) | {"Source": Source, "np": np, "torch": torch}
    exec(compile(code, f"{name} in CONTRIBUTING.md", "exec"), names)
    return names


def test_a_quantizer_trains(monkeypatch):
    add("quantizers", monkeypatch, "QUANTIZERS")
    laq = LAQ(LAQConfig(quantizer="signs", codebook_size=8, image_size=16, patch_size=8))
    loss, _ = laq({"frames": torch.randint(256, (4, 2, 3, 16, 16), dtype=torch.uint8), "step": 0})
    codes, indices, _ = laq.quantizer(torch.randn(8, 32, 128))
    assert loss.isfinite() and len(indices.unique()) > 1
    torch.testing.assert_close(laq.quantizer.decode(indices), codes)


def test_a_source_is_mixed_with_others(monkeypatch):
    names = add("grey", monkeypatch, "FORMATS", within="hlrp.sources")
    monkeypatch.setitem(sys.modules, "hlrp.grey", ModuleType("hlrp.grey"))
    sys.modules["hlrp.grey"].Grey = names["Grey"]
    sources, weights = open_sources(["grey:all?length=30@2", "world:clean?episodes=2"], False, 0)
    assert weights == [2, 1] and sources[0].lengths.tolist() == [30] * 3
    clips = [Clips(source, range(2), (0.0, 0.2), image_size=8) for source in sources]
    batch = next(iter(loader(Mixture(clips, weights), 32)))
    is_grey = torch.tensor([name == "all" for name in batch["dataset"]])
    assert 16 < is_grey.sum() < 28
    episodes = batch["episode"][is_grey][:, None, None, None, None]
    assert (batch["frames"][is_grey] == episodes).all()


def test_an_encoder_gives_features(monkeypatch, tmp_path):
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    T.ViTModel(T.ViTConfig(**size)).save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'vit' model; expected one of dinov2"):
        FrozenEncoder(str(tmp_path))
    add("backbones", monkeypatch, "VISION_ENCODERS")
    encoder = FrozenEncoder(str(tmp_path))
    assert encoder.grid == (4, 4) and encoder(torch.zeros(2, 3, 28, 28, dtype=torch.uint8)).shape == (2, 16, 12)


def test_a_head_learns(monkeypatch):
    add("vla", monkeypatch, "HEADS")
    torch.manual_seed(0)
    config = VLAConfig(head="regression", vlm=VLMConfig(image_size=32), feature_weight=0.0)
    space = LatentSpace(0.3, 0, 0, vector_dim=6, image_size=32, fingerprint="")
    tasks = ["push the red cube", "open the drawer"]
    vla = VLA(config, space, VLM.from_config(config.vlm, tasks))
    batch = {"images": torch.randint(256, (2, 1, 3, 32, 32), dtype=torch.uint8), "task": tasks}
    batch["latent_vectors"] = torch.randn(2, 1, 6)
    optimizer, losses = torch.optim.AdamW(vla.parameters(), 1e-2), []
    for _ in range(5):
        loss, _ = vla(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert vla.expected(batch["images"], tasks).shape == (2, 1, 6)


def test_an_environment_is_tried(monkeypatch):
    monkeypatch.setattr(EnvConfig, "_choice_registry", dict(EnvConfig._choice_registry))
    add("envs", monkeypatch)
    (env,) = make_envs(env_configs("touch_world"), num_envs=2, episodes=3)["touch_world"].values()
    observation, _ = env.reset(seed=[2, 3])
    assert observation["pixels"].shape == (2, 64, 64, 3)
    assert all("touch" in text for text in env.call("task_description"))
    _, _, terminated, _, _ = env.step(np.zeros((2, 2), dtype=np.float32))
    assert not terminated.any()
