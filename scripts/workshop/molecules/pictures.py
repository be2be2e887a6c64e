"""Pictures of what becomes of samples after each pass of a looped model."""

from pathlib import Path

from matplotlib.ticker import MaxNLocator, PercentFormatter

from workshop.molecules.judging import SAMPLE_CLASSES, read_smiles, share
from workshop.plotting import GREEN, GREY, ORANGE, PURPLE, VERMILION, add_legend, new_figure, save

CLASS_COLOURS = dict(zip(SAMPLE_CLASSES, (GREEN, PURPLE, ORANGE, VERMILION, GREY), strict=True))
HEADS = {"own": "stopped after a pass, the model's own head", "linear": "a linear head for each pass"}


def draw_grid(molecules: list[str], path: Path, columns: int = 6) -> None:
    """The structures of valid SMILES, drawn by RDKit in rows of `columns`."""
    from rdkit.Chem import Draw

    drawn = [read_smiles(smiles) for smiles in molecules]
    Draw.MolsToGridImage(drawn, molsPerRow=columns, subImgSize=(260, 200), returnPNG=False).save(path)


def draw_passes(rows: list[dict], path: Path) -> None:
    """Shares of the classes over passes, with their 95% intervals: a panel for each kind of head."""
    heads = list(dict.fromkeys(row["head"] for row in rows))
    figure, [panels] = new_figure(5.5 * len(heads), 4.2, len(heads), grid=True, sharey=True)
    for axes, head in zip(panels, heads, strict=True):
        of_head = [row for row in rows if row["head"] == head]
        passes = [row["passes"] for row in of_head]
        for kind, colour in CLASS_COLOURS.items():
            found = [share(row[kind], row["count"]) for row in of_head]
            low, high = zip(*(figure["interval"] for figure in found), strict=True)
            axes.fill_between(passes, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(passes, [figure["value"] for figure in found], "o-", color=colour, label=kind)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="pass", title=HEADS[head], ylim=(0, 1))
    panels[0].set_ylabel("samples")
    add_legend(figure, panels[0])
    save(figure, path)
