"""S3-Router. Numbers in brackets are those of the checklist in the design (recipes.md, 5(e))."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import HubertModel

from model_store.inference import open_session
from tests.training.chain import Chain, tiny_hubert, tune_recipe
from training.errors import RunError
from training.export import check_graph_equals_network, export, traced
from training.finetune import finetune, load_joint, trainable
from training.students.joint import JointModel
from training.students.masks import (
    Masked,
    MaskRecipe,
    add_masks,
    apply_masks,
    first_scores,
    load_masks,
    masked_layers,
    masks_of,
    save_masks,
    similarity,
    slim,
    trunk_digest,
)
from training.teachers import SelfSupervised, load_teacher


@pytest.fixture
def trunk() -> SelfSupervised:
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
    return SelfSupervised(tiny_hubert(**still, layerdrop=0.0), normalise=True)


def plain_name(name: str) -> str:
    """Of a weight in the trunk without masks."""
    end = ".parametrizations.weight.original"
    return f"{name.removesuffix(end)}.weight" if name.endswith(end) else name


def heard(trunk: SelfSupervised) -> Tensor:
    wave = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    return trunk(wave, torch.tensor([8000, 5000])).hidden[-1]


@pytest.mark.parametrize("sparsity", [0.0, 0.04, 0.1, 0.5, 0.8])
@pytest.mark.parametrize("structure", ["weights", "rows", "columns"])
def test_each_matrix_has_exactly_its_sparsity(trunk: SelfSupervised, sparsity: float, structure: str) -> None:
    """[2]"""
    recipe = MaskRecipe.model_validate({"sparsity": sparsity, "scope": "all", "structure": structure})
    masks = add_masks(trunk, recipe)
    assert len(masks) == 2 * 6
    for masked in masks.values():
        mask = masked.mask()
        assert int((mask == 0).sum()) == math.floor(sparsity * mask.numel())
        assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_a_mask_of_units_covers_the_first_matrix_of_each_pair(trunk: SelfSupervised) -> None:
    masks = add_masks(trunk, MaskRecipe(sparsity=0.25, structure="units", scope="all"))
    assert sorted(masks) == [f"encoder.layers.{layer}.feed_forward.intermediate_dense" for layer in range(2)]
    assert {tuple(masked.mask().shape) for masked in masks.values()} == {(24, 1)}


def test_where_nothing_is_off_no_score_is_trained(trunk: SelfSupervised) -> None:
    add_masks(trunk, MaskRecipe(sparsity=0.0))
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_equal_scores_keep_the_count_exact() -> None:
    """[2]"""
    masked = Masked(torch.ones(4, 5), MaskRecipe(sparsity=0.3, init="magnitude"))
    assert int((masked.mask() == 0).sum()) == 6
    assert torch.equal(masked.mask(), masked.mask())


def test_the_lowest_scores_are_switched_off() -> None:
    masked = Masked(torch.tensor([[0.5, -3.0], [-0.1, 2.0]]), MaskRecipe(sparsity=0.5, init="magnitude"))
    assert masked.mask().tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_a_score_s_gradient_is_the_straight_through_one() -> None:
    """[3] dL/dS = dL/dW_eff * W * sign(S), whether the weight is on or off."""
    torch.manual_seed(0)
    weight, given = torch.randn(4, 6), torch.randn(4, 6)
    masked = Masked(weight, MaskRecipe(sparsity=0.4))
    (masked(weight) * given).sum().backward()
    assert masked.score.grad is not None
    assert torch.allclose(masked.score.grad, given * weight * masked.score.detach().sign())


def test_scores_begin_in_the_order_of_the_weights_as_the_weights_or_anyhow() -> None:
    """[4]"""
    torch.manual_seed(0)
    weight = torch.randn(8, 9)
    rank, magnitude, random = (first_scores(weight, weight.shape, init) for init in ("rank", "magnitude", "random"))
    order = weight.abs().flatten().argsort()
    assert torch.equal(rank.abs().flatten().argsort(), order)
    assert torch.equal(magnitude, weight)
    assert not torch.equal(random.abs().flatten().argsort(), order)
    bound = math.sqrt(6 / ((1 + 5) * 9))
    assert float(rank.abs().max()) <= bound
    rows = first_scores(weight, torch.Size((8, 1)), "rank")
    assert torch.equal(rows.abs().flatten().argsort(), weight.norm(dim=1).argsort())


def test_the_scope_is_feed_forward_or_everything(trunk: SelfSupervised) -> None:
    assert {name.split(".")[-1] for name in masked_layers(trunk, "feed-forward")} == {
        "intermediate_dense",
        "output_dense",
    }
    assert {name.split(".")[-1] for name in masked_layers(trunk, "all")} == {
        "intermediate_dense", "output_dense", "q_proj", "k_proj", "v_proj", "out_proj",
    }  # fmt: skip


@pytest.mark.parametrize("structure", ["weights", "rows", "columns"])
def test_masks_are_packed_at_one_bit_and_come_back(trunk: SelfSupervised, tmp_path: Path, structure: str) -> None:
    """[6]"""
    add_masks(trunk, MaskRecipe.model_validate({"sparsity": 0.3, "structure": structure, "scope": "all"}))
    masks = masks_of(trunk)
    save_masks(masks, tmp_path / "masks.safetensors")
    again = load_masks(tmp_path / "masks.safetensors")
    assert again.keys() == masks.keys()
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())
    bits = sum(mask.numel() for mask in masks.values())
    # Names and shapes take some kilobytes, whatever the size.
    assert (tmp_path / "masks.safetensors").stat().st_size < bits / 8 + 4000


def test_a_file_without_masks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "masks.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="holds no masks"):
        load_masks(tmp_path / "masks.safetensors")


def test_applied_masks_are_the_trained_ones(trunk: SelfSupervised) -> None:
    plain = SelfSupervised(HubertModel(trunk.model.config), normalise=True)
    plain.load_state_dict(trunk.state_dict())
    add_masks(trunk, MaskRecipe(sparsity=0.4, scope="all"))
    apply_masks(plain, masks_of(trunk))
    assert torch.allclose(heard(plain.eval()), heard(trunk.eval()), atol=1e-6)


def test_masks_of_another_trunk_are_refused(trunk: SelfSupervised) -> None:
    with pytest.raises(RunError, match="is of another trunk"):
        apply_masks(trunk, {"encoder.layers.0.feed_forward.output_dense": torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(RunError, match="is of another trunk"):
        apply_masks(trunk, {"encoder.layers.7.feed_forward.output_dense": torch.ones(16, 24, dtype=torch.bool)})


@pytest.mark.parametrize("structure", ["rows", "columns", "units"])
def test_units_that_are_off_are_taken_out_and_nothing_changes(trunk: SelfSupervised, structure: str) -> None:
    recipe = MaskRecipe.model_validate({"sparsity": 0.5, "structure": structure})
    add_masks(trunk, recipe)
    plain = SelfSupervised(HubertModel(trunk.model.config), normalise=True).eval()
    plain.load_state_dict(
        {plain_name(name): value for name, value in trunk.state_dict().items() if "score" not in name}
    )
    for layer in plain.model.encoder.layers:
        nn.init.normal_(layer.feed_forward.intermediate_dense.bias)
    apply_masks(plain, masks_of(trunk))
    expected = heard(plain)
    before = sum(parameter.numel() for parameter in plain.parameters())
    assert slim(plain) == 2 * 12
    assert sum(parameter.numel() for parameter in plain.parameters()) < before
    assert torch.allclose(heard(plain), expected, atol=1e-5)


def test_a_slim_trunk_becomes_a_graph(trunk: SelfSupervised) -> None:
    add_masks(trunk, MaskRecipe(sparsity=0.5, structure="columns"))
    masks = masks_of(trunk)
    plain = SelfSupervised(HubertModel(trunk.model.config), normalise=True)
    apply_masks(plain, masks)
    slim(plain)
    network = JointModel(plain, 3, speaker_dim=8).eval()
    check_graph_equals_network(open_session(traced(network), threads=1), network)


def test_similarity_is_the_cosine_of_stored_masks() -> None:
    """[8]"""
    one = {"a": torch.tensor([[True, True], [True, False]])}
    other = {"a": torch.tensor([[True, False], [True, True]])}
    assert similarity(one, one) == {"a": pytest.approx(1.0)}
    assert similarity(one, other) == {"a": pytest.approx(2 / 3)}


@pytest.fixture(scope="module")
def routed(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tasks on one backbone."""
    runs = {}
    for task in ("keywords", "speakers"):
        recipe = tune_recipe(chain.data, mode="masks", masks={"sparsity": 0.2}, tasks=(task,))
        runs[task] = finetune(recipe, tmp_path_factory.mktemp(task), chain.cache, init=str(chain.teacher))
    return runs


def test_the_backbone_s_weights_stay_as_they_were_to_the_bit(chain: Chain, routed: dict[str, Path]) -> None:
    """[1]"""
    original = load_teacher(str(chain.teacher)).model.state_dict()
    state = torch.load(routed["keywords"] / "last.pt", weights_only=True)["stage"]
    prefix = "model.trunk.model."
    compared = 0
    for name, value in state.items():
        if name.startswith(prefix) and not name.endswith(".score"):
            assert torch.equal(value, original[plain_name(name.removeprefix(prefix))])
            compared += 1
    assert compared == len(original)


def test_masks_are_learnt(chain: Chain, routed: dict[str, Path]) -> None:
    learnt = load_masks(routed["keywords"] / "masks.safetensors")
    fresh = trainable(str(chain.teacher))
    # Ranks of the weights decide which are off at first.
    torch.manual_seed(0)
    add_masks(fresh, MaskRecipe(sparsity=0.2))
    first = masks_of(fresh)
    assert any(not torch.equal(mask, first[name]) for name, mask in learnt.items())


def test_two_tasks_share_one_backbone(chain: Chain, routed: dict[str, Path]) -> None:
    """[7] A task is its mask and its heads: neither run holds a trunk, and each opens to its own model."""
    models = {}
    for task, run in routed.items():
        assert not (run / "model").exists()
        models[task], _ = load_joint(run)
    one, other = (load_masks(run / "masks.safetensors") for run in routed.values())
    assert any(value < 1 for value in similarity(one, other).values())
    trunk = load_teacher(str(chain.teacher))
    for name, mask in one.items():
        weight = dict(models["keywords"].trunk.model.named_modules())[name].weight
        assert torch.equal(weight, dict(trunk.model.named_modules())[name].weight * mask)


def test_a_masked_run_becomes_a_bundle(chain: Chain, routed: dict[str, Path], tmp_path: Path) -> None:
    manifest = export(routed["keywords"], tmp_path / "draft", name="routed", data_root=chain.data)
    assert manifest.graph.parameters > 0


def test_units_that_a_mask_switches_off_are_not_in_the_bundle(chain: Chain, tmp_path: Path) -> None:
    sizes = {}
    for structure in ("weights", "units"):
        recipe = tune_recipe(chain.data, mode="masks", masks={"sparsity": 0.5, "structure": structure})
        run = finetune(recipe, tmp_path / structure, chain.cache, init=str(chain.teacher))
        sizes[structure] = export(run, tmp_path / f"{structure}-bundle", name="m").graph.parameters
    # Two layers, half of 32 hidden units each, with 16 weights in, 16 out and a bias.
    assert sizes["weights"] - sizes["units"] == 2 * 16 * (16 + 16 + 1)


def test_masks_for_another_backbone_are_refused(chain: Chain, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for file in chain.teacher.iterdir():
        (backbone / file.name).write_bytes(file.read_bytes())
    recipe = tune_recipe(chain.data, mode="masks", tasks=("speakers",))
    run = finetune(recipe, tmp_path / "run", chain.cache, init=str(backbone))
    trunk = load_teacher(str(backbone))
    digest = trunk_digest(trunk)
    with torch.no_grad():
        next(iter(trunk.parameters())).add_(1.0)
    trunk.model.save_pretrained(backbone)
    assert trunk_digest(load_teacher(str(backbone))) != digest
    with pytest.raises(RunError, match="is not the trunk"):
        load_joint(run)
