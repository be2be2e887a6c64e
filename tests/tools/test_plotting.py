"""What pictures and tables share: files without a date, and columns in line."""

import pytest

from workshop.files import PICTURES
from workshop.plotting import UNDATED, add_legend, new_figure, plt, save
from workshop.published import PUBLISHED_MODELS, published_config
from workshop.tables import config_schedule, format_resolution, plain_table


@pytest.mark.parametrize("ending", PICTURES)
def test_a_picture_holds_no_date_and_no_version(ending, tmp_path):
    assert set(UNDATED) == set(PICTURES)
    written = []
    for name in ("one", "two"):
        figure, panels = new_figure(2, 1, 3, 2)
        assert panels.shape == (2, 3)
        save(figure, tmp_path / "new" / f"{name}{ending}")
        assert not plt.fignum_exists(figure.number)
        written.append((tmp_path / "new" / f"{name}{ending}").read_bytes())
    assert written[0] == written[1] or ending == ".svg"  # whose ids are drawn at random
    assert not any(word in written[0] for word in (b"Matplotlib version", b"CreationDate", b"dc:date"))


@pytest.mark.parametrize(("width", "columns"), [(9, 3), (6, 2), (3, 1)])
def test_a_legend_is_whole_in_a_figure_of_any_width(width, columns):
    figure, [[axes]] = new_figure(width, 4)
    for index in range(5):
        axes.plot([0, 1], label=f"a model with a long name {index}")
    add_legend(figure, axes)
    figure.canvas.draw()
    [legend] = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns
    plt.close(figure)


def test_columns_stand_in_line():
    lines = [("model", "layers", "params"), ("a", "2+4x{1}", "1.25"), ("longer one", "2", "12345678")]
    assert plain_table(lines, text_columns=2).splitlines() == [
        "model       layers     params",
        "a           2+4x{1}      1.25",
        "longer one  2        12345678",
    ]


def test_schedules_are_the_papers():
    assert [format_resolution(size) for size in (1, 8)] == ["1", "1/8"]
    schedules = {model.name: config_schedule(published_config(model)) for model in PUBLISHED_MODELS}
    assert schedules["spiralformer-l-mesh-160m"] == "4+4x{1/16,1/8,1/4,1/2}+4"
    assert (schedules["pythia-410m"], schedules["pythia-mesh-1.4b"]) == ("24", "4+8+8+4")
