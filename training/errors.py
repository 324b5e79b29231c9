"""What can go wrong while training, each with the sentence a person needs to put it right.

TrainingError
 ├─ ManifestError     the data's tables or files are wrong
 ├─ RecipeError       the recipe file is wrong
 ├─ RunError          a run folder is missing, foreign or incomplete
 ├─ ExportError       the exported graph does not agree with the network
 ├─ TeacherError      a teacher cannot be loaded or does not fit its student
 └─ MeasurementError  a service or peer under measurement misbehaved
"""


class TrainingError(Exception):
    """Root of every error this package raises on purpose."""


class ManifestError(TrainingError):
    """A data table or a file it names is missing, malformed or inconsistent."""


class RecipeError(TrainingError):
    """A recipe file has unknown keys, wrong types or impossible values."""


class RunError(TrainingError):
    """A run folder cannot be used: missing, made from another recipe, or not finished."""


class ExportError(TrainingError):
    """The exported graph differs from the network by more than the allowed tolerance."""


class TeacherError(TrainingError):
    """A teacher's files are missing, incomplete or of another kind, or its frames do not fit the student's."""


class MeasurementError(TrainingError):
    """A measurement could not be made: the service answered unexpectedly, or a peer is missing."""
