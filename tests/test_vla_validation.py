from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from hlrp.laq import LAQ, LAQConfig
from hlrp.vla import Predicted
from hlrp.vla_validation import alarms, complete, evaluate, findings, label, other_tasks, shuffled

TASKS = ("turn left", "turn right")
NUM_CODES = 8


class Turning(Dataset):
    """The image shows a size, the task a direction; the second frame tells the code that follows from both."""

    def __init__(self, first_episode, num_episodes=12, length=8):
        self.samples = [(first_episode + e, t) for e in range(num_episodes) for t in range(length)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        episode, t = self.samples[i]
        size, direction = (episode + t) % (NUM_CODES // 2), episode % 2
        code = 2 * size + direction
        image = torch.full((1, 3, 4, 4), size, dtype=torch.uint8)
        action = torch.tensor([[float(code), -float(code)]])
        sample = {"frames": torch.cat([image, torch.full_like(image, code)]), "images": image}
        sample |= {"task": TASKS[direction], "dataset": "toy", "episode": episode, "index": t}
        return sample | {"action": action, "action_is_pad": torch.zeros(1, dtype=torch.bool)}


class Teacher(nn.Module):
    """A LAQ of one token that reads the code off the second frame."""

    def __init__(self):
        super().__init__()
        self.device_of = nn.Parameter(torch.zeros(1))
        self.config, self.num_views = SimpleNamespace(num_tokens=1, quantizer="vq"), 1
        lookup = {"lookup": lambda indices: indices[..., None].float()}
        self.quantizer = SimpleNamespace(codebook_size=NUM_CODES, levels=(NUM_CODES,), **lookup)

    def observe(self, frames):
        return frames

    def embed(self, frames):
        return frames[:, :, 0, 0, 0, None, None].float()  # b t n d

    def between_all(self, embedded):
        indices = embedded[:, 1:, :, 0].long()  # b t m
        return SimpleNamespace(indices=indices, vectors=indices[..., None].float())


class Student(nn.Module):
    """Predicts rightly from what it is allowed to use of `senses`."""

    config = SimpleNamespace(head="parallel")

    def __init__(self, senses):
        super().__init__()
        self.senses = senses

    def generate(self, images, tasks):
        size = images[:, 0, 0, 0, 0].long() % (NUM_CODES // 2) if "image" in self.senses else 0
        direction = torch.tensor([TASKS.index(task) for task in tasks]) if "text" in self.senses else 0
        code = 2 * size + direction + torch.zeros(len(tasks), dtype=torch.long)
        return Predicted(code[:, None, None], None)  # b t m

    def expected(self, images, tasks):
        return torch.nn.functional.one_hot(self.generate(images, tasks).indices, NUM_CODES).float()

    def score(self, batch):
        return (self.generate(batch["images"], batch["task"])[0] != batch["latent_indices"]).float().mean((1, 2))


SET, FIT = Turning(0), Turning(100)


def report(*senses) -> dict:
    return evaluate(Student(senses), Teacher(), {"toy": SET}, {"toy": FIT}, batch_size=10)


def test_a_model_that_looks_and_reads_is_right_and_pays_for_other_text_and_for_no_image():
    figures = report("image", "text")["toy"]
    assert figures["accuracy"] == 1 and figures["accuracy_by_position"] == [1]
    assert figures["accuracy_shuffled_text"] == 0 and figures["accuracy_blank_image"] == pytest.approx(0.25)
    assert figures["majority"] == pytest.approx(1 / NUM_CODES) and figures["unique_sequences"] == NUM_CODES
    assert figures["action_r2"] == pytest.approx(1, abs=1e-3) and abs(figures["action_r2_random"]) < 0.2
    assert figures["loss"] == 0 and figures["loss_shuffled_text"] == 1
    assert not alarms(report("image", "text"))
    told, read = findings(report("image", "text"))
    controls = "most frequent code 12%, another text 0%, blank image 25%"
    assert told[1:] == ("codes predicted", "100%", controls, "the text is read, the image is looked at")
    assert read[2] == "1.00" and read[4] == "the prediction tells the actions"
    assert findings(report("image"))[0][4] == "the text is not read, the image is looked at"


def test_a_probe_reads_no_more_from_a_prediction_than_the_latent_action():
    class Untrained(Student):
        """Hardly sure of any code, but what little its probabilities differ by tells image and text."""

        def expected(self, images, tasks):
            return 1 / NUM_CODES + 1e-3 * super().expected(images, tasks).flip(-1)

    figures = evaluate(Untrained(["image", "text"]), Teacher(), {"toy": SET}, {"toy": FIT})["toy"]
    assert figures["action_r2"] < 0.05 and figures["action_r2_true"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("senses", "faults"),
    [
        (["image"], ["does not read the text"]),
        (["text"], ["does not look at the image", "predictions have collapsed"]),
        ([], ["no more than the most frequent code", "predictions have collapsed"]),
    ],
)
def test_a_model_that_is_blind_or_deaf_is_named(senses, faults):
    sentences = " ".join(alarms(report(*senses)))
    assert all(fault in sentences for fault in faults)


def test_a_report_is_the_same_again_and_leaves_the_mode_alone():
    student = Student(["image"]).train()
    reports = [evaluate(student, Teacher(), {"toy": SET}, {"toy": FIT}) for _ in range(2)]
    assert reports[0] == reports[1] and student.training


def test_the_other_task_is_another_one():
    tasks = ["a", "b", "c", "a"] * 10
    shuffled = other_tasks(tasks, ["a", "b", "c"], seed=0)
    assert all(other != task for other, task in zip(shuffled, tasks, strict=True)) and set(shuffled) == {"a", "b", "c"}
    assert other_tasks(["a", "a"], ["a"], seed=0) == ["a", "a"]


@pytest.mark.parametrize("quantizer", ["fsq", "vq-ema", "gaussian"])
def test_codes_and_vectors_stand_for_each_other(quantizer):
    torch.manual_seed(0)
    laq = LAQ(LAQConfig(image_size=16, patch_size=8, codebook_size=16, quantizer=quantizer))
    frames = torch.randint(256, (6, 3, 3, 16, 16), dtype=torch.uint8)
    for _ in range(3):
        laq({"frames": frames[:, :2], "step": 0})
    laq.eval()
    labels = label(laq, frames)
    if quantizer == "gaussian":
        assert complete(laq, Predicted(None, labels["latent_vectors"])) == (None, labels["latent_vectors"])
        return
    _, vectors = complete(laq, Predicted(labels["latent_indices"], None))
    torch.testing.assert_close(vectors, labels["latent_vectors"])
    nearest, _ = complete(laq, Predicted(None, vectors + 1e-3))
    assert torch.equal(nearest, labels["latent_indices"])


def test_shuffled_latents_are_those_of_other_samples_and_all_else_stays():
    batch = {"latent_indices": torch.arange(4)[:, None, None], "task": list("abcd"), "images": torch.arange(4)}
    found = shuffled(batch)
    assert sorted(found["latent_indices"].flatten().tolist()) == [0, 1, 2, 3]
    assert (found["latent_indices"] != batch["latent_indices"]).all()
    assert found["task"] is batch["task"] and found["images"] is batch["images"]
