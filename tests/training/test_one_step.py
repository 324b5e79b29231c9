"""OS-KDFT. Numbers in brackets are those of the checklist in the design (recipes.md, 4(e))."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel

from model_store.inference import open_session
from tests.training.chain import Chain, tiny_hubert, tune_recipe
from training.audio_cache import AudioCache
from training.augment import AugmentRecipe
from training.batches import Batch, BatchSource, SamplingRecipe
from training.errors import RunError
from training.export import check_graph_equals_network, traced
from training.finetune import FinetuneRecipe, JointFinetuning, _source, finetune, load_joint
from training.manifest import labels_of, read_data
from training.objectives.one_step import MigratingSource, OneStep, OneStepRecipe
from training.students.adapters import AdapterRecipe
from training.students.back_ends import EcapaBackEnd, LightBackEnd, back_end
from training.students.distil import student_of
from training.students.joint import JointModel
from training.teachers import SelfSupervised, Teacher, load_teacher

A = {"generation": "a", "weight": 100.0, "targets": (1, 2)}
B = {"generation": "b", "targets": (1, 2), "crop_s": 0.5}
FIRST_ADAPTER = AdapterRecipe(width=4, scale=0.1, norm=True, residual=True, noise=(0.0, 0.0))
STEPS = 8


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(tiny_hubert(), normalise=True)


def model_of(teacher: Teacher, **changes: object) -> JointModel:
    torch.manual_seed(1)
    settings = {"speaker_dim": 8, "adapters": AdapterRecipe(width=4), "speakers_by": "light", **changes}
    model = JointModel(student_of(teacher, layers=1), 3, **settings)
    # Adapters begin as nothing; here they shall be something.
    for parameter in [] if model.adapters is None else model.adapters.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    clean, other = (0.1 * torch.randn(3, 8000, generator=generator) for _ in range(2))
    return Batch(
        waveform=clean + 0.02 * torch.randn(3, 8000, generator=generator),
        lengths=torch.tensor([8000, 6000, 8000]),
        keyword=torch.tensor([1, 0, 2]),
        word_s=torch.zeros(3, 2),
        possible=torch.ones(3, 3, dtype=torch.bool),
        speaker=torch.tensor([0, 1, 2]),
        clean=clean,
        unlabelled=other,
        unlabelled_lengths=torch.tensor([8000, 8000, 5000]),
    )


def stage_of(teacher: Teacher, model: JointModel, one_step: dict[str, object]) -> JointFinetuning:
    tuning = FinetuneRecipe.model_validate(
        {"name": "x", "data": "x", "tasks": ["speakers"], "one_step": one_step, "schedule": {"steps": STEPS}}
    )
    assert tuning.one_step is not None
    torch.manual_seed(2)
    return JointFinetuning(model, 3, tuning, one_step=OneStep(model, teacher, tuning.one_step, STEPS))


@pytest.mark.parametrize("one_step", [A, B])
def test_both_losses_are_of_one_step_and_reach_one_trunk(teacher: Teacher, one_step: dict[str, object]) -> None:
    """[1]"""
    gradients = {}
    for name in ("speakers", "distillation"):
        model = model_of(teacher, dropout=0.0)
        terms = stage_of(teacher, model, one_step).eval()(batch(), 0)
        assert float(terms["total"].detach()) == pytest.approx(
            float(terms["speakers"].detach()) + float(terms["distillation"].detach()), rel=1e-5
        )
        terms[name].backward()
        gradients[name] = model.trunk.model.encoder.layers[0].feed_forward.output_dense.weight.grad
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize("one_step", [A, B])
@pytest.mark.parametrize("adapters", [AdapterRecipe(width=4), FIRST_ADAPTER])
def test_adapters_act_in_the_task_s_pass_only(
    teacher: Teacher, one_step: dict[str, object], adapters: AdapterRecipe
) -> None:
    """[2] The distillation does not notice that their weights change; the embedding does."""
    model = model_of(teacher, adapters=adapters)
    stage = stage_of(teacher, model, one_step).eval()
    assert model.adapters is not None

    def figures() -> tuple[float, Tensor]:
        with torch.no_grad():
            given = batch()
            return float(stage(given, 0)["distillation"]), model(given.waveform, given.lengths).speaker_embedding

    before = figures()
    for parameter in model.adapters.parameters():
        nn.init.normal_(parameter, std=0.7)
    after = figures()
    assert before[0] == after[0]
    assert not torch.allclose(before[1], after[1], atol=1e-3)


def test_adapters_begin_as_nothing(teacher: Teacher) -> None:
    plain = JointModel(student_of(teacher, layers=1), 3, speaker_dim=8).eval()
    adapted = JointModel(student_of(teacher, layers=1), 3, speaker_dim=8, adapters=AdapterRecipe()).eval()
    given = batch()
    with torch.no_grad():
        one, other = (model.trunk(given.waveform, given.lengths).hidden[-1] for model in (plain, adapted))
    assert torch.equal(one, other)


def test_the_first_generation_adds_the_input_once_more(teacher: Teacher) -> None:
    model = model_of(teacher, adapters=FIRST_ADAPTER).eval()
    assert model.adapters is not None
    layer = model.trunk.model.encoder.layers[0]
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        adapted = layer.feed_forward(x)
        with model.adapters.off():
            plain = layer.feed_forward(x)
        adapter = model.adapters.layers[0]
        inner = torch.relu(adapter.down(adapter.norm(x)))
    assert torch.allclose(adapted, plain + x + 0.1 * adapter.up(inner), atol=1e-5)


def test_noise_in_the_bottleneck_is_for_training(teacher: Teacher) -> None:
    model = model_of(teacher)
    assert model.adapters is not None
    adapter, x = model.adapters.layers[0], torch.randn(1, 5, 16)
    assert torch.equal(adapter.eval()(x), adapter(x))
    assert not torch.equal(adapter.train()(x), adapter(x))


def test_the_first_generation_s_weight_decays_to_nothing(teacher: Teacher) -> None:
    """[3]"""
    stage = stage_of(teacher, model_of(teacher), A).eval()
    losses = [float(stage(batch(), step)["distillation"].detach()) for step in (0, STEPS // 2, STEPS)]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-4)
    assert losses[2] == 0.0


def test_the_first_generation_compares_last_layers(teacher: Teacher) -> None:
    """100 times the mean square, the teacher hearing the clean crop."""
    model = model_of(teacher).eval()
    given = batch()
    assert given.clean is not None
    assert model.adapters is not None
    with torch.no_grad():
        wanted = teacher(given.clean, given.lengths)
        with model.adapters.off():
            found = model.trunk(given.waveform, given.lengths)
        inside = found.mask[:, :, None].expand_as(wanted.hidden[-1])
        expected = 100 * float((found.hidden[-1] - wanted.hidden[-1])[inside].square().mean())
        assert float(stage_of(teacher, model, A).eval()(given, 0)["distillation"]) == pytest.approx(expected, rel=1e-4)


def test_the_second_generation_sums_over_frames(teacher: Teacher) -> None:
    """A perfect student still costs 0.3133 for each frame and layer."""
    model = model_of(teacher)
    one_step = OneStep(model, teacher, OneStepRecipe.model_validate({**B, "targets": (1,)}), STEPS)
    with torch.no_grad():
        given = batch()
        assert given.unlabelled is not None
        assert given.unlabelled_lengths is not None
        perfect = teacher(given.unlabelled, given.unlabelled_lengths).hidden[1]
        assert one_step.heads is not None
        one_step.heads.forward = lambda _frames: [perfect]
        frames = sum(teacher.frames(int(length)) for length in given.unlabelled_lengths) / 3
        assert float(one_step(given, 0)) == pytest.approx(0.31326 * frames, rel=1e-3)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (STEPS // 2, 0.5), (STEPS, 1.0)])
def test_the_second_generation_s_audio_migrates(made_data: Path, tmp_path: Path, step: int, share: float) -> None:
    """[3]"""
    data = read_data(made_data)
    clips = data.split("train")
    cache = AudioCache.build(tmp_path, [clip.path for clip in clips])
    labelled = BatchSource(
        replace(data, noises=(), rooms=()), clips, cache, labels_of(clips), batch_size=100, seed=1,
        sampling=SamplingRecipe(crop_s=0.3), augment=AugmentRecipe(p_noise=0, p_room=0),
    )  # fmt: skip
    pools = [[clip for clip in clips if clip.corpus == corpus] for corpus in ("asc", "gsc")]
    source = MigratingSource(labelled, *pools, cache, crop_s=0.5, steps=STEPS, parts=1, seed=1)
    found = source[step]
    assert found.unlabelled is not None
    assert found.unlabelled_lengths is not None
    # Crops begin anywhere, so they are told by what corpus holds them.
    whole = [cache.read(clip.path) for clip in pools[1]]
    migrated = sum(
        any(crop[:200].tobytes() in samples.tobytes() for samples in whole) for crop in found.unlabelled.numpy()
    )
    assert abs(migrated / 100 - share) < 0.17
    assert torch.equal(source[step].unlabelled, found.unlabelled)


def test_a_run_s_audio_moves_from_its_corpora_to_known_speakers(made_data: Path, tmp_path: Path) -> None:
    """[3] As a recipe says it: at first nobody known is heard, in the last step mostly they are."""
    data = read_data(made_data)
    clips = data.split("train")
    cache = AudioCache.build(tmp_path, [clip.path for clip in clips])
    recipe = tune_recipe(
        made_data, tasks=("speakers",), one_step={**B, "corpora": ["gsc"], "crop_s": 0.3}, augment={"p_noise": 0.0},
        schedule={"steps": STEPS, "batch_size": 50, "workers": 0},
    )  # fmt: skip
    known = [replace(clip, speaker="" if clip.corpus == "gsc" else clip.speaker or "x") for clip in clips]
    source = _source(recipe, replace(data, noises=(), rooms=()), known, "speakers", cache, labels_of(clips), parts=2)
    whole = [cache.read(clip.path).tobytes() for clip in known if clip.speaker]

    def of_known_speakers(number: int) -> int:
        heard = source[number].unlabelled
        assert heard is not None
        return sum(any(crop[:200].tobytes() in samples for samples in whole) for crop in heard.numpy())

    # Two micro-batches make a step.
    assert (of_known_speakers(0), source[0].unlabelled_lengths.max()) == (0, 4800)
    assert of_known_speakers(2 * STEPS - 1) > 30


@pytest.mark.parametrize("kind", ["light", "ecapa"])
def test_back_ends_ignore_padding(kind: str) -> None:
    torch.manual_seed(0)
    network = back_end(kind, 16, 2, 8, 0.0).eval()
    hidden = [torch.randn(2, 60, 16) for _ in range(3)]
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, 35:] = False
    with torch.no_grad():
        together = network(hidden, mask)
        alone = network([layer[:1, :35] for layer in hidden], mask[:1, :35])
    assert torch.allclose(together[0], alone[0], atol=1e-4)


def test_back_ends_have_the_published_sizes() -> None:
    """9.4 M for ECAPA on 1,024 channels; 23.99 M for trunk, adapters and the light one."""
    ecapa = sum(parameter.numel() for parameter in EcapaBackEnd(1024, 192).parameters())
    assert ecapa == pytest.approx(9.4e6, rel=0.1)
    with torch.device("meta"):
        config = HubertConfig(num_hidden_layers=2, mask_time_prob=0.0)
        model = JointModel(
            SelfSupervised(HubertModel(config), normalise=True), 2, speakers_by="light", adapters=AdapterRecipe()
        )
    unused = sum(parameter.numel() for parameter in model.keyword_head.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) - unused == pytest.approx(23.99e6, rel=0.001)
    assert isinstance(model.speaker_head, LightBackEnd)


@pytest.mark.parametrize(("width", "channels"), [(16, 64), (256, 192), (384, 256), (768, 512), (1024, 512)])
def test_ecapa_is_scaled_down_with_its_trunk(width: int, channels: int) -> None:
    network = back_end("ecapa", width, 2, 8, 0.0)
    assert isinstance(network, EcapaBackEnd)
    assert (network.begin.conv.out_channels, network.aggregate.out_channels) == (channels, 3 * channels)


@pytest.mark.parametrize("kind", ["light", "ecapa"])
def test_the_graph_is_the_network(teacher: Teacher, kind: str) -> None:
    network = model_of(teacher, speakers_by=kind).eval()
    check_graph_equals_network(open_session(traced(network), threads=1), network)


@pytest.mark.parametrize("one_step", [A, B])
def test_a_run_trains_at_its_rates_and_is_opened_again(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_step: dict[str, object],
) -> None:
    """[4] and what is kept: trunk in the transformers format, adapters and back end beside it."""
    rates: dict[tuple[int, ...], float] = {}
    made = torch.optim.AdamW.__init__

    def noted(self: torch.optim.AdamW, given: list[dict[str, Any]], **settings: object) -> None:
        rates.update({tuple(one.shape): float(group["rate"]) for group in given for one in group["params"]})
        made(self, given, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", noted)
    recipe = tune_recipe(
        chain.data, tasks=("speakers",), layers=1, speakers_by="light", adapters={"width": 4}, trunk_rate=0.1,
        adapter_rate=10.0, balance_speakers=True, one_step=one_step,
    )  # fmt: skip
    folder = finetune(recipe, tmp_path / "run", chain.cache, init=str(chain.teacher))
    model, _ = load_joint(folder)
    assert model.adapters is not None
    parts = {
        0.1: model.trunk.model.encoder.layers[0].feed_forward.intermediate_dense,
        10.0: model.adapters.layers[0].down,
        1.0: model.speaker_head.project,
    }
    assert {rate: rates[tuple(part.weight.shape)] for rate, part in parts.items()} == {rate: rate for rate in parts}
    assert any(bool(parameter.any()) for parameter in model.adapters.layers[0].up.parameters())
    state = torch.load(folder / "last.pt", weights_only=True)["stage"]
    with torch.no_grad():
        again = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in again.items())
    assert json.loads((folder / "run.json").read_text())["identity"]["teacher"] == str(chain.teacher)
    assert not any("adapter" in name for name in load_teacher(str(folder / "model")).state_dict())


def test_heads_of_another_model_are_refused(chain: Chain, tmp_path: Path) -> None:
    recipe = tune_recipe(chain.data, tasks=("speakers",), speakers_by="light")
    folder = finetune(recipe, tmp_path / "run", chain.cache, init=str(chain.teacher))
    described = json.loads((folder / "joint.json").read_text())
    (folder / "joint.json").write_text(json.dumps({**described, "speakers_by": "ecapa"}))
    with pytest.raises(RunError, match="is not of the model"):
        load_joint(folder)


def test_frames_of_another_width_cannot_be_compared_as_they_are(teacher: Teacher) -> None:
    wide = JointModel(SelfSupervised(tiny_hubert(hidden_size=32, num_hidden_layers=1), normalise=True), 3)
    with pytest.raises(RunError, match="32 channels, 16"):
        OneStep(wide, teacher, OneStepRecipe.model_validate(A), STEPS)
