"""Muon beside AdamW: whose weights it learns, how large its steps are, and that a stopped run goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.conftest import TinyRun
from tests.training.test_run import assert_same_weights
from training.muon import MuonAndAdamW, matrices_of
from training.rates import optimizer_of
from training.run import train
from training.students.edge import Edge


def convolutions() -> nn.Sequential:
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(8, 16, (1, 3), bias=False),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, (1, 3), groups=16, bias=False),
        nn.Conv2d(16, 4, 1),
    )
    return network.to(memory_format=torch.channels_last)


def optimizer_for(network: nn.Module, *, decay: float = 0.0) -> MuonAndAdamW:
    matrices = list(matrices_of(network))
    apart = {id(weight) for weight in matrices}
    others = [parameter for parameter in network.parameters() if id(parameter) not in apart]
    return MuonAndAdamW([{"params": others, "lr": 0.01}], matrices, weight_decay=decay)


def test_matrices_are_those_between_channels_before_a_norm() -> None:
    network = convolutions()
    assert [weight.shape for weight in matrices_of(network)] == [(16, 8, 1, 3)]


def test_an_update_is_as_large_in_each_direction_and_as_adamw_s() -> None:
    network = convolutions()
    before = network[0].weight.detach().clone()
    optimizer = optimizer_for(network)
    network(torch.randn(2, 8, 1, 20)).square().mean().backward()
    optimizer.step()
    update = (network[0].weight.detach() - before).flatten(1)
    sizes = torch.linalg.svdvals(update)
    # The iteration brings them near to each other, not to one value (section "Newton-Schulz" there).
    assert sizes.min() > 0.5 * sizes.max()
    assert update.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3)


def test_every_parameter_learns_and_gradients_go() -> None:
    network = convolutions()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = optimizer_for(network)
    network(torch.randn(2, 8, 1, 20)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    for parameter, was in zip(network.parameters(), before, strict=True):
        assert parameter.grad is None
        assert not torch.equal(parameter, was)


def test_a_weight_in_another_order_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(8, 16, (1, 3), bias=False))
    with pytest.raises(ValueError, match="channels-last"):
        optimizer_for(network)


def test_a_stopped_run_goes_on_with_it(made_run: TinyRun, tmp_path: Path) -> None:
    schedule = made_run.recipe.schedule.model_copy(update={"optimizer": "muon", "steps": 6})
    recipe = made_run.recipe.model_copy(update={"schedule": schedule})
    student = Edge(3, recipe.shape).to(memory_format=torch.channels_last)
    assert isinstance(optimizer_of(recipe, student, nn.Linear(1, 1)), MuonAndAdamW)
    train(recipe, tmp_path / "whole", made_run.cache)
    train(recipe, tmp_path / "parts", made_run.cache, stop_after=3)
    train(recipe, tmp_path / "parts", made_run.cache)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
