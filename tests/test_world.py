import time

import numpy as np
import pytest
import torch

from hlrp.world import (
    BLOCK_BORDER,
    COLOURS,
    EDGES,
    FPS,
    IMAGE_SIZE,  # fmt: skip
    MAX_LENGTH,
    MAX_SPEED,
    MIN_LENGTH,
    VARIANTS,
    World,
    simulate,
)


def read_all(world: World, episode: int) -> dict:
    return world.read(episode, range(world.lengths[episode]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_frames_depend_on_nothing_but_episode_and_index(variant):
    world, shorter, other_seed = (World(variant, n, seed) for n, seed in ((300, 0), (150, 0), (150, 1)))
    some = world.read(140, [7, 0, 7, 11])
    shorter.read(3, [1, 2])
    everything = read_all(shorter, 140)

    assert some["frames"].dtype == torch.uint8 and some["frames"].shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE)
    for key in set(some) - {"embodiment", "task"}:
        torch.testing.assert_close(some[key], everything[key][[7, 0, 7, 11]], rtol=0, atol=0)
    np.testing.assert_array_equal(world.lengths[:150], shorter.lengths)
    assert not torch.equal(some["frames"], other_seed.read(140, [7, 0, 7, 11])["frames"])


def test_a_world_of_some_kinds_of_task_has_no_others():
    world = World("clean", 40, kinds="touch,edge")
    tasks = {world.instructions(i, [0])[0].split()[0] for i in range(40)}
    assert tasks == {"touch", "push"} and "kinds=touch,edge" in world.uri
    with pytest.raises(
        ValueError, match="kinds='touch,grab': 'grab' is unknown; expected some of move, touch, edge, block"
    ):
        World("clean", 40, kinds="touch,grab")


def test_actions_integrate_to_the_motion_of_the_tip_in_state_and_image():
    world = World("arm", episodes=4)
    for episode in range(4):
        read = read_all(world, episode)
        action = world.actions(episode, range(world.lengths[episode]))
        assert action.abs().max() <= 1
        tip = (read["state"] + 1) * IMAGE_SIZE / 2
        torch.testing.assert_close(tip[1:], tip[:-1] + action[:-1] * MAX_SPEED / FPS, rtol=0, atol=1e-3)

        dark = (read["frames"].max(dim=1).values < 60).float()  # only the tip is nearly black; t h w
        pixels = torch.arange(IMAGE_SIZE) + 0.5
        seen = torch.stack([(dark.sum(1) * pixels).sum(1), (dark.sum(2) * pixels).sum(1)], dim=-1)
        torch.testing.assert_close(seen / dark.sum((1, 2))[:, None], tip, rtol=0, atol=0.7)


def test_the_text_says_what_is_reached_and_which_block_ends_where():
    moved, reached, arrived, touched = [], [], [], []
    for group in range(4):
        scene = simulate(0, group)
        rows = zip(scene.task, scene.length - 1, scene.tip, scene.blocks, scene.colours, strict=True)
        for task, last, tip, path, rgb in rows:
            place = dict(zip(map(tuple, rgb), path[last], strict=True))  # of each colour at the end
            verb, _, colour, *_ = task.split()
            if verb == "move":
                outwards = (tip[last] - IMAGE_SIZE / 2) @ np.array(EDGES[task.split()[-2]])
                reached.append(outwards > IMAGE_SIZE / 2 - 2 * BLOCK_BORDER)
                continue
            named = place[COLOURS[colour]]
            if verb == "touch":
                distances = [np.linalg.norm(tip[last] - x) for x in place.values()]
                touched.append(np.linalg.norm(tip[last] - named) < min(13, *distances) + 1e-6)
                continue
            goal, kind = task.split()[-2:]
            if kind == "edge":
                outwards = (named - IMAGE_SIZE / 2) @ np.array(EDGES[goal])
                arrived.append(outwards > IMAGE_SIZE / 2 - BLOCK_BORDER - 2)
            else:
                arrived.append(np.linalg.norm(named - place[COLOURS[goal]]) < 13)
            moved.append(np.linalg.norm(path[last] - path[0], axis=-1))
    assert min(np.mean(reached), np.mean(arrived)) > 0.9
    assert np.mean(touched) > 0.8  # another block may have been taken along
    pushed, *others = np.mean(moved, axis=0)
    assert pushed > 2 * max(others)


@pytest.mark.parametrize("variant", ["clean", "shake"])
def test_the_point_is_where_the_named_block_or_edge_is_in_the_image(variant):
    world, hits = World(variant, 60), []
    for episode in range(60):
        read = world.read(episode, [0, 7])
        words, point = world.instructions(episode, [0])[0].split(), (read["point"] + 1) * IMAGE_SIZE / 2  # t xy
        if words[0] == "move":
            outwards = (point - IMAGE_SIZE / 2) @ torch.tensor(EDGES[words[3]])
            assert point.shape == (2, 2) and (outwards > IMAGE_SIZE / 4).all()
            continue
        tip = (read["state"][0] + 1) * IMAGE_SIZE / 2 + read.get("camera_shift", torch.zeros(2, 2))[0]
        if (tip - point[0]).norm() < 16:  # it may hide the block
            continue
        x, y = point[0].round().int().tolist()
        seen = read["frames"][0, :, y - 1 : y + 2, x - 1 : x + 2].float().mean((1, 2))
        distances = {name: float((seen - torch.tensor(colour)).norm()) for name, colour in COLOURS.items()}
        hits.append(min(distances, key=distances.get) == words[2])
    assert len(hits) > 10 and np.mean(hits) > 0.85  # an arm may hide it, too


def test_an_episode_ends_soon_after_its_task_is_done():
    lengths = World("clean", episodes=500).lengths
    assert lengths.min() == MIN_LENGTH and np.mean(lengths < MAX_LENGTH) > 0.95


def test_distractors_and_camera_move_whatever_the_agent_does():
    default, clean = World("default", episodes=400), World("clean", episodes=400)
    actions, balls, shifts = [], [], []
    for episode in range(400):
        read, indices = read_all(default, episode), range(default.lengths[episode])
        torch.testing.assert_close(read["state"], read_all(clean, episode)["state"], rtol=0, atol=0)
        actions.append(default.actions(episode, indices)[:-1])
        balls.append(read["distractor"].diff(dim=0))
        shifts.append(read["camera_shift"].diff(dim=0))
    for unrelated in (torch.cat(balls), torch.cat(shifts)):
        both = torch.cat([torch.cat(actions), unrelated], dim=1).T
        assert torch.corrcoef(both)[:2, 2:].abs().max() < 0.08


def test_the_camera_shift_is_the_shift_of_the_image():
    still, shaken = World("clean", episodes=3), World("shake", episodes=3)
    shift = read_all(shaken, 2)["camera_shift"]
    assert 1 < shift.std() < 4
    before, after = (read_all(world, 2)["frames"].float() for world in (still, shaken))
    theta = torch.eye(2, 3).repeat(len(shift), 1, 1)
    theta[:, :, 2] = -shift * 2 / IMAGE_SIZE  # where each pixel of the shaken image comes from
    grid = torch.nn.functional.affine_grid(theta, before.shape, align_corners=False)
    moved = torch.nn.functional.grid_sample(before, grid, align_corners=False)
    inside = (..., slice(10, -10), slice(10, -10))
    assert (moved - after)[inside].abs().mean() < 0.3 * (before - after)[inside].abs().mean()


def test_human_video_has_neither_actions_nor_state():
    human, hand = World("human", episodes=2), World("hand", episodes=2)
    read = human.read(0, [0, 1])
    assert human.action_dim == human.state_dim == 0 and "state" not in read
    torch.testing.assert_close(read["frames"], hand.read(0, [0, 1])["frames"])


def test_two_embodiments_look_different_doing_the_same():
    arm, hand, both = (World(variant, episodes=50) for variant in ("arm", "hand", "clean"))
    assert {both.read(episode, [0])["embodiment"] for episode in range(50)} == {0, 1}
    arm_read, hand_read = arm.read(0, [0, 9]), hand.read(0, [0, 9])
    assert (arm_read["embodiment"], hand_read["embodiment"]) == (0, 1)
    assert arm.instructions(0, [0]) == hand.instructions(0, [0])
    assert torch.equal(arm_read["state"], hand_read["state"])
    assert (arm_read["frames"].int() - hand_read["frames"].int()).abs().float().mean() > 5


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="tidy.*clean"):
        World("tidy")
    with pytest.raises(ValueError, match="episodes=0"):
        World("clean", episodes=0)
    with pytest.raises(ValueError, match="episode 5"):
        World("clean", episodes=5).read(5, [0])
    with pytest.raises(ValueError, match="frames"):
        World("clean", episodes=5).read(0, [48])


@pytest.mark.timing
def test_throughput_is_printed(capsys):
    world, rng = World("default"), np.random.default_rng(0)
    pairs = [(int(episode), rng.integers(0, MIN_LENGTH, 2)) for episode in rng.integers(0, 1000, 300)]
    for episode, indices in pairs:
        world.read(episode, indices)
    start = time.process_time()
    for episode, indices in pairs:
        world.read(episode, indices)
    frames_per_second = 2 * len(pairs) / (time.process_time() - start)
    with capsys.disabled():
        print(f"\nworld:default draws {frames_per_second:.0f} frames/s in pairs")
    assert frames_per_second > 300
