from types import SimpleNamespace

import torch

from hlrp.run_folder import last_checkpoint
from hlrp.training import Run, seed_step


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    def draw(*key):
        seed_step(*key)
        return torch.rand(1).item()

    draws = [draw(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len(set(draws)) == 4 and draw(0, 0, 0) == draws[0]


def test_the_last_checkpoint_is_the_highest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for name in ("000900", "001000", "001100.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "last").symlink_to("000900")  # killed between the folder and its link
    assert last_checkpoint(tmp_path).name == "001000"


def test_pictures_and_videos_of_a_run_reach_wandb_under_names_that_stay_the_same(tmp_path):
    import wandb
    from PIL import Image

    files = [tmp_path / "grids" / "left" / "usage_000007.png", tmp_path / "videos" / "step_000007" / "task" / "0.mp4"]
    for file in files:
        file.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(files[0])
    files[1].write_bytes(b"a video")
    logged = []
    tracker = SimpleNamespace(name="wandb", tracker=SimpleNamespace(log=lambda *a, **o: logged.append((*a, o))))
    others = SimpleNamespace(name="tensorboard", tracker=None)
    run = SimpleNamespace(output_dir=tmp_path, accelerator=SimpleNamespace(trackers=[others, tracker]))
    Run.show(run, files, step=7)
    ((media, options),) = logged
    assert options == {"step": 7} and list(media) == ["grids/left/usage", "videos/task/0"]
    assert isinstance(media["grids/left/usage"], wandb.Image) and isinstance(media["videos/task/0"], wandb.Video)
