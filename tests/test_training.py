import torch

from hlrp.training import last_checkpoint, seed_step


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
