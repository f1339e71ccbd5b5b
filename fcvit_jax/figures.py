"""The look that all plots share: colours that the colour-blind can tell apart, and letters legible on a phone."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is hard to see on white; black is the dense model's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c99", "#8a6d3b")
GREY = "#7f7f7f"
WIDTH, HEIGHT, DPI = 7.0, 4.4, 150  # inches of one panel; panels are stacked, so that they are legible on a phone


def blank_figure(width: float, height: float) -> "Figure":
    """Make a figure that needs no display; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Any) -> None:
    """Draw a light grid behind the data, and no box around it."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: "Figure") -> bytes:
    """Encode a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
