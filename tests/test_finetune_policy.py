"""finetune_policy.py as its users run it, behind the two stages before it, on the built-in world."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lerobot.datasets import LeRobotDataset
from lerobot.policies import get_policy_class, make_pre_post_processors
from safetensors.torch import load_file
from torch import nn
from toys import TOP, WRIST, assert_equal_to_the_bit, rename, waits_of_ordinary_steps, weights, write_lerobot

import finetune_policy
import train_laq
import train_vla
from finetune_policy import Args, EnvArgs, EvalArgs
from hlrp import inverse, label
from hlrp.clips import Clips
from hlrp.contract import EpisodeRange
from hlrp.demonstrations import PolicySettings, check_episodes, lerobot_flags, settings_given
from hlrp.label import latent_space
from hlrp.laq import LAQ, LAQConfig
from hlrp.policy import HLRPPolicy
from hlrp.sources import instructions, open_source
from hlrp.training import Run
from hlrp.vla import VLA, VLAConfig
from hlrp.vlm import VLM, VLMConfig

pytestmark = pytest.mark.usefixtures("fresh_process")

DATA = ("world:clean?episodes=24", "world:human?episodes=6@0.5")  # with and without actions
SETTINGS = {"val_samples": 16, "steps": 4, "batch_size": 8, "warmup_steps": 2, "num_workers": 0}
SETTINGS |= {"log_freq": 1, "eval_freq": 4, "save_freq": 2}
SMALL = {"chunk_size": 4, "n_action_steps": 2, "expert_dim": 32, "expert_depth": 1, "push_to_hub": False}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Checkpoints of a LAQ and of VLAs of each head, which know nothing."""
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    laq = LAQ(LAQConfig(image_size=32, patch_size=8, num_tokens=4))
    nn.init.normal_(laq.to_change.weight)
    (folder / "laq").mkdir()
    laq.save_pretrained(folder / "laq", data=DATA, step=0, report=None)
    vlm = VLMConfig(image_size=32)
    texts = instructions([open_source(uri.partition("@")[0]) for uri in DATA])
    laq = LAQ.from_pretrained(folder / "laq")
    for head in ("parallel", "flow"):
        (folder / head).mkdir()
        config = VLAConfig(head=head, chunk_size=2, expert_dim=32, expert_depth=1, vlm=vlm)
        VLA(config, latent_space(laq), VLM.from_config(vlm, texts)).save_pretrained(folder / head, data=DATA)
    return folder


def train(output_dir, stages, head="parallel", policy=None, **settings):
    policy = PolicySettings(**{"vla": str(stages / head) if head else None} | SMALL | (policy or {}))
    values = SETTINGS | {"laq": stages / "laq", "demonstrations": 1} | settings
    finetune_policy.main(Args(**values, output_dir=output_dir, policy=policy))


def lines(output_dir, split="train") -> list[dict]:
    every = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["split"] == split]


def tensors(output_dir) -> dict[str, torch.Tensor]:
    last = output_dir / "checkpoints" / "last"
    paths = [last / "pretrained_model/model.safetensors", *(last / "training_state").glob("*.safetensors")]
    return {f"{path.parent.name}/{path.name}/{name}": x for path in paths for name, x in load_file(path).items()}


def test_demonstrations_and_other_video_make_a_lerobot_policy(stages, tmp_path):
    train(tmp_path, stages)
    first, (val,) = lines(tmp_path)[0], lines(tmp_path, "val")
    assert {"action_loss", "latent_loss", "lr", "share/world-clean", "share/world-clean-video"} <= set(first)
    assert first["share/world-human-video"] > 0 and "share/world-human" not in first
    assert {"world-clean/action_error", "world-clean/action_error_blank_image"} <= set(val)

    folder = tmp_path / "checkpoints/last/pretrained_model"
    policy = get_policy_class("hlrp").from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=folder)
    seen = {"observation.image": torch.rand(3, 64, 64), "observation.state": torch.zeros(2), "task": "push"}
    action = post(policy.select_action(pre(seen)))
    assert action.shape == (1, 2) and action.isfinite().all()
    assert json.loads((folder / "provenance.json").read_text())["data"] == list(DATA)


@pytest.mark.parametrize("head", ["parallel", pytest.param("flow", marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_bit(head, stages, tmp_path, monkeypatch):
    settings = {"ema_decay": 0.9, "batch_size": 4, "grad_accumulation": 2}
    train(tmp_path / "whole", stages, head, **settings)
    advance = Run.advance

    def advance_and_signal(run, *args):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(run, *args)

    monkeypatch.setattr(Run, "advance", advance_and_signal)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "cut", stages, head, **settings)
    assert stop.value.code == 75
    train(tmp_path / "cut", stages, head, **settings)
    found, expected = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert found.keys() == expected.keys() and any("optimizer" in name for name in found)
    assert not [name for name in found if not torch.equal(found[name], expected[name])]
    averaged = [x for name, x in found.items() if name.endswith("from_state.weight")]
    assert len(averaged) == 2 and not torch.equal(*averaged)  # the policy is the average, the training goes on beside


def test_accumulated_batches_with_uneven_labels_are_one_larger_batch(stages, tmp_path):
    def grad_norm(name, **settings):
        policy = {"action_head": "l1", "latent_weight": 1.0}  # no noise, which is drawn for each batch
        train(tmp_path / name, stages, policy=policy, steps=2, eval_freq=2, **settings)
        return lines(tmp_path / name)[0]["grad_norm"]

    large = grad_norm("large", batch_size=4, video_batch_size=8)
    accumulated = grad_norm("accumulated", batch_size=1, video_batch_size=2, grad_accumulation=4)
    assert accumulated == pytest.approx(large, rel=2e-3)


@pytest.mark.parametrize("video_batch_size", [None, 3])
def test_video_never_takes_the_place_of_demonstrations(video_batch_size, stages, tmp_path, monkeypatch):
    """A batch has --batch-size samples with actions, whatever stands beside them."""
    batches, advance = [], Run.batches
    monkeypatch.setattr(Run, "batches", lambda *args: (batches.append(batch) or batch for batch in advance(*args)))
    train(tmp_path, stages, batch_size=6, video_batch_size=video_batch_size, steps=3, eval_freq=3)
    labelled = [int((~batch["action_is_pad"]).any(1).sum()) for batch in batches]
    sizes = {len(batch["task"]) for batch in batches}
    assert sizes == {6 + (6 if video_batch_size is None else video_batch_size)}
    assert sum(labelled) == pytest.approx(6 * 3, abs=1) and min(labelled) >= 5
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["samples_per_step"] == sizes.pop()


def test_two_processes_train_what_one_trains_however_unevenly_labels_lie(stages, tmp_path):
    policy = {"action_head": "l1", "latent_weight": 1.0}
    train(tmp_path / "one", stages, policy=policy, batch_size=4, video_batch_size=8, steps=2, eval_freq=2)
    flags = {"policy.vla": stages / "parallel", "laq": stages / "laq", "output-dir": tmp_path / "two"}
    flags |= {"policy.action-head": "l1", "policy.latent-weight": 1.0, "batch-size": 2, "video-batch-size": 4}
    flags |= {"steps": 2, "eval-freq": 2, "warmup-steps": 2, "val-samples": 16, "num-workers": 0, "log-freq": 1}
    flags |= {"demonstrations": 1, "save-freq": 2}
    flags |= {f"policy.{name}": SMALL[name] for name in SMALL if name != "push_to_hub"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, finetune_policy.__file__, *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run([sys.executable, *map(str, command)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name in ("loss", "action_loss", "latent_loss", "grad_norm"):
        one, two = ([line[name] for line in lines(tmp_path / run)] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=2e-3), name
    (one,), (two,) = (lines(tmp_path / run, "val") for run in ("one", "two"))
    for name in ("action_error", "action_error_shuffled_text", "action_loss"):
        assert two[f"world-clean/{name}"] == pytest.approx(one[f"world-clean/{name}"], rel=2e-2), name


def test_the_other_video_of_one_source_gets_actions_from_latent_actions(stages, tmp_path, monkeypatch):
    train_it = partial(train, stages=stages, data=DATA[:1])
    made = []
    monkeypatch.setattr("hlrp.demonstrations.infer", lambda *args: (made.append(args), inverse.infer(*args)))
    train_it(tmp_path / "auto", steps=2, eval_freq=2)
    assert {"action_loss", "share/world-clean-video"} <= set(lines(tmp_path / "auto")[0])
    assert "latent_loss" not in lines(tmp_path / "auto")[0]
    facts = json.loads((tmp_path / "auto/pseudo_actions/inverse.json").read_text())
    args = inverse.Args(DATA[0], tmp_path / "same", laq=stages / "laq", demonstrations=1)
    inverse.main(args)  # as its command does
    same = load_file(tmp_path / "same" / inverse.ACTIONS)["actions"]
    assert torch.equal(load_file(tmp_path / "auto/pseudo_actions" / inverse.ACTIONS)["actions"], same)
    assert facts["demonstrations"] == json.loads((tmp_path / "same/inverse.json").read_text())["demonstrations"]

    train_it(tmp_path / "auto", steps=2, eval_freq=2)  # it is done; nothing is made anew
    train_it(tmp_path / "given", steps=2, eval_freq=2, pseudo_actions=tmp_path / "same")
    assert len(made) == 1
    assert_equal_to_the_bit(tmp_path / "given", tmp_path / "auto")
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "auto/pseudo_actions", tmp_path / "again/pseudo_actions")
    with pytest.raises(ValueError, match="again/pseudo_actions was made with another LAQ, val_fraction, seed, shuffle"):
        train_it(tmp_path / "again", seed=1)

    train_it(tmp_path / "none", steps=2, eval_freq=2, pseudo_actions=None)
    assert "latent_loss" in lines(tmp_path / "none")[0]
    train_it(tmp_path / "both", steps=2, eval_freq=2, policy={"latent_weight": 0.5})
    assert "latent_loss" in lines(tmp_path / "both")[0] and len(made) == 2
    train_it(tmp_path / "cloned", head=None, steps=2, eval_freq=2)
    assert not (tmp_path / "cloned/pseudo_actions").exists()


def test_without_stage_2_it_clones_behaviour_and_a_policy_is_trained_further(stages, tmp_path):
    train(tmp_path / "cloned", stages, head=None, data=DATA[:1])
    assert "latent_loss" not in lines(tmp_path / "cloned")[0]
    assert "share/world-clean-video" not in lines(tmp_path / "cloned")[0]  # nothing is learned from it
    folder = tmp_path / "cloned/checkpoints/last/pretrained_model"
    train(tmp_path / "further", stages, head=None, policy_path=folder, steps=2, eval_freq=2, lr=1e-9)
    before, after = (
        load_file(path / "model.safetensors")
        for path in (folder, tmp_path / "further/checkpoints/last/pretrained_model")
    )
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    with pytest.raises(ValueError, match="policy.chunk_size=9, but policy.path=.* has 4; leave it out"):
        train(tmp_path / "other", stages, head=None, policy_path=folder, policy={"chunk_size": 9})
    given = settings_given(["--steps", "2", "--policy.n-action-steps", "8", "--policy.no-push-to-hub"])
    assert given == {"n_action_steps", "push_to_hub"}
    with pytest.raises(ValueError, match="n_action_steps=8 is more than chunk_size=4"):
        train(
            tmp_path / "other",
            stages,
            head=None,
            policy_path=folder,
            policy={"n_action_steps": 8, "chunk_size": 16},
            given=given,
        )
    with pytest.raises(ValueError, match="no-state, but policy.path=.* reads the state"):
        train(tmp_path / "other", stages, head=None, policy_path=folder, state=False)


class Poisoned:
    """A source that shows other frames after one moment."""

    def __init__(self, source, moment):
        self.source, self.moment = source, moment

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, episode, indices):
        read = self.source.read(episode, indices)
        read["frames"][np.asarray(indices) > self.moment] ^= 255
        return read


@pytest.mark.parametrize("head", ["parallel", "flow"])
def test_frames_that_follow_change_labels_and_no_input(head, stages, tmp_path, monkeypatch):
    forward, read, seen = HLRPPolicy.forward, Clips.__getitems__, []
    monkeypatch.setattr(
        HLRPPolicy, "forward", lambda policy, batch, **options: seen.append(batch) or forward(policy, batch, **options)
    )

    def poisoned_read(clips, indices):
        source, samples = clips.source, []
        for index in indices:
            [sample] = read(clips, [index])
            clips.source = Poisoned(source, sample["index"])
            samples += read(clips, [index])
            clips.source = source
        return samples

    settings = {"steps": 1, "eval_freq": 1, "warmup_steps": 1, "policy": {"n_obs_steps": 2}}
    train(tmp_path / "clean", stages, head, **settings)
    monkeypatch.setattr(Clips, "__getitems__", poisoned_read)
    clean, num_clean = seen[0], len(seen)
    train(tmp_path / "poisoned", stages, head, **settings)
    poisoned = seen[num_clean]
    assert "frames" not in clean and clean.keys() == poisoned.keys()
    values = {key: (clean[key], poisoned[key]) for key in clean if key not in ("latent_indices", "latent_vectors")}
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in values.values())
    assert not torch.equal(clean["latent_vectors"], poisoned["latent_vectors"])


def test_several_cameras_and_a_history_are_seen_as_lerobot_shows_them(stages, tmp_path, monkeypatch):
    folder = write_lerobot(tmp_path / "data")
    forward, seen = HLRPPolicy.forward, []
    monkeypatch.setattr(
        HLRPPolicy, "forward", lambda policy, batch, **options: seen.append(batch) or forward(policy, batch, **options)
    )
    settings = {"steps": 1, "eval_freq": 1, "warmup_steps": 1, "val_fraction": 0.4}
    settings |= {"data": (f"lerobot:{folder}?camera=wrist,top",), "policy": {"n_obs_steps": 2}}
    train(tmp_path / "run", stages, head=None, **settings)
    batch, theirs = seen[0], LeRobotDataset("toy/toy", root=folder, video_backend="pyav")
    dataset = LeRobotDataset(
        "toy/toy", root=folder, video_backend="pyav", delta_timestamps={TOP: [-0.1, 0.0], WRIST: [-0.1, 0.0]}
    )
    first = np.cumsum([0, *theirs.meta.episodes["length"]])
    for row, (episode, index) in enumerate(zip(batch["episode"].tolist(), batch["index"].tolist(), strict=True)):
        item = dataset[int(first[episode]) + index]
        for camera in (TOP, WRIST):
            # resized to what the policy sees; decoded frames differ by a level or two
            expected = F.interpolate(item[camera], batch[camera].shape[-1], mode="bilinear", antialias=True)
            torch.testing.assert_close(batch[camera][row], expected, atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="expected the 2 cameras that the policy sees, .* got 1"):
        last = tmp_path / "run/checkpoints/last/pretrained_model"
        train(tmp_path / "other", stages, head=None, policy_path=last, data=(f"lerobot:{folder}",), val_fraction=0.4)


def test_columns_as_openpi_names_them_train_the_same_policy(stages, tmp_path):
    write_lerobot(tmp_path / "usual")
    shutil.copytree(tmp_path / "usual", tmp_path / "openpi")
    rename(tmp_path / "openpi", {"action": "actions", "observation.state": "state"})
    settings = {"steps": 1, "eval_freq": 1, "warmup_steps": 1, "val_fraction": 0.4}
    for name, options in (("usual", ""), ("openpi", "?action=actions&state=state")):
        train(tmp_path / "run" / name, stages, head=None, data=(f"lerobot:{tmp_path / name}{options}",), **settings)
    assert_equal_to_the_bit(tmp_path / "run/usual", tmp_path / "run/openpi")
    with pytest.raises(ValueError, match=r"has state \[3\], actions \[2\], which are not read: \?action=KEY"):
        train(tmp_path / "none", stages, head=None, data=(f"lerobot:{tmp_path}/openpi",), **settings)


def test_one_latent_action_of_several_cameras_goes_through_all_stages(tmp_path):
    data, short = f"lerobot:{write_lerobot(tmp_path / 'data')}?camera=wrist,top", {"steps": 1, "eval_freq": 1}
    short |= {"warmup_steps": 1, "batch_size": 4, "num_workers": 0, "val_fraction": 0.4, "val_samples": 16}
    config = LAQConfig(delta=0.1, image_size=32, patch_size=8, num_tokens=2, view_dropout=0.5)
    laq, vla = (tmp_path / name / "checkpoints/last/pretrained_model" for name in ("laq", "vla"))
    train_laq.main(train_laq.Args(model=config, data=(data,), output_dir=tmp_path / "laq", **short))
    short["pictures"] = ()
    model = VLAConfig(chunk_size=2, feature_weight=0.1)
    with pytest.raises(ValueError, match=r"expected 2 cameras, as by \?camera=A,B, got observation.images.top$"):
        one = data.replace("wrist,top", "top")
        train_vla.main(
            train_vla.Args(
                model=model, data=(one,), laq=laq, accept_failed_laq=True, output_dir=tmp_path / "one", **short
            )
        )
    train_vla.main(train_vla.Args(model=model, laq=laq, accept_failed_laq=True, output_dir=tmp_path / "vla", **short))

    label.main(label.Args(data, tmp_path / "labelled", laq))
    del short["pictures"]
    learned = {}
    for name in ("data", "labelled"):
        run, source = tmp_path / f"policy_{name}", f"lerobot:{tmp_path / name}?camera=wrist,top"
        policy = PolicySettings(vla=str(vla), **SMALL)
        finetune_policy.main(Args(laq=laq, data=(source,), policy=policy, output_dir=run, **short))
        learned[name] = weights(run)
    for name, tensor in learned["data"].items():  # labels made along the way are those that were cached
        torch.testing.assert_close(learned["labelled"][name], tensor, msg=name)
    for features in ("laq", "pca", "pixels"):
        settings = {
            "laq": laq,
            "features": features,
            "delta": 0.1,
            "val_fraction": 0.4,
            "steps": 1,
            "demonstrations": 1,
        }
        inverse.main(inverse.Args(data, tmp_path / f"inverse_{features}", **settings))


def test_given_episodes_are_the_demonstrations_and_give_the_statistics(stages, tmp_path):
    from hlrp.contract import split_episodes

    source = open_source("world:clean?episodes=24")
    train_episodes, val_episodes = split_episodes(source, 0.1, 0)
    chosen = tuple(train_episodes[[3, 5]].tolist())
    settings = {"data": DATA[:1], "demonstrations": None}
    train(tmp_path / "run", stages, episodes=chosen, steps=1, eval_freq=1, warmup_steps=1, **settings)
    saved = tmp_path / "run/checkpoints/last/pretrained_model"
    (stats,) = saved.glob("policy_postprocessor_*.safetensors")
    actions = np.concatenate([source.actions(e, np.arange(source.lengths[e])) for e in chosen])
    torch.testing.assert_close(
        load_file(stats)["action.mean"].double().numpy(), actions.mean(0).astype(np.float64), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match=rf"episodes=\[{val_episodes[0]}\] are held out or do not exist in world"):
        train(tmp_path / "other", stages, episodes=(int(val_episodes[0]),), **settings)


def test_the_episodes_of_a_stream_cannot_be_chosen_by_their_numbers():
    with pytest.raises(ValueError, match=r"episodes=\[3\], but rlds:robot is a stream; expected an indexed source"):
        check_episodes([3], SimpleNamespace(uri="rlds:robot"), EpisodeRange(0, 0.1, 1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"demonstrations": 0}, "demonstrations=0; expected 1 or more"),
        ({"demonstrations": 99}, "demonstrations=99, but world:clean.* has [0-9]+ training episodes of '"),
        ({"video_batch_size": -1}, "video_batch_size=-1; expected 0 or more"),
        ({"data": ("world:human?episodes=6",)}, "no source has actions"),
        ({"policy": {"push_to_hub": True}}, "policy.push_to_hub without policy.repo_id"),
        ({"policy": {"vla": "nowhere"}}, "nowhere holds no config.json"),
        ({"policy": {"vla": None}}, "data is empty, and without policy.vla"),
        ({"env_eval_freq": 2}, "env_eval_freq=2; expected 0 or more, and an --env.type"),
        ({"env": EnvArgs("hlrp_world", settings={"speed": "2"})}, "env.speed is no setting of hlrp_world; .*task, fps"),
    ],
)
def test_settings_that_no_run_can_have_are_named_before_it_starts(settings, message, stages, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", stages, **settings)
    assert not (tmp_path / "run").exists()


def test_another_laq_than_that_of_stage_2_is_refused(stages, tmp_path):
    (tmp_path / "laq").mkdir()
    LAQ(LAQConfig(image_size=32, patch_size=8, num_tokens=4)).save_pretrained(
        tmp_path / "laq", data=DATA, step=0, report=None
    )
    with pytest.raises(ValueError, match="is not the one that stage 2 learned from"):
        train(tmp_path / "run", stages, laq=tmp_path / "laq")


def test_the_policy_is_tried_in_the_environment_with_videos(stages, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")  # MuJoCo reads it when it is imported
    monkeypatch.setattr("hlrp.metaworld.MAX_STEPS", 40)
    monkeypatch.setenv("HLRP_CACHE", str(tmp_path / "cache"))
    data = ("metaworld:reach-v3,door-open-v3?episodes=3&size=32",)
    env = {
        "env": EnvArgs("hlrp_metaworld", "reach-v3,door-open-v3"),
        "eval": EvalArgs(2, 2, processes=1),
        "env_eval_freq": 2,
    }
    monkeypatch.setattr("hlrp.envs.MAX_STEPS", 40)
    train(tmp_path / "run", stages, head=None, data=data, val_fraction=0.3, **env)
    logged = lines(tmp_path / "run", "env")
    assert [line["step"] for line in logged] == [2, 4]
    assert {"success/reach-v3", "success/door-open-v3", "success/all"} <= set(logged[0])
    assert len([*(tmp_path / "run/videos").rglob("*.mp4")]) == 4
    tried = json.loads((tmp_path / "run/environment.json").read_text())
    assert logged[-1]["success/all"] == tried["all"]["success"]
    (tmp_path / "run/environment.json").unlink()  # as where the environment has failed behind the last step
    train(tmp_path / "run", stages, head=None, data=data, val_fraction=0.3, **env)
    assert [line["step"] for line in lines(tmp_path / "run", "env")] == [2, 4, 4]
    env["env"] = EnvArgs("hlrp_metaworld", "reach-v3")  # of which the file tells nothing
    train(tmp_path / "run", stages, head=None, data=data, val_fraction=0.3, **env)
    assert set(json.loads((tmp_path / "run/environment.json").read_text())["tasks"]) == {"reach-v3"}
    for name, task, message in [
        ("nowhere", None, "nowhere"),
        ("hlrp_metaworld", "dance-v3", "dance-v3"),
        ("hlrp_world", None, "the policy has 4 actions, hlrp_world 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "other", stages, head=None, data=data, val_fraction=0.3, env=EnvArgs(name, task))
    assert not (tmp_path / "other/checkpoints").exists()


def test_a_finished_policy_goes_to_the_hub_with_its_card(stages, tmp_path, monkeypatch):
    pushed = {}

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            pushed.update({path.name: repo_id for path in Path(folder_path).iterdir()})
            pushed["card"] = (Path(folder_path) / "README.md").read_text()

    monkeypatch.setattr("hlrp.policy.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.ModelCard.validate", lambda card: None)
    train(
        tmp_path,
        stages,
        policy={"push_to_hub": True, "repo_id": "someone/policy"},
        steps=1,
        eval_freq=1,
        warmup_steps=1,
    )
    assert pushed["model.safetensors"] == pushed["config.json"] == "someone/policy"
    assert "policy_preprocessor.json" in pushed and "lerobot" in pushed["card"]


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("--batch_size=8 --lr 1e-4", "--batch_size 8 --lr 1e-4"),
        ("--wandb.enable=true --resume=true", "--wandb"),
        ("--wandb.enable=false", "--no-wandb"),
        ("--policy.push_to_hub=false", "--policy.no-push_to_hub"),
        ("--dataset.repo_id=me/toy --dataset.episodes=[0,1]", "--episodes 0 1 --data lerobot:me/toy"),
        ("--dataset.repo_id=me/toy --dataset.root=/data/toy", "--data lerobot:/data/toy"),
        ("--policy.type=hlrp --policy.vla=null --policy.path=out/p", "--policy.vla None --policy-path out/p"),
        ("--data a:b?c=1 d:e@0.5 --state", "--data a:b?c=1 d:e@0.5 --state"),
        ("--peft.method_type=LORA --peft.r=16", "--policy.lora-rank 16"),
        ("--policy.optimizer_lr=1e-4 --policy.scheduler-warmup-steps 5", "--lr 1e-4 --warmup-steps 5"),
    ],
)
def test_lerobots_spelling_of_flags_is_understood(given, understood):
    assert lerobot_flags(given.split()) == understood.split()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--policy.type=act", "--policy.type=act; expected hlrp"),
        ("--policy.optimizer_betas=[0.9,0.95]", "--policy.optimizer_betas has no meaning here"),
        ("--wandb.project=mine", "the variable WANDB_PROJECT sets what it stands for"),
    ],
)
def test_flags_that_would_do_nothing_are_named(flag, message):
    with pytest.raises(ValueError, match=message):
        lerobot_flags([flag])


def test_the_command_line_reaches_every_part(stages, tmp_path):
    flags = f"--policy.vla={stages / 'parallel'} --laq={stages / 'laq'} --output_dir={tmp_path} --steps=2"
    flags += " --warmup_steps=1 --batch_size=4 --num_workers=0 --eval_freq=2 --val_samples=8"
    flags += " --demonstrations=1 --policy.chunk_size=4 --policy.n_action_steps=2 --wandb.enable=false"
    subprocess.run([sys.executable, finetune_policy.__file__, *flags.split()], check=True)
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["policy.chunk_size"] == 4 and settings["demonstrations"] == 1


def test_an_ordinary_step_waits_for_no_device(stages, tmp_path, monkeypatch):
    train_it = partial(train, tmp_path, stages, policy={"latent_weight": 1.0})
    assert waits_of_ordinary_steps(monkeypatch, train_it) == []
