import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small

from hlrp.backbones import FlowTeacher, flow_loss, flow_to_rgb, mean_flow, resize_flow


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return FlowTeacher("random", num_flow_updates=2)


def frames(b, h, w):
    return torch.randint(256, (b, 2, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(64, 64), (128, 136), (100, 150)])
def test_flow_has_the_size_of_the_frames_even_where_raft_wants_larger_ones(teacher, size):
    flow = teacher(frames(2, *size))
    assert flow.shape == (2, 2, *size) and flow.dtype == torch.float32 and flow.isfinite().all()


def test_flow_of_small_frames_is_in_their_own_pixels(teacher, monkeypatch):
    seen = []

    def moved(first, second, num_flow_updates):
        seen.append(first.shape)
        return [torch.tensor([4.0, -8.0])[:, None, None].expand(len(first), 2, *first.shape[-2:])]

    monkeypatch.setattr(teacher.raft, "forward", moved)
    flow = teacher(frames(3, 64, 128))  # RAFT sees both sides twice as long
    assert seen == [(3, 3, 128, 256)]
    torch.testing.assert_close(mean_flow(flow), torch.tensor([2.0, -4.0]).expand(3, 2))


def test_flow_is_float32_and_the_same_under_autocast_and_twice(teacher):
    pair = frames(1, 128, 128)
    flow = teacher(pair)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = teacher(pair)
    assert under_autocast.dtype == torch.float32 and torch.equal(flow, under_autocast)
    assert torch.equal(flow, teacher(pair))


def test_the_teacher_is_frozen_stays_in_evaluation_mode_and_keeps_no_correlation_volume(teacher):
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(frames(1, 128, 128)).requires_grad
    assert teacher.raft.corr_block.corr_pyramid is None


def test_weights_come_from_a_safetensors_file_strictly(tmp_path):
    torch.manual_seed(1)
    state = raft_small(weights=None).state_dict()
    path = tmp_path / "raft.safetensors"
    save_file(state, path)
    loaded = FlowTeacher(str(path)).raft.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)

    del state["update_block.flow_head.conv1.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"raft\.safetensors[\s\S]*update_block\.flow_head\.conv1\.weight"):
        FlowTeacher(str(path))


@pytest.mark.parametrize("weights", ["C_T_V9", "nowhere/raft.safetensors", "raft.pth"])
def test_weights_that_are_not_there_are_named_with_what_would_fit(weights):
    with pytest.raises(ValueError, match=f"'{weights}'.*C_T_V2.*safetensors"):
        FlowTeacher(weights)


def test_a_failed_download_names_the_weights_and_where_a_file_would_be_found(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(ValueError, match=f"'C_T_V2'.*raft_small_C_T_V2.*no network.*{tmp_path}"):
        FlowTeacher("C_T_V2")


def test_a_flow_of_2_pixels_at_64_is_one_of_4_at_128():
    flow = torch.tensor([2.0, -1.0])[:, None, None].expand(1, 2, 64, 64)
    larger = resize_flow(flow, (128, 192))
    assert larger.shape == (1, 2, 128, 192)
    torch.testing.assert_close(mean_flow(larger), torch.tensor([[6.0, -2.0]]))  # 3x as wide, 2x as high
    torch.testing.assert_close(resize_flow(larger, (64, 64)), flow)


def test_the_picture_of_no_flow_is_white_and_opposite_flows_differ():
    flow = torch.zeros(3, 2, 4, 4)
    flow[1, 0], flow[2, 0] = 1, -1
    rgb = flow_to_rgb(flow)
    assert rgb.shape == (3, 3, 4, 4) and rgb.dtype == torch.uint8
    assert (rgb[0] == 255).all() and (rgb[1] != rgb[2]).any()


def test_the_loss_is_one_number_a_sample_and_zero_at_the_target():
    torch.manual_seed(0)
    pred, target = torch.randn(2, 3, 2, 8, 8)
    loss = flow_loss(pred, target, 0.1)
    assert loss.shape == (3,) and (loss > 0).all()
    torch.testing.assert_close(flow_loss(target, target, 0.1), torch.zeros(3))
    torch.testing.assert_close(flow_loss(pred[:1], target[:1], 0.1), loss[:1])


def test_both_terms_of_the_loss_have_a_gradient():  # D13
    torch.manual_seed(0)
    target = torch.randn(2, 2, 8, 8)

    def gradient(mean_flow_weight):
        pred = torch.zeros_like(target, requires_grad=True)
        flow_loss(pred, target, mean_flow_weight).sum().backward()
        return pred.grad

    assert gradient(0.0).abs().min() > 0
    assert (gradient(1.0) - gradient(0.0)).abs().min() > 0


def test_the_mean_flow_term_sees_a_shift_of_the_whole_and_not_noise_about_it():
    noise = torch.tensor([1.0, -1.0]).repeat(1, 2, 4, 2)  # mean zero
    shift = torch.ones(1, 2, 4, 4)
    target = torch.zeros(1, 2, 4, 4)
    assert flow_loss(noise, target, 1.0) == flow_loss(noise, target, 0.0)
    assert flow_loss(shift, target, 1.0) > 1.9 * flow_loss(shift, target, 0.0)
