"""Tables and pictures of what `scripts/probe.py` measured, drawn from its JSON alone."""

from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from workshop.plotting import BLUE, VERMILION, new_figure, save
from workshop.probes.measures import ENTROPY, METRICS
from workshop.tables import format_resolution, markdown_table

COLOURS = {"model": BLUE, "control": VERMILION}
BINS = 50
RIDGE_HEIGHT = 0.85  # of the distance between two ridges

# -- looking things up ------------------------------------------------------------------------------------------------


def title(role: str, probed: dict) -> str:
    """Which model a panel shows."""
    return f"{role}: {probed['schedule']}, {probed['topology']}"


def samples_by_iteration(metric: dict) -> np.ndarray:
    """`(T, sequences * N * H)`: the metric of every head in every sequence."""
    samples = np.array(metric["samples"])
    return samples.swapaxes(0, 1).reshape(samples.shape[1], -1)


def heads_by_iteration(metric: dict) -> tuple[np.ndarray, np.ndarray]:
    """The mean over sequences: of all heads `(T, N * H)`, and of the dynamic heads `(T, count)`."""
    values = np.array(metric["values"])
    layers, heads = np.array(metric["dynamic_heads"]).T
    return values.reshape(len(values), -1), values[:, layers, heads]


# -- tables -----------------------------------------------------------------------------------------------------------


def metric_table(models: dict[str, dict]) -> str:
    """Both metrics in each iteration: uniform attention, and the median over all heads and over the dynamic ones."""
    header = ["", "resolution", "latents", "window"]
    for name in METRICS:
        header += [f"{name}: all heads", "dynamic heads", "uniform attention"]
    rows = []
    for role, probed in models.items():
        metrics = [probed["metrics"][name] for name in METRICS]
        for t, size in enumerate(probed["chunk_sizes"]):
            row = [f"{role}, iteration {t}", format_resolution(size)]
            row += [str(probed["latents"][t]), str(probed["windows"][t])]
            for metric in metrics:
                medians = [np.median(heads[t]) for heads in heads_by_iteration(metric)]
                row += [f"{value:.3f}" for value in (*medians, metric["uniform"][t])]
            rows.append(row)
    return markdown_table(header, rows)


def change_table(models: dict[str, dict]) -> str:
    """
    From the first to the last iteration: the median change of a head and that of uniform attention, how many heads
    change as the paper says (entropy falls, local mass rises), and how many do so by more than uniform attention.
    """
    header = [""]
    for name in METRICS:
        verb = "fall" if name == ENTROPY else "rise"
        header += [f"{name}: median head", "uniform attention", f"heads that {verb}", "beyond uniform"]
    rows = []
    for role, probed in models.items():
        row = [role]
        for name in METRICS:
            metric, sign = probed["metrics"][name], -1 if name == ENTROPY else 1
            heads, _ = heads_by_iteration(metric)
            change, uniform = heads[-1] - heads[0], metric["uniform"][-1] - metric["uniform"][0]
            claimed = [np.sum(sign * change > 0), np.sum(sign * (change - uniform) > 0)]
            row += [f"{np.median(change):+.3f}", f"{uniform:+.3f}", *(f"{n} of {len(change)}" for n in claimed)]
        rows.append(row)
    return markdown_table(header, rows)


def update_table(models: dict[str, dict]) -> str:
    """The relative update of every block."""
    rows = [
        [f"{role}, {block}", f"{size:.3f}"]
        for role, probed in models.items()
        for block, size in probed["updates"].items()
    ]
    return markdown_table(["", "relative update"], rows)


def router_table(models: dict[str, dict]) -> str:
    """In each cycle of MeSH the entropies of its routers, and what stands before each part of the state it reads."""
    routers = {role: probed["routers"] for role, probed in models.items() if probed["routers"] is not None}
    sources = max((figures["sources"] for figures in routers.values()), key=len)
    rows = []
    for role, figures in routers.items():
        for cycle, found in enumerate(figures["coefficients"]):
            values = [figures["read entropy"][cycle], figures["write entropy"][cycle], *found]
            row = [f"{role}, cycle {cycle}", *(f"{value:.3f}" for value in values)]
            rows.append(row + ["-"] * (3 + len(sources) - len(row)))
    return markdown_table(["", "read entropy", "write entropy", *sources], rows)


def report(results: dict) -> str:
    """What was probed, and the tables, as Markdown."""
    lines = [f"{subtitle(results)} from `{results['text']}`; local: the last {results['local_tokens']} tokens."]
    lines += [f"{title(role, probed)}, `{probed['checkpoint']}`." for role, probed in results["models"].items()]
    parts = ["\n".join(f"- {line}" for line in lines)]
    parts.append("Median over heads, each the mean over sequences; the dynamic heads of each metric are its own:")
    parts.append(metric_table(results["models"]))
    parts.append("From the first iteration to the last, head by head:")
    parts.append(change_table(results["models"]))
    parts += ["||out - in|| / ||in||, the mean over tokens and sequences:", update_table(results["models"])]
    if any(probed["routers"] is not None for probed in results["models"].values()):
        parts.append("What MeSH reads in each cycle, and entropies of its routers, means over tokens and sequences:")
        parts.append(router_table(results["models"]))
    return "\n\n".join(parts)


PICTURE_FILES = ("ridgelines.png", "heads.png", "updates.png")


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw(results: dict, folder: str | Path) -> None:
    """Draws `ridgelines.png`, `heads.png` and `updates.png` into a folder."""
    for file, picture in zip(PICTURE_FILES, (draw_ridgelines, draw_heads, draw_updates), strict=True):
        save(picture(results), Path(folder) / file)


def subtitle(results: dict) -> str:
    return f"{results['sequences']} sequences of {results['length']} tokens"


def grid_of_panels(models: dict[str, dict], height: float, **share):
    """A figure with one row of panels for each metric and one column for each model."""
    return new_figure(width(models), 2 * height, len(models), len(METRICS), **share)


def longest_schedule(models: dict[str, dict]) -> int:
    return max(len(probed["chunk_sizes"]) for probed in models.values())


def width(models: dict[str, dict]) -> float:
    """Inches, for one column of panels a model: each iteration has room for its label."""
    return len(models) * (2.4 + 0.8 * max(4, longest_schedule(models)))


def draw_ridgelines(results: dict):
    """Histograms of each metric over all heads and sequences, one ridge an iteration, the first on top."""
    models = results["models"]
    figure, panels = grid_of_panels(models, 1.2 + 0.6 * longest_schedule(models), sharex="row")
    for row, name in zip(panels, METRICS, strict=True):
        samples = {role: samples_by_iteration(probed["metrics"][name]) for role, probed in models.items()}
        edges = np.histogram_bin_edges(np.concatenate([values.ravel() for values in samples.values()]), BINS)
        for axes, (role, probed) in zip(row, models.items(), strict=True):
            draw_ridges(axes, samples[role], edges, probed["metrics"][name]["uniform"], COLOURS[role])
            labels = [f"{t}: {format_resolution(size)}" for t, size in enumerate(probed["chunk_sizes"])]
            axes.set_yticks(-np.arange(len(labels)), labels)
            axes.set_title(title(role, probed), fontsize=10)
            axes.set_ylabel("iteration: resolution")
            axes.set_xlabel(f"{name}, of {samples[role].shape[1]:,} (sequence, layer, head) samples")
    handles = [
        Line2D([], [], color="black", linewidth=2, label="median"),
        Line2D([], [], color="black", linewidth=1.5, linestyle=":", label="uniform attention"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"Heads of the core, {subtitle(results)}\neach ridge is scaled to its highest bin", fontsize=11)
    return figure


def draw_ridges(axes, samples: np.ndarray, edges: np.ndarray, uniform: list[float], colour: str) -> None:
    """Ridge t of samples `(T, ...)` stands on y = -t."""
    for t, values in enumerate(samples):
        counts, _ = np.histogram(values, edges)
        heights = -t + RIDGE_HEIGHT * counts / counts.max()
        axes.stairs(heights, edges, baseline=-t, fill=True, color=colour, alpha=0.55)
        axes.stairs(heights, edges, baseline=-t, color=colour)
        top = -t + RIDGE_HEIGHT
        axes.plot([np.median(values)] * 2, [-t, top], color="black", linewidth=2)
        axes.plot([uniform[t]] * 2, [-t, top], color="black", linewidth=1.5, linestyle=":")
    axes.set_ylim(-len(samples) + 0.85, 1)


def draw_heads(results: dict):
    """Box plots of each metric over all heads and over the dynamic heads, a line for each head through iterations."""
    models = results["models"]
    figure, panels = grid_of_panels(models, 3.9, sharey="row")
    for row, name in zip(panels, METRICS, strict=True):
        for axes, (role, probed) in zip(row, models.items(), strict=True):
            metric = probed["metrics"][name]
            draw_boxes(axes, *heads_by_iteration(metric), COLOURS[role])
            places = np.arange(len(metric["uniform"]))
            axes.hlines(
                metric["uniform"], places - 0.45, places + 0.45, color="black", linestyle=":", linewidth=2, zorder=5
            )
            geometry = zip(probed["chunk_sizes"], probed["latents"], probed["windows"], strict=True)
            axes.set_xticks(places, [f"{format_resolution(g)}\nK = {k}\nM = {m}" for g, k, m in geometry])
            axes.set_xlabel("resolution of each iteration, its latents K and window M")
            axes.set_ylabel(f"{name} of a head")
            axes.yaxis.set_tick_params(labelleft=True)
            axes.set_title(title(role, probed), fontsize=10)
    handles = [
        Patch(facecolor="white", edgecolor="dimgray", label="all heads"),
        Patch(facecolor="dimgray", edgecolor="dimgray", label="dynamic heads"),
        Line2D([], [], color="black", linestyle=":", linewidth=2, label="uniform attention"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Heads of the core, mean over {subtitle(results)}", fontsize=11)
    return figure


def draw_boxes(axes, heads: np.ndarray, dynamic: np.ndarray, colour: str) -> None:
    """Left of each iteration the box of all heads `(T, ...)`, right of it that of the dynamic ones, lines between."""
    places = np.arange(len(heads))
    for offset, values, face in ((-0.22, heads, "white"), (0.22, dynamic, colour)):
        axes.boxplot(
            values.T,
            positions=places + offset,
            widths=0.26,
            manage_ticks=False,
            patch_artist=True,
            boxprops={"facecolor": face, "edgecolor": colour, "alpha": 0.7},
            medianprops={"color": "black", "linewidth": 2},
            whiskerprops={"color": colour},
            capprops={"color": colour},
            flierprops={"markersize": 3, "markeredgecolor": colour},
        )
    axes.plot(places, heads, color="gray", linewidth=0.8, alpha=0.5, zorder=0)
    axes.plot(places, dynamic, color=colour, linewidth=0.9, alpha=0.6, zorder=0)
    axes.set_xlim(-0.6, len(heads) - 0.4)


def draw_updates(results: dict):
    """Bars of the relative update of every block."""
    models = results["models"]
    figure, [panels] = new_figure(width(models), 3.8, len(models), sharey=True)
    for axes, (role, probed) in zip(panels, models.items(), strict=True):
        sizes = enumerate(probed["chunk_sizes"])
        labels = {f"iteration {t}": f"iteration\n{t}: {format_resolution(size)}" for t, size in sizes}
        labels = [labels.get(block, block) for block in probed["updates"]]
        bars = axes.bar(range(len(labels)), list(probed["updates"].values()), color=COLOURS[role])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("block; of an iteration its resolution too")
        axes.set_ylabel("relative update ||out - in|| / ||in||")
        axes.yaxis.set_tick_params(labelleft=True)
        axes.margins(y=0.12)
        axes.set_title(title(role, probed), fontsize=10)
    figure.suptitle(f"What each block changes, mean over {subtitle(results)}", fontsize=11)
    return figure
