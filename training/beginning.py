"""Weights that a run begins with: a distilled student's, or those of a published bundle, so that whoever has the
repository can train on from what ships.

A bundle's graph has no norms any more: the exporter folded them into the convolutions. Each gets one again that changes
nothing, with the mean and spread that it meets in training batches, so that training goes on where the network is.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from pydantic import ValidationError
from torch import Tensor, nn

from model_store import Bundle
from training.batches import Batch
from training.errors import RunError
from training.objectives.soft_targets import teaching_bundle
from training.recipe import Recipe
from training.students.edge import SPEAKER_PARTS, Edge

Floats = npt.NDArray[np.float32]
MANIFEST = "manifest.csv"
Norm = nn.BatchNorm1d | nn.BatchNorm2d


def begun(recipe: Recipe, labels: list[str]) -> Edge:
    """The student as the recipe's seed has it, with the weights that it begins with. Raises RunError."""
    torch.manual_seed(recipe.seed)
    student = Edge(1 + len(labels), recipe.shape)
    if recipe.init is not None:
        begin_with(student, recipe.init)
    if recipe.begin is not None:
        anew = SPEAKER_PARTS if recipe.anew else ()
        begin_with_bundle(student, teaching_bundle(recipe.begin), labels, anew=anew)
    return student


def begin_with(student: Edge, weights: Path) -> None:
    """Take over a distilled student's weights, all but the keyword head, whose classes are its own. Raises RunError."""
    try:
        given = torch.load(weights, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise RunError(f"{weights} does not load: {error}") from error
    own = student.state_dict()
    wanted = {name for name in own if not name.startswith("keyword_head.")}
    unlike = sorted(name for name in wanted if name not in given or given[name].shape != own[name].shape)
    if unlike:
        raise RunError(
            f"{weights} holds a student of another shape ({unlike[0]}, {len(unlike)} in all); "
            "give both recipes the same shape"
        )
    student.load_state_dict({name: given[name] for name in wanted}, strict=False)


def begin_with_bundle(student: Edge, bundle: Bundle, labels: list[str], *, anew: Collection[str] = ()) -> None:
    """Take over all weights of `bundle`, whose shape and keywords have to be the student's; beside a trunk, those of
    the speaker branch alone. What is not taken over, and parts of the student that begin `anew`, are as the seed has
    them. Where all is, `student.eval()` gives what the bundle gives afterwards, and before it trains, `meet` has to be
    called. Raises RunError."""
    manifest, reference = bundle.manifest, reference_of(bundle)
    own = [keyword.label for keyword in manifest.keywords.labels]
    if own != labels:
        raise RunError(f"{reference} knows {len(own)} keywords, which are not the {len(labels)} of the data")
    graph = onnx.load_from_string(bundle.read(manifest.graph.file)).graph
    tensors, nodes = _tensors(graph), _nodes_of_modules(graph)
    for name, layer in student.named_modules():
        part = name.split(".")[0]
        if part in anew or (student.shape.trunk is not None and part not in SPEAKER_PARTS):
            continue
        given = [tensors.get(each) for each in nodes[name].input[1:]] if name in nodes else []
        if isinstance(layer, nn.Conv2d):
            weight, bias = (*given, None, None)[:2]
            _fill(layer.weight, weight, name, reference)
            norm = _norm_after(student, name)
            if layer.bias is not None:
                _fill(layer.bias, bias, name, reference)
            elif norm is not None:
                _fill(norm.bias, bias, name, reference)
                _without_effect(norm)
        elif isinstance(layer, nn.Linear):
            weight = given[0] if given else None
            _fill(layer.weight, None if weight is None else weight.T, name, reference)
        elif isinstance(layer, nn.BatchNorm1d):
            wanted = (layer.weight, layer.bias, *statistics_of(layer))
            for tensor, value in zip(wanted, (*given, *[None] * 4), strict=False):
                _fill(tensor, value, name, reference)


def reference_of(bundle: Bundle) -> str:
    return f"{bundle.manifest.name}@{bundle.manifest.version}"


def check_same_people(recipe: Recipe, bundle: Bundle, tables: Mapping[str, str]) -> None:
    """Calibration would meet people that the bundle was trained on, had it set others aside. `tables` are the digests
    of the data's. Raises RunError."""
    try:
        made = Recipe.model_validate(bundle.manifest.lineage.recipe)
    except ValidationError as error:
        raise RunError(f"{reference_of(bundle)} was not made by `sotto train`") from error
    if (made.seed, made.data.calibration_fraction) != (recipe.seed, recipe.data.calibration_fraction):
        raise RunError(f"{reference_of(bundle)} set other speakers aside; give the recipe its seed and fraction")
    if bundle.manifest.lineage.data.get(MANIFEST) != tables.get(MANIFEST):
        raise RunError(f"{reference_of(bundle)} was trained with another {MANIFEST}: who is set aside depends on it")


@torch.no_grad()
def meet(student: Edge, batches: Iterable[Batch], *, speakers: bool = True, keywords: bool = True) -> None:
    """Give each norm the mean and spread that it meets in these batches, and change its scale and offset so that the
    outputs stay what they were; without `speakers`, not those of the speaker branch, and without `keywords` those of
    a speaker branch that parts at the features alone."""
    student.eval()
    seen: dict[Norm, list[Tensor]] = {}
    with _watching(student, seen):
        for batch in batches:
            student(batch.waveform, batch.lengths, speakers=speakers, keywords=keywords)
    for norm, (count, total, squares) in seen.items():
        mean = total / count
        variance = (squares / count - mean * mean).clamp(min=1e-6)
        own_mean, own_variance = statistics_of(norm)
        scale = norm.weight / torch.sqrt(own_variance + norm.eps)
        offset = norm.bias - own_mean * scale
        own_mean.copy_(mean)
        own_variance.copy_(variance)
        norm.weight.copy_(scale * torch.sqrt(variance + norm.eps))
        norm.bias.copy_(offset + mean * scale)


@contextmanager
def _watching(student: Edge, seen: dict[Norm, list[Tensor]]) -> Iterator[None]:
    """Adds up what goes into each norm over time: how many values a channel, their sum and the sum of their squares."""

    def watch(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, Norm)
        x = given[0].double().transpose(0, 1).flatten(1)
        now = [torch.tensor(float(x.shape[1])), x.sum(dim=1), (x * x).sum(dim=1)]
        seen[norm] = [a + b for a, b in zip(seen[norm], now, strict=True)] if norm in seen else now

    handles = [norm.register_forward_pre_hook(watch) for norm in student.modules() if isinstance(norm, Norm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm_after(student: Edge, name: str) -> nn.BatchNorm2d | None:
    """The norm that follows a convolution in its sequence."""
    parent, _, index = name.rpartition(".")
    if not index.isdigit():
        return None
    following = getattr(student.get_submodule(parent), str(int(index) + 1), None)
    return following if isinstance(following, nn.BatchNorm2d) else None


def statistics_of(norm: Norm) -> tuple[Tensor, Tensor]:
    """Its mean and variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _without_effect(norm: nn.BatchNorm2d) -> None:
    """All but its offset."""
    mean, variance = statistics_of(norm)
    with torch.no_grad():
        norm.weight.fill_(1.0)
        mean.zero_()
        variance.fill_(1.0 - norm.eps)


def _nodes_of_modules(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """By module: torch calls the node of `keyword.0.layers.2` `/student/keyword.0/layers/layers.2/Conv`."""
    found = {}
    for node in graph.node:
        scope = node.name.split("/")[2:-1]
        if node.op_type not in ("Conv", "MatMul", "BatchNormalization") or not scope:
            continue
        path: list[str] = []
        for part in scope:
            # A member of a sequence is told with the sequence's name before it.
            if path and part.startswith(f"{path[-1]}."):
                path.pop()
            path.append(part)
        found[".".join(path)] = node
    return found


def _tensors(graph: onnx.GraphProto) -> dict[str, Floats]:
    """Constants by name, those in eight bits (training/compact.py) as what they stand for."""
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or not all(name in kept for name in node.input):
            continue
        levels, scales = (kept[name] for name in node.input[:2])
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [-1 if index == axis else 1 for index in range(levels.ndim)]
        kept[node.output[0]] = levels.astype(np.float32) * scales.reshape(shape)
    return kept


def _fill(own: Tensor, value: Floats | None, name: str, reference: str) -> None:
    if value is None or value.shape != tuple(own.shape):
        raise RunError(f"{reference} is a network of another shape ({name})")
    with torch.no_grad():
        own.copy_(torch.from_numpy(np.array(value, dtype=np.float32)))
