"""A recipe: everything that decides what a run produces, in one YAML file with no unknown keys."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.augment import AugmentRecipe
from training.batches import SamplingRecipe
from training.bounds import CountOrZero, NotNegative, Positive
from training.errors import RecipeError
from training.manifest import CALIBRATION_FOLD, Clip, Data, read_data
from training.spectral import SpectralRecipe
from training.students.edge import PARTINGS, EdgeShape
from training.synthesis import SynthesisRecipe

RecipeT = TypeVar("RecipeT", bound=BaseModel)
# NAME@VERSION
REFERENCE = r"^[a-z0-9][a-z0-9-]{0,62}@[1-9][0-9]{0,5}$"
# Where audio lies.
NOT_DECIDED = {"data", "shar"}


class CorpusRecipe(BaseModel):
    """What the recipes of `sotto pretrain`, `distil` and `finetune` have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    data: Path
    corpora: tuple[str, ...] | None = None
    fold: float = Field(default=0.05, ge=0, lt=1)
    # Beside the recorded ones of the train split (`rooms.py`).
    simulated_rooms: int = Field(default=0, ge=0)
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What was decided; where the data lies does not count, as its digests are written down beside it."""
        return self.model_dump(mode="json", exclude=NOT_DECIDED)

    def says_the_same(self, stored: dict[str, Any]) -> bool:
        """Whether `stored` is this recipe's `identity`, perhaps written before some of its settings existed:
        those had their defaults then."""
        elsewhere = {name: value for name, value in self.model_dump(mode="json").items() if name in NOT_DECIDED}
        try:
            return type(self).model_validate({**stored, **elsewhere}).identity() == self.identity()
        except ValidationError:
            return False

    def read(self) -> tuple[Data, list[Clip], list[Clip]]:
        """The tables, and the chosen corpora's clips of train and of the fold. Raises ManifestError."""
        data = read_data(self.data, calibration_fraction=self.fold, seed=self.seed)
        clips = [clip for clip in data.clips if self.corpora is None or clip.corpus in self.corpora]
        train = [clip for clip in clips if clip.split == "train"]
        return data, train, [clip for clip in clips if clip.split == CALIBRATION_FOLD]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecipe(_Strict):
    """Where the recordings are, and which part of the training speakers is set aside."""

    root: Path
    calibration_fraction: float = Field(default=0.1, ge=0, lt=1)
    corpora: tuple[str, ...] | None = None
    most_clips_per_corpus: int | None = Field(default=None, gt=0)
    synthesis: SynthesisRecipe | None = None
    # Beside the recorded ones of the train split (`rooms.py`).
    simulated_rooms: int = Field(default=0, ge=0)


class ScheduleRecipe(_Strict):
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay, or Muon beside it (`muon.py`)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    warmup_steps: CountOrZero = 500
    peak_learning_rate: Positive = 2e-3
    final_learning_rate: NotNegative = 1e-5
    weight_decay: NotNegative = 0.02
    gradient_clip: Positive = 5.0
    average_decay: float = Field(default=0.999, ge=0, lt=1)
    checkpoint_every: int = Field(default=500, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    workers: int = Field(default=1, ge=0)


class LossRecipe(_Strict):
    """Weights of the terms of the joint loss."""

    clip: NotNegative = 1.0
    frame: NotNegative = 0.5
    speaker: NotNegative = 0.4
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    speaker_scale: Positive = 30.0
    speaker_margin: NotNegative = 0.2
    margin_warmup_steps: CountOrZero = 2000
    # From this step on, only `shared_gradient` of the speaker loss's gradient reaches the layers that
    # keywords share. Features that tell speakers apart invite learning words speaker by speaker.
    shared_gradient: float = Field(default=1.0, ge=0, le=1)
    shared_gradient_from_step: int = Field(default=0, ge=0)


class HintsRecipe(_Strict):
    """A network as a teacher of the keyword branch's frames (see `training/hints.py`)."""

    # Google's speech embedding, Whisper's encoder (`training/whisper.py`), or a bundle of the built-in store.
    network: str = Field(default="speech-embedding", pattern=rf"^(speech-embedding|whisper-base|{REFERENCE[1:-1]})$")
    # The folder with its files, by default where `make teachers` puts them; where it lies does not count.
    teacher: Path | None = None
    # Recordings of other corpora teach without it. By default it hears all.
    corpora: tuple[str, ...] | None = None
    weight: Positive = 1.0


class TrunkRecipe(_Strict):
    """How a student's trunk, Whisper's encoder, learns (`shape.trunk`)."""

    # Of its layers the last so many; the others stay as published.
    learning: CountOrZero = 2
    # What part of the learning rate they learn at.
    rate: Positive = 0.1
    # The folder with the published weights, by default where `make teachers` puts them; where it lies does not count.
    weights: Path | None = None


class VoicesRecipe(_Strict):
    """Resemblyzer, and perhaps a bundle, as teachers of the speaker embedding (see `training/voices.py`)."""

    python: Path = Path(".venv-peers/bin/python")
    # A bundle of the built-in store that teaches beside it, as much.
    bundle: str | None = Field(default=None, pattern=REFERENCE)
    # Whether they hear each recording at every speed of `augment`, and not only as it was recorded.
    all_speeds: bool = False
    weight: Positive = 1.0


class SoftTargetsRecipe(_Strict):
    """A bundle of the built-in store as a teacher of keywords (see `training/objectives/soft_targets.py`)."""

    bundle: str = Field(pattern=REFERENCE)
    weight: Positive = 1.0
    temperature: Positive = 1.0


class Recipe(_Strict):
    """The whole file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    student: Literal["edge"] = "edge"
    seed: int = 0
    data: DataRecipe
    shape: EdgeShape = EdgeShape()
    sampling: SamplingRecipe = SamplingRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    spectral: SpectralRecipe = SpectralRecipe()
    schedule: ScheduleRecipe
    loss: LossRecipe = LossRecipe()
    # A student that `sotto distil` taught (its edge.pt), to begin with; heads begin anew.
    init: Path | None = None
    # What is trained first (into RUN/before), with the same seed and data, and the same shape but for `speaker_from`
    # where only speakers learn; this recipe goes on from its averaged weights. In a file, the path of that recipe.
    after: Recipe | None = None
    # The share of those weights in the final ones: between both, new people are often told apart best (WiSE-FT,
    # Wortsman et al. 2022).
    before_share: float = Field(default=0.0, ge=0, lt=1)
    # A bundle of the built-in store, NAME@VERSION, whose weights it goes on from (`training/beginning.py`).
    begin: str | None = Field(default=None, pattern=REFERENCE)
    # Whether its speaker branch, which then learns alone, begins anew, perhaps of another shape.
    anew: bool = False
    # What learns, where not all does: of the speaker branch alone, keywords stay bit for bit what came first; of
    # keywords alone, a speaker branch that parts at the features stays what it was.
    only: Literal["speakers", "keywords"] | None = None
    # For the order of clips and what befalls them; the people set aside are the seed's. Default: the seed.
    draws: int | None = None
    trunk: TrunkRecipe = TrunkRecipe()
    hints: HintsRecipe | None = None
    voices: VoicesRecipe | None = None
    soft_targets: SoftTargetsRecipe | None = None

    @model_validator(mode="after")
    def _begins_in_one_way(self) -> Recipe:
        if sum(each is not None for each in (self.init, self.after, self.begin)) > 1:
            raise ValueError("no two of init, after and begin can be given")
        first = self.after
        if first is not None and (first.seed, first.data) != (self.seed, self.data):
            # Another seed or fraction sets other speakers aside: calibration would meet people it was trained on.
            raise ValueError("what comes first needs the same seed and data")
        if first is not None and first.shape != self.shape:
            parted = replace(first.shape, speaker_from=self.shape.speaker_from) == self.shape
            earlier = PARTINGS.index(first.shape.speaker_from) < PARTINGS.index(self.shape.speaker_from)
            if not (self.only == "speakers" and parted and earlier):
                raise ValueError(
                    "what comes first needs the same shape; only a branch that learns alone may part earlier"
                )
            if self.before_share:
                raise ValueError("before_share is a share of what comes first, which has another shape")
        if first is None and self.begin is None and self.before_share:
            raise ValueError("before_share is a share of what comes first, and nothing does")
        if self.shape.trunk is not None:
            self._with_trunk(self.shape.trunk.layers)
        elif self.trunk != TrunkRecipe():
            raise ValueError("trunk says how a trunk learns, and the shape has none (shape.trunk)")
        if self.voices is not None and not self.shape.tells_speakers:
            raise ValueError("voices teach a speaker branch, and speaker_dim is 0")
        if self.only == "keywords":
            self._keywords_alone()
        if self.only == "speakers":
            self._speakers_alone()
        elif self.anew:
            raise ValueError("only a speaker branch that learns alone begins anew (only: speakers)")
        return self

    def _keywords_alone(self) -> None:
        first = self.begin is not None or self.after is not None
        if not first or not self.shape.tells_speakers or self.shape.speaker_from != "features":
            raise ValueError(
                "only keywords can learn where something comes first (begin, after) whose speaker branch parts at the "
                "features"
            )
        if self.voices is not None:
            raise ValueError("voices teach speakers, and only keywords learn")

    def _speakers_alone(self) -> None:
        first = self.begin is not None or self.after is not None
        if not first or not self.shape.tells_speakers:
            raise ValueError("only speakers can learn where something comes first that tells them apart (after, begin)")
        if self.hints is not None or self.soft_targets is not None:
            raise ValueError("hints and soft_targets teach keywords, and only speakers learn")
        if not self.loss.speaker and self.voices is None:
            raise ValueError("only speakers learn, and neither loss.speaker nor voices teach them")
        if self.begin is not None and self.shape.speaker_from != "features":
            raise ValueError(
                "beside a bundle's keywords (begin) only speakers that part at the features can learn alone"
            )
        if self.anew and (self.begin is None or self.before_share):
            raise ValueError(
                "a speaker branch begins anew beside a bundle's keywords (begin), and keeps no share of what came "
                "first (before_share)"
            )

    def _with_trunk(self, layers: int) -> None:
        if self.trunk.learning > layers:
            raise ValueError(f"{self.trunk.learning} layers of the trunk cannot learn, it has {layers}")
        if self.init is not None or self.before_share:
            raise ValueError(
                "a student with a trunk begins with Whisper's weights, and perhaps a bundle's speaker branch, or goes "
                "on from a run (after)"
            )
        if self.begin is not None and self.only != "keywords":
            raise ValueError(
                "what a student with a trunk takes from a bundle is a speaker branch, which stays (only: keywords)"
            )

    @property
    def draws_seed(self) -> int:
        return self.seed if self.draws is None else self.draws

    def at(self, root: Path) -> Recipe:
        """The same with its recordings below `root`."""
        moved = self.data.model_copy(update={"root": root})
        return self.model_copy(update={"data": moved, "after": self.after and self.after.at(root)})

    def decided(self) -> dict[str, Any]:
        """Everything but where the data and teachers lie."""
        own = self.model_dump(
            mode="json",
            exclude={"data": {"root"}, "hints": {"teacher"}, "voices": {"python"}, "trunk": {"weights"}, "after": True},
        )
        return {**own, "after": self.after and self.after.decided()}

    def digest(self) -> str:
        """SHA-256 over what was decided."""
        return hashlib.sha256(json.dumps(self.decided(), sort_keys=True).encode()).hexdigest()

    def says_the_same(self, stored: dict[str, Any]) -> bool:
        """Whether `stored`, a recipe that may have been written before some of its settings existed, decides
        the same: those had their defaults then."""
        try:
            return Recipe.model_validate(stored).decided() == self.decided()
        except ValidationError:
            return False


def load_recipe(path: Path) -> Recipe:
    """Read a recipe of `sotto train`; relative paths are taken from the working directory. Raises RecipeError."""
    return read_recipe(path, Recipe)


def read_recipe(path: Path, kind: type[RecipeT]) -> RecipeT:
    """Read a recipe of any kind. Raises RecipeError, naming each field that is wrong."""
    try:
        return kind.model_validate(_content(path, ()))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise RecipeError(f"{path}:\n" + "\n".join(lines)) from error


def _content(path: Path, above: tuple[Path, ...]) -> Any:
    """What the file says, with the file that it comes after in place. Raises RecipeError."""
    if path.resolve() in above:
        raise RecipeError(f"{path} comes after itself")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("after"), str):
        content["after"] = _content(Path(content["after"]), (*above, path.resolve()))
    return content
