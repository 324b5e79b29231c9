"""Kerpicci et al. 2023, end to end on made voices: teacher, distilled student, joint fine-tuning, served bundle.

Numbers in brackets are the items of checklist 1(e) of the design's recipes.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel

from model_store.inference import open_session
from tests.training.chain import SCHEDULE, Chain, distil_recipe, tune_recipe
from training.audio_cache import AudioCache
from training.augment import AugmentRecipe
from training.batches import Batch, BatchSource, SamplingRecipe
from training.calibrate import calibrate
from training.distil import build, distil
from training.errors import RunError, TeacherError
from training.evaluation.client import Upload, served
from training.export import check_graph_equals_network, export
from training.finetune import JointFinetuning, finetune, load_joint, trainable
from training.manifest import labels_of, read_data
from training.pretrain import save_teacher
from training.students.distil import PredictionHeads, student_of
from training.students.joint import JointModel
from training.teachers import SelfSupervised, Teacher, load_teacher


@pytest.fixture(scope="module")
def tuned(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned")
    return finetune(tune_recipe(chain.data), run, chain.cache, init=str(chain.distilled / "model"))


def test_before_the_first_step_the_student_is_the_teacher_s_beginning(chain: Chain) -> None:
    """[1]"""
    teacher = load_teacher(str(chain.teacher))
    student = build(distil_recipe(chain.data), teacher).student
    assert isinstance(student, SelfSupervised)
    original = teacher.model.state_dict()
    own = student.model.state_dict()
    assert any(name.startswith("feature_extractor.") for name in own)
    assert any(name.startswith("encoder.layers.0.") for name in own)
    assert not any(name.startswith("encoder.layers.1.") for name in own)
    assert all(torch.equal(value, original[name]) for name, value in own.items())


def test_distillation_changes_the_student_and_hands_on_no_heads(chain: Chain) -> None:
    before = load_teacher(str(chain.teacher)).model.state_dict()
    student = load_teacher(str(chain.distilled / "model"))
    assert student.layers == 1
    after = student.model.state_dict()
    assert not any("heads" in name for name in after)
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert any("conv_layers" in name for name in changed)
    assert any("encoder.layers.0" in name for name in changed)


def test_distillation_lowers_the_loss_on_people_it_did_not_hear(made_data: Path, chain: Chain, tmp_path: Path) -> None:
    schedule = {**SCHEDULE, "steps": 40, "watch_every": 20, "peak_learning_rate": 2e-3}
    recipe = distil_recipe(made_data, schedule=schedule)
    folder = distil(recipe, tmp_path / "run", chain.cache, teacher=str(chain.teacher))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("fold/loss")]
    assert losses[-1] < losses[0]


def test_the_edge_student_learns_from_the_same_teacher(made_data: Path, chain: Chain, tmp_path: Path) -> None:
    edge = {
        "mels": 32, "stem_channels": 8, "early_width": 16, "early_blocks": 1, "shared_width": 24, "shared_blocks": 1,
        "task_width": 32, "keyword_blocks": 1, "speaker_blocks": 1, "kernel": 5, "speaker_dim": 16,
    }  # fmt: skip
    recipe = distil_recipe(made_data, shape="edge", edge=edge)
    folder = distil(recipe, tmp_path / "run", chain.cache, teacher=str(chain.teacher))
    weights = torch.load(folder / "edge.pt", weights_only=True)
    assert not any("heads" in name for name in weights)
    stage = build(recipe, load_teacher(str(chain.teacher)))
    assert weights.keys() == stage.student.state_dict().keys()
    assert not torch.equal(weights["down.layers.0.weight"], stage.student.state_dict()["down.layers.0.weight"])


def test_target_layers_that_the_teacher_lacks_are_refused(made_data: Path, chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"targets are \[4, 8, 12\]; the teacher has layers 0 to 2"):
        distil(distil_recipe(made_data, targets=(4, 8, 12)), tmp_path, chain.cache, teacher=str(chain.teacher))
    with pytest.raises(TeacherError, match="no teacher"):
        distil(distil_recipe(made_data), tmp_path, chain.cache)


def test_parameters_with_and_without_heads_are_the_paper_s() -> None:
    """[6] 23.5 M for the student, 27.0 M with three heads, of a teacher of 94.4 M."""
    with torch.device("meta"):
        teacher = Teacher(HubertModel(HubertConfig()), normalise=True)
        config = HubertConfig(num_hidden_layers=2)
        trunk = SelfSupervised(HubertModel(config), normalise=True)
        heads = PredictionHeads(768, (4, 8, 12), 768)
    count = sum(parameter.numel() for parameter in trunk.parameters())
    assert count == 23_492_992
    assert sum(parameter.numel() for parameter in heads.parameters()) == 3_543_552
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 94_371_712


def joint(trunk: SelfSupervised) -> JointModel:
    return JointModel(trunk, 5, speaker_dim=8)


def one_batch(data_folder: Path, cache_folder: Path) -> Batch:
    """Of every labelled training clip."""
    data = read_data(data_folder)
    clips = [clip for clip in data.split("train") if clip.label and clip.speaker]
    recordings = [item.path for item in (*data.noises, *data.rooms)]
    cache = AudioCache.build(cache_folder, [clip.path for clip in clips] + recordings)
    return BatchSource(
        data,
        clips,
        cache,
        labels_of(clips),
        batch_size=8,
        seed=1,
        sampling=SamplingRecipe(crop_s=1.0),
        augment=AugmentRecipe(),
    )[0]


@pytest.mark.parametrize("task", ["keywords", "speakers"])
def test_in_full_mode_every_weight_of_the_trunk_receives_gradient(chain: Chain, made_data: Path, task: str) -> None:
    """[3] the CNN included."""
    torch.manual_seed(0)
    model = joint(trainable(str(chain.teacher), 1))
    stage = JointFinetuning(model, 60, tune_recipe(made_data, tasks=(task,)))
    stage.train()
    loss = stage(one_batch(made_data, chain.cache), 0)["total"]
    loss.backward()
    missing = [
        name
        for name, parameter in model.trunk.named_parameters()
        if "masked_spec_embed" not in name and (parameter.grad is None or not bool(parameter.grad.any()))
    ]
    assert missing == []


def test_in_frozen_mode_only_the_heads_change(chain: Chain, tmp_path: Path) -> None:
    """[3]"""
    init = str(chain.distilled / "model")
    folder = finetune(tune_recipe(chain.data, mode="frozen"), tmp_path / "run", chain.cache, init=init)
    model, _ = load_joint(folder)
    original = load_teacher(init).model.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.trunk.model.state_dict().items())
    torch.manual_seed(0)
    fresh = joint(trainable(init))
    assert not torch.equal(model.keyword_head.weight, fresh.keyword_head.weight)


def test_steps_alternate_between_the_tasks_under_one_optimiser(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[4]"""
    turns: list[tuple[str, ...]] = []
    optimisers: list[torch.optim.Optimizer] = []
    original = JointFinetuning.forward
    made = torch.optim.AdamW.__init__

    def noted(self: JointFinetuning, batch: object, step: int) -> dict[str, Tensor]:
        terms = original(self, batch, step)
        turns.append(tuple(name for name in terms if name != "total"))
        return terms

    def counted(self: torch.optim.AdamW, *arguments: object, **settings: object) -> None:
        made(self, *arguments, **settings)
        optimisers.append(self)

    monkeypatch.setattr(JointFinetuning, "forward", noted)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", counted)
    finetune(tune_recipe(chain.data), tmp_path / "run", chain.cache, init=str(chain.teacher))
    assert turns == [("keywords", "frames"), ("speakers",)] * 4
    assert len(optimisers) == 1


@pytest.mark.parametrize("task", ["keywords", "speakers"])
def test_a_single_task_leaves_the_other_head_alone(chain: Chain, tmp_path: Path, task: str) -> None:
    folder = finetune(tune_recipe(chain.data, tasks=(task,)), tmp_path / "run", chain.cache, init=str(chain.teacher))
    model, labels = load_joint(folder)
    torch.manual_seed(0)
    fresh = JointModel(trainable(str(chain.teacher)), 1 + len(labels), speaker_dim=8)
    same = {
        "keywords": torch.equal(model.keyword_head.weight, fresh.keyword_head.weight),
        "speakers": torch.equal(model.speaker_head.weight, fresh.speaker_head.weight),
    }
    other = "speakers" if task == "keywords" else "keywords"
    assert not same[task]
    assert same[other]


def test_reference_and_student_are_tuned_by_the_same_code(chain: Chain, tuned: Path, tmp_path: Path) -> None:
    """[7] Only what they begin with differs."""
    reference = finetune(tune_recipe(chain.data), tmp_path / "reference", chain.cache, init=str(chain.teacher))
    one = json.loads((reference / "run.json").read_text())["identity"]
    other = json.loads((tuned / "run.json").read_text())["identity"]
    assert one.pop("init") == str(chain.teacher)
    assert other.pop("init") == str(chain.distilled / "model")
    assert one == other


def test_an_interrupted_fine_tuning_ends_with_the_same_weights(chain: Chain, tuned: Path, tmp_path: Path) -> None:
    init = str(chain.distilled / "model")
    finetune(tune_recipe(chain.data), tmp_path / "run", chain.cache, init=init, stop_after=5)
    with pytest.raises(RunError, match="not finished"):
        load_joint(tmp_path / "run")
    finetune(tune_recipe(chain.data), tmp_path / "run", chain.cache, init=init)
    one, other = load_joint(tmp_path / "run")[0].state_dict(), load_joint(tuned)[0].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_whose_heads_never_saw_the_last_norm_is_refused(tuned: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tuned, old)
    for file, changes in (("model/config.json", {"do_stable_layer_norm": True}), ("joint.json", {"last_norm": False})):
        held = json.loads((old / file).read_text())
        (old / file).write_text(json.dumps({**held, **changes}))
    with pytest.raises(RunError, match="trained anew"):
        load_joint(old)


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm"])
def test_the_graph_of_every_family_is_its_network(family: str) -> None:
    """Alone, padded, in a batch: the masked first norm and attention survive the export."""
    from tests.training.test_teachers import CLASSES, SHAPE
    from training.export import traced

    torch.manual_seed(0)
    config, model = CLASSES[family]
    trunk = student_of(Teacher(model(config(**SHAPE)), normalise=True))
    network = joint(trunk).eval()
    check_graph_equals_network(open_session(traced(network), threads=1), network)


def test_the_tuned_student_is_served(chain: Chain, tuned: Path, tmp_path: Path) -> None:
    """Export, calibrate, serve, ask: the way of README's "Train your own"."""
    manifest = export(tuned, tmp_path / "draft", name="own", data_root=chain.data)
    assert manifest.keywords is not None
    assert manifest.keywords.frame_hop_s == 0.02
    calibrate(tmp_path / "draft", data_root=chain.data, say=print)
    clip = read_data(chain.data).split("dev")[0]
    with served(tmp_path / "draft") as client:
        answer = client.detect(Upload(clip.path.read_bytes(), "audio/wav"), top_k=4)
    assert len(answer["top"]) == 4


def test_a_run_that_was_only_distilled_cannot_be_exported(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was not fine-tuned"):
        export(chain.distilled, tmp_path / "draft", name="own")


def test_the_saved_trunk_says_how_its_input_is_normalised(tmp_path: Path) -> None:
    shape = HubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7
    )
    save_teacher(SelfSupervised(HubertModel(shape), normalise=True), tmp_path)
    assert load_teacher(str(tmp_path)).normalise
