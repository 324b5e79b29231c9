"""S3-Router: a frozen trunk, and for each task a binary mask over its weights (Fu et al. 2022).

Every masked matrix W has real scores S of its shape. Going forward the lowest floor(sparsity x numel) of |S|
within that one matrix are switched off, W_eff = W * M; going backward M's gradient is handed to |S| as it is, so

    dL/dS = (dL/dW_eff * W) * sign(S).

The paper's code calls the share that is *kept* `prune_rate`; `sparsity` here is the share switched off. One bit a
weight is all that a task adds to the trunk, beside its heads. Masks of single weights save no time; those of
whole units do once `slim` has taken the units out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from training.errors import RunError
from training.teachers import SelfSupervised

FEED_FORWARD = ("feed_forward.intermediate_dense", "feed_forward.output_dense")
ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj")


class MaskRecipe(BaseModel):
    """The defaults are the paper's for fine-tuning: a tenth of the feed-forward weights, scores in the order of
    the weights' sizes. For pruning: `sparsity` up to 0.8, `scope: all`, `init: magnitude`, on a fine-tuned trunk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float = Field(default=0.1, ge=0, lt=1)
    scope: Literal["feed-forward", "all"] = "feed-forward"
    init: Literal["rank", "magnitude", "random"] = "rank"
    # One score for each weight, for each row or column of a matrix, or for each hidden unit of the feed-forward
    # layers: its row in the first of their two matrices, so that `slim` can take all of it out.
    structure: Literal["weights", "rows", "columns", "units"] = "weights"


class _Top(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, size: Tensor, sparsity: float) -> Tensor:
        flat = size.flatten()
        off = math.floor(sparsity * flat.numel())
        if off == 0:
            return torch.ones_like(size)
        on = flat > flat.kthvalue(off).values
        if int((~on).sum()) != off:
            # Equal scores at the border: in a fixed order, so that the count is exact.
            on = torch.ones_like(on)
            on[flat.argsort(stable=True)[:off]] = False
        return on.to(size.dtype).view_as(size)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Masked(nn.Module):
    """A parametrisation: the weight times its mask."""

    def __init__(self, weight: Tensor, recipe: MaskRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        by_row = (weight.shape[0], 1)
        shape = {"weights": weight.shape, "rows": by_row, "columns": (1, weight.shape[1]), "units": by_row}
        scores = first_scores(weight.detach(), torch.Size(shape[recipe.structure]), recipe.init)
        # Where nothing is switched off there is nothing to learn.
        self.score = nn.Parameter(scores, requires_grad=recipe.sparsity > 0)

    def mask(self) -> Tensor:
        """Of the scores' shape, 0 or 1."""
        found: Tensor = _Top.apply(self.score.abs(), self.recipe.sparsity)  # type: ignore[no-untyped-call]  # torch's
        return found

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask()


def first_scores(weight: Tensor, shape: torch.Size, init: str) -> Tensor:
    """For a row or column its weights' norm stands for its size."""
    size = weight if weight.shape == shape else weight.norm(dim=1 if shape[1] == 1 else 0).view(shape)
    if init == "magnitude":
        return size.clone()
    scores = torch.empty(shape)
    nn.init.kaiming_uniform_(scores, a=math.sqrt(5))
    if init == "rank":
        ordered = scores.flatten()[scores.abs().flatten().argsort()]
        scores = torch.empty_like(ordered)
        scores[size.abs().flatten().argsort(stable=True)] = ordered
        scores = scores.view(shape)
    return scores


def add_masks(trunk: SelfSupervised, recipe: MaskRecipe) -> dict[str, Masked]:
    """Freeze the trunk and mask its matrices; returns the masks by the name of their layer."""
    trunk.requires_grad_(False)
    found = {}
    scope = "units" if recipe.structure == "units" else recipe.scope
    for name, linear in masked_layers(trunk, scope).items():
        weight: Tensor = linear.weight
        masked = Masked(weight, recipe)
        parametrize.register_parametrization(linear, "weight", masked)
        found[name] = masked
    return found


def masked_layers(trunk: SelfSupervised, scope: str) -> dict[str, nn.Linear]:
    """The encoder's matrices that a mask of this scope covers, by name."""
    wanted = {"feed-forward": FEED_FORWARD, "units": FEED_FORWARD[:1], "all": (*ATTENTION, *FEED_FORWARD)}[scope]
    return {
        name: module
        for name, module in trunk.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.layers.") and name.endswith(wanted)
    }


def masks_of(trunk: SelfSupervised) -> dict[str, Tensor]:
    """Boolean masks of a trunk that has them."""
    found = {}
    for name, module in trunk.model.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            held: Any = module.parametrizations
            found[name] = held.weight[0].mask().detach().bool().cpu()
    return found


def save_masks(masks: Mapping[str, Tensor], path: Path) -> None:
    """One bit each, rows of eight packed from the highest bit on; shapes beside them."""
    tensors = {}
    for name, mask in masks.items():
        tensors[f"{name}.bits"] = torch.from_numpy(np.packbits(mask.flatten().numpy()))
        tensors[f"{name}.shape"] = torch.tensor(mask.shape)
    save_file(tensors, path)


def load_masks(path: Path) -> dict[str, Tensor]:
    """As they were saved. Raises RunError."""
    try:
        tensors = load_file(path)
        found = {}
        for name in sorted({key.rsplit(".", 1)[0] for key in tensors}):
            shape = tuple(tensors[f"{name}.shape"].tolist())
            bits = np.unpackbits(tensors[f"{name}.bits"].numpy(), count=math.prod(shape))
            found[name] = torch.from_numpy(bits).bool().view(shape)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} holds no masks: {error}") from error
    return found


def apply_masks(trunk: SelfSupervised, masks: Mapping[str, Tensor]) -> None:
    """Switch off weights of a plain trunk for good. Raises RunError where the masks are of another trunk."""
    modules = dict(trunk.model.named_modules())
    for name, mask in masks.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or not _fits(linear.weight, mask):
            raise RunError(f"the mask of {name} is of another trunk")
        with torch.no_grad():
            linear.weight.mul_(mask)


def _fits(weight: Tensor, mask: Tensor) -> bool:
    return len(mask.shape) == 2 and all(own in {1, size} for own, size in zip(mask.shape, weight.shape, strict=True))


def trunk_digest(trunk: SelfSupervised) -> str:
    """SHA-256 of a plain trunk's weights: masks are worth nothing on another one."""
    digest = hashlib.sha256()
    for name, value in sorted(trunk.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def similarity(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Cosine between two tasks' masks, layer by layer."""
    return {
        name: float(functional.cosine_similarity(mask.float().flatten(), other[name].float().flatten(), dim=0))
        for name, mask in one.items()
    }


@torch.no_grad()
def slim(trunk: SelfSupervised) -> int:
    """Take hidden units of the feed-forward layers out that masks of rows or columns have switched off; returns how
    many. The outputs stay as they are: what a unit without inputs says is constant and moves into the bias."""
    taken = 0
    encoder: Any = trunk.model
    for layer in encoder.encoder.layers:
        feed_forward = layer.feed_forward
        into, out = feed_forward.intermediate_dense, feed_forward.output_dense
        unused = ~out.weight.any(dim=0)
        constant = ~into.weight.any(dim=1) & ~unused
        out.bias += out.weight[:, constant] @ feed_forward.intermediate_act_fn(into.bias[constant])
        kept = ~(unused | constant)
        taken += int((~kept).sum())
        feed_forward.intermediate_dense = _linear(into.weight[kept], into.bias[kept])
        feed_forward.output_dense = _linear(out.weight[:, kept], out.bias)
    return taken


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made
