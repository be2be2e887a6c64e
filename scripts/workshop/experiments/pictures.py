"""The pictures of a report. A family of models has one colour and one marker in all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from workshop.experiments.hierarchy import Hierarchy, pooled
from workshop.experiments.results import TEXTS, ExperimentResults, ModelResults
from workshop.molecules.hierarchy import COUNTED, Tally, binned, bins
from workshop.molecules.judging import share
from workshop.molecules.pictures import CLASS_COLOURS
from workshop.plotting import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    add_legend,
    new_figure,
    save,
    set_log_axis,
)
from workshop.published import BEST_RECURRENCE_RATIOS

STYLES = {
    "gpt-neox": (BLACK, "o"),
    "gpt-neox-mesh": (PURPLE, "D"),
    "looped-anchor": (ORANGE, "v"),
    "looped-mesh": (VERMILION, "^"),
    "spiralformer-b": (BLUE, "s"),
    "spiralformer-l": (GREEN, "P"),
    "plain-3": (BLACK, "o"),
    "plain-8": (GREY, "X"),
    "looped-base": (PURPLE, "D"),
    "spiralformer-anchor": (SKY, "s"),
    "spiralformer-mesh": (BLUE, "s"),
    "hyperloop": (GREEN, "P"),
    "hyperloop-coarse": (YELLOW, "*"),
}
BITS, FLOPS, NON_EMBEDDING = "bits per byte", "training FLOPs", "non-embedding parameters"
COSTS = {FLOPS: "flops", NON_EMBEDDING: "non_embedding_parameters"}


@dataclass(frozen=True)
class Picture:
    """A PNG: its file name, what it shows, and the function that draws it to a path."""

    file: str
    shows: str
    draw: Callable[[Path], None]


def style_of(name: str) -> tuple[str, str]:
    """Colour and marker of a family; every other name is SpiralFormer-B with something changed."""
    return STYLES.get(name, STYLES["spiralformer-b"])


def draw_point(axes: Axes, cost: float, model: ModelResults, **options) -> None:
    """Mean bits per byte on validation text over a cost, with its standard error."""
    mean, (colour, marker) = model.mean("validation"), style_of(model.name)
    axes.errorbar(
        cost, mean.mean, mean.standard_error, color=colour, marker=marker, markersize=7, capsize=3, lw=1.4, **options
    )


def draw_costs(results: ExperimentResults, path: Path) -> None:
    """Bits per byte over training FLOPs and non-embedding parameters, a point per model (the paper's Figure 2)."""
    figure, [panels] = new_figure(9, 4.4, 2, grid=True, sharey=True)
    for axes, (label, field) in zip(panels, COSTS.items(), strict=True):
        for model in results.measured:
            draw_point(axes, model.cost(field), model, linestyle="none", label=model.name)
        axes.xaxis.set_major_formatter(ScalarFormatter(useMathText=True))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axes.margins(x=0.12)
        axes.set_xlabel(label)
    panels[0].set_ylabel(f"{BITS}, validation")
    add_legend(figure, panels[0])
    save(figure, path)


def draw_molecules(results: ExperimentResults, path: Path) -> None:
    """Loss over training FLOPs, a point a model, and what became of the samples, a bar a model."""
    figure, [(points, bars)] = new_figure(11, 4.4, 2, grid=True)
    models = results.measured
    for model in models:
        draw_point(points, model.cost("flops"), model, linestyle="none", label=model.name)
    set_log_axis(points)
    points.set(xlabel=FLOPS, ylabel="nats per token, validation")
    left = np.zeros(len(models))
    for kind, colour in CLASS_COLOURS.items():
        shares = np.array([model.mean(kind).mean for model in models])
        bars.barh([model.name for model in models], shares, left=left, color=colour, label=kind)
        left += shares
    bars.invert_yaxis()
    bars.xaxis.set_major_formatter(PercentFormatter(1))
    bars.set(xlabel="samples", xlim=(0, 1))
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(CLASS_COLOURS), frameon=False)
    add_legend(figure, points)
    save(figure, path)


def draw_hierarchy(results: ExperimentResults, hierarchy: Hierarchy, training: Tally, path: Path) -> None:
    """
    Over ring bonds and over depth of branches the valid share of each model with its interval (Wilson), side by side,
    and below how much of the samples is in each bin; bars: the training molecules.
    """
    figure, axes = new_figure(12, 7.5, 2, 2, grid=True, sharey="row", sharex="col")
    read = {model.name: runs for model in results.models if (runs := hierarchy.of(model))}
    for (above, below), (name, words) in zip(axes.T, COUNTED.items(), strict=True):
        known = np.array(binned([training], name))
        below.bar(range(len(known)), known / known.sum(), color=GREY, alpha=0.35)
        places = np.linspace(-0.3, 0.3, len(read)) if len(read) > 1 else [0.0]
        for place, (model, runs) in zip(places, read.items(), strict=True):
            (colour, marker), counts = style_of(model), np.array(pooled(runs, name))
            valid = [(bin_, share(int(v), int(n))) for bin_, (v, n) in enumerate(counts) if n]
            x, values = [bin_ + place for bin_, _ in valid], np.array([figure["value"] for _, figure in valid])
            errors = np.abs(np.array([figure["interval"] for _, figure in valid]).T - values)
            look = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none"}
            above.errorbar(x, values, errors, capsize=2, lw=1.2, label=model, **look)
            below.plot(np.arange(len(counts)) + place, counts[:, 1] / counts[:, 1].sum(), **look)
        below.set_xticks(range(len(known)), bins(name))
        below.set_xlabel(words)
    for panels, label in zip(axes, ("valid", "samples; grey: training molecules"), strict=True):
        panels[0].yaxis.set_major_formatter(PercentFormatter(1))
        panels[0].set_ylabel(label)
    axes[0, 0].set_ylim(0, 1)
    add_legend(figure, axes[0, 0])
    save(figure, path)


def draw_classes(results: ExperimentResults, path: Path) -> None:
    """Accuracy by what makes an answer easy or hard, a panel for each split and word, a line a model."""
    classes = results.classes
    figure, [panels] = new_figure(1 + 4.2 * len(classes), 4.4, len(classes), grid=True, sharey=True)
    for axes, ((split, word), names) in zip(panels, classes.items(), strict=True):
        for model in results.measured:
            means = [model.mean(f"{split}/{name}") for name in names]
            values, errors = [mean.mean for mean in means], [mean.standard_error or 0 for mean in means]
            colour, marker = style_of(model.name)
            labels = [name.partition(" ")[2] for name in names]
            axes.errorbar(labels, values, errors, color=colour, marker=marker, lw=1.2, capsize=2, label=model.name)
        axes.set_title(split, fontsize=11)
        axes.set_xlabel(word)
        axes.tick_params(axis="x", labelrotation=45 if len(names) > 5 else 0)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel("accuracy")
    add_legend(figure, panels[0])
    save(figure, path)


def draw_scaling(experiments: list[ExperimentResults], path: Path) -> None:
    """The same with the sizes of each family connected by a line."""
    figure, [panels] = new_figure(9, 4.6, 2, grid=True, sharey=True)
    points: dict[str, list[ModelResults]] = {}
    for results in experiments:
        for model in results.measured:
            points.setdefault(model.name, []).append(model)
    for axes, (label, field) in zip(panels, COSTS.items(), strict=True):
        for name, models in points.items():
            models = sorted(models, key=lambda model: model.cost(field))
            means = [model.mean("validation").mean for model in models]
            colour, marker = style_of(name)
            axes.plot([model.cost(field) for model in models], means, color=colour, marker=marker, lw=1.2, label=name)
            for model in models:
                draw_point(axes, model.cost(field), model, linestyle="none")
        set_log_axis(axes)
        axes.set_xlabel(label)
    panels[0].set_ylabel(f"{BITS}, validation")
    add_legend(figure, panels[0])
    save(figure, path)


def validation_curves(model: ModelResults) -> tuple[np.ndarray, np.ndarray]:
    """Training FLOPs (points,) and bits per byte (seeds, points), at the token counts that all seeds have."""
    lines = model.runs.values()
    curves = [{tokens: bits for tokens, bits in line["validation_curve"] if bits is not None} for line in lines]
    tokens = sorted(set.intersection(*map(set, curves)) - {0})
    # The share first: tokens times FLOPs would not fit 64 bits.
    flops = np.array(tokens) / model.cost("tokens") * model.cost("flops")
    return flops, np.array([[curve[count] for count in tokens] for curve in curves])


def draw_curves(results: ExperimentResults, path: Path) -> None:
    """
    Bits per byte on a part of the validation text in the course of training, the second half once more on a scale of
    its own: mean over the seeds, lowest to highest as a band.
    """
    figure, [(whole, second_half)] = new_figure(11, 4.8, 2, grid=True)
    for model in results.measured:
        flops, bits = validation_curves(model)
        colour, marker = style_of(model.name)
        for axes, first in ((whole, 0.0), (second_half, model.cost("flops") / 2)):
            x, y = flops[flops >= first], bits[:, flops >= first]
            axes.plot(x, y.mean(axis=0), color=colour, marker=marker, markersize=4, lw=1.4, label=model.name)
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.2, lw=0)
    for axes, title in ((whole, "whole runs"), (second_half, "second half")):
        axes.set(xlabel="training FLOPs so far")
        axes.set_title(title, fontsize=11)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
    set_log_axis(whole)
    whole.set_ylabel(f"{BITS}, validation")
    add_legend(figure, whole)
    save(figure, path)


def draw_ablations(results: ExperimentResults, path: Path) -> None:
    """Differences to the reference on both texts: mean, 95% interval, and each pair of runs as a small mark."""
    rows = [model.name for model in results.measured if model.name != results.reference]
    figure, [panels] = new_figure(9.5, 1.6 + 0.42 * len(rows), 2, grid=True, sharey=True)
    colour = style_of(results.reference)[0]
    for axes, text in zip(panels, TEXTS, strict=True):
        comparison = results.compare(text)
        for row, name in enumerate(rows):
            if name not in comparison.differences:
                continue
            if interval := comparison.interval(name):
                axes.plot(interval, [row, row], color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
            pairs = list(comparison.differences[name].values())
            axes.plot(pairs, [row + 0.25] * len(pairs), "|", color=GREY, markersize=7)
            axes.plot(comparison.mean(name).mean, row, "o", color=colour)
        axes.axvline(0, color="black", lw=1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(text, fontsize=11)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    figure.supxlabel(f"{BITS} minus those of {results.reference}: left of 0 is better", fontsize=10)
    save(figure, path)


def draw_ratios(results: ExperimentResults, path: Path) -> None:
    """Bits per byte over the recurrence ratio on both texts (the paper's Figure 3), each seed as a small mark."""
    figure, [panels] = new_figure(9.5, 4.2, 2, grid=True)
    models = sorted(results.measured, key=lambda model: model.recurrence_ratio)
    ratios = [model.recurrence_ratio for model in models]
    colour = style_of("spiralformer-b")[0]
    for axes, text in zip(panels, TEXTS, strict=True):
        axes.axvspan(*BEST_RECURRENCE_RATIOS, color=YELLOW, alpha=0.35, lw=0, label="lowest in the paper")
        seeds = [(model.recurrence_ratio, bits) for model in models for bits in model.figures(text).values()]
        axes.plot(*zip(*seeds, strict=True), "_", color=GREY, markersize=9, label="one seed")
        means = [model.mean(text) for model in models]
        values, errors = [mean.mean for mean in means], [mean.standard_error or 0 for mean in means]
        axes.errorbar(ratios, values, errors, color=colour, marker="o", capsize=3, label="mean ± standard error")
        axes.set(title=text, xlabel="recurrence ratio")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].set_ylabel(BITS)
    add_legend(figure, panels[0])
    save(figure, path)


def pictures(results: ExperimentResults) -> list[Picture]:
    """The pictures of one experiment that its finished runs allow."""
    name = results.name
    if not results.measured:
        return []
    if results.report == "ratio":
        shows = "Bits per byte over the recurrence ratio: mean and standard error, each seed as a small mark"
        return [Picture(f"{name}.png", shows, lambda path: draw_ratios(results, path))]
    if results.report == "ablations":
        if not results.compare("validation").differences:
            return []
        shows = f"Differences to {results.reference}: mean, 95% interval, each pair of runs as a small mark"
        return [Picture(f"{name}.png", shows, lambda path: draw_ablations(results, path))]
    if results.report == "molecules":
        shows = "Nats per token on validation molecules over training FLOPs, and what became of the samples"
        return [Picture(f"{name}.png", shows, lambda path: draw_molecules(results, path))]
    if results.report == "task":
        shows = "Accuracy by class: mean and standard error"
        return [Picture(f"{name}.png", shows, lambda path: draw_classes(results, path))]
    costs = "Bits per byte on validation text over training FLOPs and over non-embedding parameters"
    curves = (
        "Bits per byte on a part of the validation text during training: mean over the seeds, their range as a band"
    )
    return [
        Picture(f"{name}.png", f"{costs}: mean and standard error", lambda path: draw_costs(results, path)),
        Picture(f"{name}_curves.png", curves, lambda path: draw_curves(results, path)),
    ]


def hierarchy_pictures(results: ExperimentResults, hierarchy: Hierarchy) -> list[Picture]:
    """The picture of rings and branches, where samples of finished runs on molecules were read; else none."""
    read = [line for model in results.models if hierarchy.of(model) for line in model.runs.values()]
    if not read:
        return []
    training = hierarchy.training[read[0]["text"]["train"]["sha256"]]
    shows = (
        "Valid samples over ring bonds and over depth of branches, with 95% intervals, and how many samples have them"
    )
    return [
        Picture(
            f"{results.name}_hierarchy.png", shows, lambda path: draw_hierarchy(results, hierarchy, training, path)
        )
    ]


def scaling_picture(experiments: list[ExperimentResults]) -> list[Picture]:
    """The one picture of main comparisons on equally many tokens, where at least two have results; else none."""
    by_tokens: dict[int, list[ExperimentResults]] = {}
    for results in experiments:
        if results.report == "table" and results.measured:
            by_tokens.setdefault(results.measured[0].cost("tokens"), []).append(results)
    sizes = max(by_tokens.values(), key=len, default=[])
    if len(sizes) < 2:
        return []
    return [Picture("scaling.png", "The sizes of each family", lambda path: draw_scaling(sizes, path))]
