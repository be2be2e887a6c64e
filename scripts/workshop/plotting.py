"""What the pictures share: no screen, new figures, axes, legends, colours, and files that hold no date."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend has to be chosen first
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullLocator  # noqa: E402

# Of Okabe and Ito: told apart with every kind of colour vision.
BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8a97a3"
# What each format would write of the time and of matplotlib's version.
UNDATED = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Producer": None}, ".svg": {"Date": None}}


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, grid: bool = False, **options
) -> tuple[Figure, np.ndarray]:
    """A figure in inches and its panels `(rows, columns)`, with a faint grid where it is asked for."""
    plt.rcdefaults()
    if grid:
        plt.rcParams.update({"axes.grid": True, "grid.color": "#e3e7ea", "axes.axisbelow": True})
    size = {"figsize": (width, height), "layout": "constrained"}
    return plt.subplots(rows, columns, squeeze=False, **size, **options)


def save(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Writes the picture, and its folder, without the date and version that would make two runs differ."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata=UNDATED[Path(path).suffix])
    plt.close(figure)


def add_legend(figure: Figure, axes: Axes) -> None:
    """One legend below all panels, in three columns or in as many as the figure is wide enough for."""
    handles, labels = axes.get_legend_handles_labels()
    for columns in (3, 2, 1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def set_log_axis(axes: Axes) -> None:
    """A logarithmic horizontal axis with figures at 1, 2 and 5 of each decade: more would run into each other."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    axes.xaxis.set_minor_locator(NullLocator())


def draw_losses(history: list[dict], path: Path) -> None:
    """The training loss of a Trainer's log over optimiser steps, and the evaluations."""
    figure, [[axes]] = new_figure(7, 4)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out files", "o")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    save(figure, path)


def draw_stages(curves: dict[str, list], path: Path) -> None:
    """Held-out losses of several models, as (stage, step, loss): one stage after the other, a line between them."""
    figure, [[axes]] = new_figure(7, 3.6, grid=True)
    for (name, points), colour in zip(curves.items(), (VERMILION, BLUE), strict=True):
        start = 0
        for index, stage in enumerate(dict.fromkeys(stage for stage, _, _ in points)):
            steps, losses = zip(*((start + step, loss) for of, step, loss in points if of == stage), strict=True)
            axes.plot(steps, losses, "o-", color=colour, label=None if index else name)
            if index:
                axes.axvline(start, color=GREY, linestyle="--", zorder=0)
            start = steps[-1]
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False)
    save(figure, path)
