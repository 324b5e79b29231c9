"""Long convolutions by Fourier transforms give what they give term by term."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from training.long_convolution import transform_long_convolutions


@pytest.mark.parametrize("frames", [1, 5, 70, 300])
@pytest.mark.parametrize(("taps", "padding", "groups"), [(128, 64, 4), (33, 16, 1), (32, 31, 2), (64, 63, 8)])
def test_outputs_and_gradients_are_the_same(frames: int, taps: int, padding: int, groups: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv1d(16, 8 * groups, taps, padding=padding, groups=groups)
    fast = nn.Conv1d(16, 8 * groups, taps, padding=padding, groups=groups)
    fast.load_state_dict(plain.state_dict())
    transform_long_convolutions(fast)
    if frames + 2 * padding < taps:
        pytest.skip("shorter than the kernel")
    found = []
    for layer in (plain, fast):
        signal = torch.randn(3, 16, frames, generator=torch.Generator().manual_seed(1), requires_grad=True)
        heard = layer(signal)
        heard.square().sum().backward()
        assert signal.grad is not None
        assert layer.weight.grad is not None
        assert layer.bias is not None
        assert layer.bias.grad is not None
        found.append([heard, signal.grad, layer.weight.grad, layer.bias.grad])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_it_is_used_and_only_for_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    others = nn.Conv1d(4, 4, 31), nn.Conv1d(4, 4, 64, stride=2), nn.Conv1d(4, 4, 64, padding=64)
    long = nn.Conv1d(4, 4, 64)
    model = nn.ModuleList([*others, nn.utils.parametrizations.weight_norm(long)])
    transform_long_convolutions(model)
    transform = Mock(wraps=torch.fft.rfft)
    monkeypatch.setattr(torch.fft, "rfft", transform)
    for layer in model:
        layer(torch.randn(1, 4, 100))
    # Of the signal and of the kernel.
    assert transform.call_count == 2


def test_under_autocast_it_has_32_bits_inside() -> None:
    layer = nn.Conv1d(4, 4, 64, padding=32, groups=2)
    signal = torch.randn(2, 4, 50)
    want = layer(signal)
    transform_long_convolutions(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(signal.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - want).abs().max() <= 0.02 * want.abs().max()
