"""Pictures beside pages: without a display, and without matplotlib's global state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def draw_into(file: Path, draw: Callable[[Any], None], *, size: tuple[float, float] = (6.4, 4.4)) -> None:
    """Let `draw` fill a matplotlib figure of `size` inches and write it as PNG, the same bytes every time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(file, dpi=110, metadata={"Software": None})
