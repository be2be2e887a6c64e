"""The figures docs/architecture.png and docs/cache_grid.png. The chunks come from the package's own geometry.

Distances are in tokens: one unit of the horizontal axis is one column of text.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from workshop.plotting import plt, save

INK, FAINT, PAPER = "#22303c", "#8a97a3", "#ffffff"
TOKEN, BLOCK, CARRIER, NOTHING = "#dfe5ea", "#eef2f5", "#f6e3bd", "#ffffff"
ARROW = "#5b6b79"
ON_TONE = ("white", INK)  # text on the darker and on the lighter tone
# Two tones for each resolution: neighbouring chunks must be told apart, not counted.
TONES = (("#3b528b", "#7f93c4"), ("#21908d", "#74c0bd"), ("#4a9c4d", "#9fd0a0"), ("#c9792a", "#e8b980"))


def new_axes(width: float, height: float, right: float, top: float) -> Axes:
    """An empty sheet of `width` x `height` inches, from (0, -0.3) in the upper left to (right, top) below."""
    plt.rcdefaults()
    plt.rcParams.update({"font.family": "DejaVu Sans", "hatch.linewidth": 0.6, "hatch.color": FAINT})
    figure = plt.figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, right), ylim=(top, -0.3))
    axes.axis("off")
    return axes


def bar(axes: Axes, left: float, top: float, width: float, height: float, **style) -> None:
    """One rectangle with a thin white seam around it."""
    style = {"facecolor": TOKEN, "edgecolor": PAPER, "linewidth": 1.0, **style}
    axes.add_patch(Rectangle((left, top), width, height, **style))


def panel(axes: Axes, left: float, top: float, width: float, height: float, colour: str = BLOCK) -> None:
    """A rounded box behind other things."""
    shape = FancyBboxPatch(
        (left, top), width, height, boxstyle="round,pad=0,rounding_size=0.3", facecolor=colour, edgecolor=FAINT
    )
    shape.set(linewidth=0.8, zorder=0)
    axes.add_patch(shape)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A straight arrow."""
    style = {"arrowstyle": "-|>", "color": ARROW, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def write(axes: Axes, x: float, y: float, text: str, size: float = 9.5, **style) -> None:
    """Text, centred on its line."""
    axes.text(x, y, text, fontsize=size, va="center", **{"color": INK, **style})


# -- architecture -------------------------------------------------------------------------------------------------

TOKENS, LEFT = 32, 9.9  # tokens drawn, and where the first one stands
RIGHT = LEFT + TOKENS
CARRIER_LEFT, CARRIER_WIDTH = RIGHT + 4.6, 3.2
SHEET = CARRIER_LEFT + CARRIER_WIDTH + 0.8
CHUNK_SIZES = (8, 4, 2, 1)


def draw_token_row(axes: Axes, top: float) -> None:
    for token in range(TOKENS):
        bar(axes, LEFT + token, top, 1, 0.62)


def draw_token_block(axes: Axes, top: float, title: str, symbol: str) -> None:
    """Prelude or coda: a box over all tokens."""
    panel(axes, LEFT - 0.3, top, TOKENS + 0.6, 1.5)
    write(axes, LEFT + TOKENS / 2, top + 0.75, title, ha="center")
    write(axes, LEFT - 0.9, top + 0.75, symbol, ha="right")


def draw_iteration(axes: Axes, top: float, iteration: int, grid: ChunkGrid) -> None:
    """One pass of the core: the chunks of one resolution, and below them what every token reads."""
    tones, size = TONES[iteration], grid.size
    panel(axes, LEFT - 0.3, top, TOKENS + 0.6, 1.5)
    filled = grid.opened(TOKENS, grid.phase(0))
    for chunk in range(filled):
        first = max(0, chunk * size - grid.offset)
        end = (chunk + 1) * size - grid.offset
        bar(axes, LEFT + first, top + 0.3, end - first, 0.9, facecolor=tones[chunk % 2])
    first_open = max(0, filled * size - grid.offset)
    if first_open < TOKENS:
        width = TOKENS - first_open
        style = {"facecolor": "none", "edgecolor": FAINT, "linestyle": (0, (2, 2))}
        bar(axes, LEFT + first_open + 0.08, top + 0.34, width - 0.16, 0.82, **style)
    for token in range(TOKENS):
        position = grid.read_position(token, grid.phase(0))
        chunk = position // size
        colour = NOTHING if token < grid.shift else tones[chunk % 2]
        style = {"hatch": "////", "edgecolor": FAINT, "linewidth": 0} if token < grid.shift else {}
        bar(axes, LEFT + token, top + 1.95, 1, 0.5, facecolor=colour, **style)
    resolution = "1" if size == 1 else f"1/{size}"
    write(axes, LEFT - 0.9, top + 0.75, f"core at {resolution}", ha="right", weight="bold", color=tones[0])
    moved = "up" if grid.shift == 0 else f"up, shifted by {grid.shift}"
    write(axes, LEFT - 0.9, top + 2.2, moved, size=8.5, ha="right", color=ARROW)
    arrow(axes, (RIGHT + 0.3, top + 2.2), (CARRIER_LEFT, top + 2.2))
    arrow(axes, (CARRIER_LEFT, top + 0.75), (RIGHT + 0.4, top + 0.75))
    middle = (RIGHT + CARRIER_LEFT) / 2 + 0.1
    write(axes, middle, top + 0.3, rf"$\mathrm{{Down}}(h_{iteration})$", size=10, ha="center")
    write(axes, middle, top + 1.75, rf"$\tilde{{u}}_{iteration}$", size=10, ha="center")


def draw_architecture(path: Path) -> None:
    """Tokens above, logits below; the four passes of the core in between, coarse to fine."""
    step, first, bottom = 3.35, 4.75, 23.0
    axes = new_axes(10, 5.7, right=SHEET, top=bottom)
    draw_token_row(axes, 0.5)
    write(axes, LEFT - 0.9, 0.8, r"embeddings  $x$", ha="right")
    arrow(axes, (LEFT + TOKENS / 2, 1.25), (LEFT + TOKENS / 2, 2.1))
    draw_token_block(axes, 2.2, "prelude: layers of its own, on every token", r"$v = f_{pre}(x)$")
    for iteration, size in enumerate(CHUNK_SIZES):
        draw_iteration(axes, first + step * iteration, iteration, ChunkGrid(size, size // 2, size - 1))
    loop_end = first + step * len(CHUNK_SIZES)

    panel(axes, CARRIER_LEFT, 2.2, CARRIER_WIDTH, loop_end + 1.2 - 2.2, CARRIER)
    label = "topology:  MeSH slots,  streams,  or anchor, residual, base"
    write(axes, CARRIER_LEFT + CARRIER_WIDTH / 2, (2.2 + loop_end + 1.2) / 2, label, ha="center", rotation=270)
    arrow(axes, (RIGHT + 0.4, 2.95), (CARRIER_LEFT, 2.95))
    write(axes, (RIGHT + CARRIER_LEFT) / 2, 2.45, "$v$", size=10, ha="center")
    axes.plot((RIGHT + 0.3, CARRIER_LEFT + 1.6, CARRIER_LEFT + 1.6), (0.8, 0.8, 1.4), color=ARROW, lw=1.4)
    arrow(axes, (CARRIER_LEFT + 1.6, 1.3), (CARRIER_LEFT + 1.6, 2.15))
    write(axes, (RIGHT + CARRIER_LEFT) / 2, 0.35, "$x$", size=10, ha="center")

    # One set of weights for all passes.
    spine, top, end = 1.8, first + 0.1, loop_end - step + 1.4
    axes.plot((spine + 0.7, spine, spine, spine + 0.7), (top, top, end, end), color=INK, lw=1.2)
    write(axes, spine - 0.7, (top + end) / 2, "the same layers, run four times", ha="center", rotation=90)

    draw_token_block(axes, loop_end + 0.1, "coda: layers of its own, on every token", r"$f_{post}(h_4)$")
    arrow(axes, (CARRIER_LEFT, loop_end + 0.85), (RIGHT + 0.4, loop_end + 0.85))
    write(axes, (RIGHT + CARRIER_LEFT) / 2 + 0.1, loop_end + 0.38, "$h_4$", size=10, ha="center")
    arrow(axes, (LEFT + TOKENS / 2, loop_end + 1.65), (LEFT + TOKENS / 2, loop_end + 2.45))
    draw_token_row(axes, loop_end + 2.55)
    write(axes, LEFT - 0.9, loop_end + 2.85, "logits", ha="right")
    note = (
        "Box: one latent for each full chunk (dashed: a chunk still open).   "
        "Strip below: the chunk that each token reads (hatched: none yet)."
    )
    write(axes, SHEET / 2, loop_end + 4.2, note, size=8.5, ha="center", color=ARROW)
    save(axes.figure, path, dpi=160)


# -- cache grid ---------------------------------------------------------------------------------------------------

GRID = ChunkGrid(size=4, offset=2, shift=3)
PADS, COLUMNS = (0, 3, 6), 18


def draw_row(axes: Axes, top: float, pads: int, left: float) -> None:
    """The tokens of one row, and below them its latent columns."""
    phase, first_latent = GRID.phase(pads), GRID.first_latent(pads)
    for column in range(COLUMNS):
        token = column - pads
        style = {"facecolor": NOTHING, "hatch": "////", "edgecolor": FAINT, "linewidth": 0}
        chunk = (token + GRID.offset) // GRID.size
        if token >= 0:
            style = {"facecolor": TONES[0][chunk % 2]}
        bar(axes, left + column, top, 1, 0.8, **style)
        if token >= 0:
            fills = column % GRID.size == phase and column // GRID.size >= first_latent
            write(axes, left + column + 0.5, top + 0.4, str(token), size=8.5, ha="center", color=ON_TONE[chunk % 2])
            if fills:
                centre = left + column // GRID.size * GRID.size + GRID.size / 2
                arrow(axes, (left + column + 0.5, top + 0.85), (centre, top + 1.5))
    for latent in range(-(-COLUMNS // GRID.size)):
        start, chunk = left + latent * GRID.size, latent - first_latent
        is_filled = chunk >= 0 and latent * GRID.size + phase < COLUMNS
        words = f"chunk {chunk}" if is_filled else "empty" if chunk < 0 else "not filled yet"
        style = {"facecolor": TONES[0][chunk % 2]} if is_filled else {"facecolor": BLOCK}
        bar(axes, start + 0.06, top + 1.55, GRID.size - 0.12, 0.75, **style)
        colour = ON_TONE[chunk % 2] if is_filled else ARROW
        write(axes, start + GRID.size / 2, top + 1.93, words, size=8.5, ha="center", color=colour)
    write(axes, left - 0.5, top + 0.4, f"{pads} pads, phase {phase}", ha="right")
    write(axes, left - 0.5, top + 1.93, "latents", size=8.5, ha="right", color=ARROW)


def draw_cache_grid(path: Path) -> None:
    """Three rows of a batch with different padding, one level of chunk size 4 and offset 2."""
    left, step, first = 6.2, 3.3, 1.9
    end = first + step * len(PADS) - 0.7
    axes = new_axes(10, 4.3, right=27.4, top=12.9)
    for column in range(COLUMNS):
        write(axes, left + column + 0.5, 1.45, str(column), size=8.5, ha="center", color=ARROW)
    write(axes, left - 0.5, 1.45, "column of the batch", size=8.5, ha="right", color=ARROW)
    for latent in range(-(-COLUMNS // GRID.size)):
        start = left + latent * GRID.size
        axes.plot((start, start), (0.3, end), color=FAINT, lw=0.9, ls=(0, (4, 3)), zorder=0)
        write(axes, start + GRID.size / 2, 0.65, f"latent column {latent}", size=9, ha="center")
    for row, pads in enumerate(PADS):
        draw_row(axes, first + step * row, pads, left)
        style = {"facecolor": "none", "edgecolor": TONES[3][0], "linewidth": 2.4, "zorder": 5}
        bar(axes, left + COLUMNS - 1, first + step * row, 1, 0.8, **style)
    note = (
        f"A decode step at column {COLUMNS - 1} (framed) fills a chunk in the first row only: "
        "the core runs on that row.\n"
        f"Number in a cell: token of the row. Chunk size {GRID.size}, offset {GRID.offset}: "
        f"the first chunk has {GRID.size - GRID.offset} members."
    )
    write(axes, 27.4 / 2, end + 0.85, note, size=8.5, ha="center", color=ARROW, linespacing=1.5)
    save(axes.figure, path, dpi=160)
