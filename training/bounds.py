"""What numbers in a recipe may be. Types for its sections: a value out of bounds is told with the name of its field."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"begins with {ends[0]:g} and ends with {ends[1]:g}; the lower end comes first")
    return ends


Finite = Annotated[float, Field(allow_inf_nan=False)]
Span = Annotated[tuple[Finite, Finite], AfterValidator(_rising)]
PositiveSpan = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]
NotNegativeSpan = Annotated[tuple[NotNegative, NotNegative], AfterValidator(_rising)]
