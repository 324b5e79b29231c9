"""Teachers through the real loading path: small random models of all three families, saved as public ones are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from training.errors import TeacherError
from training.pretrain import save_teacher
from training.students.distil import student_of
from training.teachers import SelfSupervised, at_centres, load_teacher, require_hop

SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
# transformers leaves some of what is called here untyped.
CLASSES: dict[str, tuple[Any, Any]] = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "hubert": (HubertConfig, HubertModel),
    "wavlm": (WavLMConfig, WavLMModel),
}
KINDS = [
    ("wav2vec2", "group", True),
    ("hubert", "group", True),
    ("hubert", "layer", True),
    ("wavlm", "group", False),
    ("wavlm", "layer", True),
]


def save(folder: Path, family: str, norm: str, normalise: bool, **changes: object) -> Path:
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    settings = {**SHAPE, "feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer", **changes}
    model: PreTrainedModel = model_class(config_class(**settings))
    model.save_pretrained(folder)
    extractor: Any = Wav2Vec2FeatureExtractor
    extractor(do_normalize=normalise, return_attention_mask=norm == "layer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("teacher"), *request.param)


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hubert"), "hubert", "group", True)


def noise(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        batch[row, :length] = 0.1 * torch.randn(length, generator=generator) + 0.02
    return batch, torch.tensor(lengths)


def test_hidden_states_are_those_of_transformers(folder: Path) -> None:
    """Fed as the model's own preprocessor says, one clip at a time."""
    batch, lengths = noise(16_000)
    own = Wav2Vec2FeatureExtractor.from_pretrained(folder)(
        batch[0].numpy(), sampling_rate=16_000, return_tensors="pt"
    ).input_values
    family = json.loads((folder / "config.json").read_text())["model_type"]
    with torch.no_grad():
        told = CLASSES[family][1].from_pretrained(folder).eval()(own, output_hidden_states=True)
    # What leaves the encoder is normed in every model, also where the norms of its layers come first.
    wanted = (*told.hidden_states[:-1], told.last_hidden_state)
    found = load_teacher(str(folder))(batch, lengths).hidden
    assert len(found) == len(wanted) == 4
    # The weights of that norm are still those that it began with.
    assert found[-1].square().mean(dim=2).sqrt() == pytest.approx(1.0, abs=0.01)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_clips_give_in_a_batch_what_they_give_alone(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    batch, lengths = noise(16_000, 9000, 9000, 30_001, 300)
    together = teacher(batch, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = teacher(batch[row : row + 1, :length], lengths[row : row + 1])
        frames = teacher.frames(length)
        assert int(together.mask[row].sum()) == frames == alone.hidden[0].shape[1]
        for one, other in zip(together.hidden, alone.hidden, strict=True):
            assert (one[row, :frames] - other[0]).abs().max() < 1e-3


def test_the_last_norm_is_trained(tmp_path: Path) -> None:
    trunk = load_teacher(str(save(tmp_path, "hubert", "layer", True))).model
    student = SelfSupervised(trunk.requires_grad_(True), normalise=True)
    torch.autograd.backward(student(*noise(16_000)).hidden[-1].square().mul(torch.arange(24)).mean())
    assert trunk.encoder.layer_norm.weight.grad.abs().sum() > 0


def test_an_adapter_for_translation_is_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path, "wav2vec2", "layer", True, add_adapter=True, output_hidden_size=24)
    teacher = load_teacher(str(folder))
    assert {frames.shape[1] for frames in teacher(*noise(16_000)).hidden} == {teacher.frames(16_000)}
    save_teacher(student_of(teacher, layers=1), tmp_path / "student")
    assert load_teacher(str(tmp_path / "student")).layers == 1


def test_normalised_input_forgets_its_level(hubert: Path) -> None:
    teacher = load_teacher(str(hubert))
    batch, lengths = noise(16_000)
    assert (teacher(batch, lengths).hidden[-1] - teacher(batch * 0.1, lengths).hidden[-1]).abs().max() < 1e-2


def test_a_teacher_is_frozen_and_stays_in_evaluation_mode(hubert: Path) -> None:
    teacher = load_teacher(str(hubert)).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(*noise(16_000)).hidden[-1].requires_grad


def test_it_knows_its_shape(hubert: Path) -> None:
    teacher = load_teacher(str(hubert))
    assert (teacher.family, teacher.layers, teacher.width, teacher.hop, teacher.reach) == ("hubert", 3, 24, 320, 400)
    assert [teacher.frames(samples) for samples in (1, 400, 719, 720, 16_000)] == [1, 1, 1, 2, 49]


def test_interpolation_keeps_frames_at_their_own_centres(hubert: Path) -> None:
    teacher = load_teacher(str(hubert))
    hidden = torch.randn(2, 10, 5)
    assert torch.allclose(at_centres(hidden, teacher, teacher.centres(10)), hidden, atol=1e-5)


def test_interpolation_is_linear_between_and_constant_outside(hubert: Path) -> None:
    teacher = load_teacher(str(hubert))
    hidden = torch.arange(4.0)[None, :, None]
    # Frames are centred on 200, 520, 840, 1160.
    found = at_centres(hidden, teacher, torch.tensor([0.0, 360.0, 600.0, 5000.0]))
    assert found.flatten().tolist() == pytest.approx([0.0, 0.5, 1.25, 3.0])


def test_another_frame_rate_is_refused_with_both_rates(hubert: Path) -> None:
    teacher = load_teacher(str(hubert))
    require_hop(teacher, 320, student="the student")
    with pytest.raises(TeacherError, match="each 320 samples and the student one each 800"):
        require_hop(teacher, 800, student="the student")


def without(folder: Path, target: Path, *names: str) -> str:
    shutil.copytree(folder, target)
    for name in names:
        (target / name).unlink()
    return str(target)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="there is no folder"):
        load_teacher(str(tmp_path / "nothing"))


def test_no_config(hubert: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no config\.json"):
        load_teacher(without(hubert, tmp_path / "t", "config.json"))


def test_no_weights(hubert: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no weights; expected is one of model\.safetensors"):
        load_teacher(without(hubert, tmp_path / "t", "model.safetensors"))


def test_no_preprocessor(hubert: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"do_normalize"):
        load_teacher(without(hubert, tmp_path / "t", "preprocessor_config.json"))


def test_truncated_weights(hubert: Path, tmp_path: Path) -> None:
    source = without(hubert, tmp_path / "t")
    path = Path(source, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TeacherError, match="do not load"):
        load_teacher(source)


def test_weights_missing_from_the_file_are_named(hubert: Path, tmp_path: Path) -> None:
    """transformers fills them with random numbers and only warns."""
    source = without(hubert, tmp_path / "t")
    path = Path(source, "model.safetensors")
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "layers.1." in name)
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 weights are missing .*layers\.1\."):
        load_teacher(source)


def test_weights_of_another_shape(hubert: Path, tmp_path: Path) -> None:
    source = without(hubert, tmp_path / "t")
    path = Path(source, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))
    with pytest.raises(TeacherError, match="do not load"):
        load_teacher(source)


def test_another_architecture(hubert: Path, tmp_path: Path) -> None:
    source = without(hubert, tmp_path / "t")
    Path(source, "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(TeacherError, match="'bert' model; teachers are wav2vec2, hubert, wavlm"):
        load_teacher(source)


def test_another_sampling_rate(hubert: Path, tmp_path: Path) -> None:
    source = without(hubert, tmp_path / "t")
    path = Path(source, "preprocessor_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "sampling_rate": 8000}))
    with pytest.raises(TeacherError, match="wants 8000 Hz"):
        load_teacher(source)


def test_hub_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match="Without network, download it elsewhere and give the folder"):
        load_teacher("microsoft/wavlm-base-plus")
