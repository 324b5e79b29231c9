"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") for matrices of convolutions,
AdamW for everything else: an update of a matrix is as large in each of its directions, not in the loudest ones alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class MuonAndAdamW(torch.optim.AdamW):
    """`matrices` are weights of convolutions [out, in, height, width], each of which is one matrix [out, the rest] to
    Muon; `groups` are AdamW's. Learning rates are those of the first group: Muon's updates are as large as AdamW's (Liu
    et al. 2025, "Muon is scalable for LLM training", section 2.2)."""

    def __init__(self, groups: list[dict[str, Any]], matrices: Iterable[Tensor], *, weight_decay: float) -> None:
        super().__init__(groups)
        self._matrices = list(matrices)
        self._flat = [nn.Parameter(_flat(weight.detach())) for weight in self._matrices]
        if any(flat.data_ptr() != weight.data_ptr() for flat, weight in zip(self._flat, self._matrices, strict=True)):
            raise ValueError("a weight is neither of one column a channel nor in channels-last order")
        self._muon = torch.optim.Muon(self._flat, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self._matrices:
            weight.grad = None

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for flat, weight in zip(self._flat, self._matrices, strict=True):
            flat.grad = None if weight.grad is None else _flat(weight.grad)
        for group in self._muon.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self._muon.step()  # type: ignore[no-untyped-call]  # torch wrote it without types
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": super().state_dict(), "muon": self._muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["adamw"])
        self._muon.load_state_dict(state_dict["muon"])


def matrices_of(network: nn.Module) -> Iterator[Tensor]:
    """Of convolutions that mix channels and that a norm follows: those with a bias are outputs."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.bias is None:
            yield layer.weight


def _flat(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
