"""The picture of a comparison, looked at through the artists of its figure."""

import itertools
import math
import random
import struct
import warnings

import matplotlib.text
import pytest

from locft_easyedit.compare.outcome import Comparison, Outcome
from locft_easyedit.compare.picture import comparison_figure, write_comparison_picture
from locft_easyedit.compare.stream_picture import stream_figure, write_stream_picture
from locft_easyedit.errors import OutputError

NAMES = ("LocFT-BF", "FT", "ROME", "MEMIT", "AlphaEdit", "GRACE", "WISE", "EMMET")


def row(method="FT", reliability=0.5, seconds=2.0, memory=4.0, **changes):
    generated = {"reliability": reliability, "generalization": 0.31, "portability": 0.11}
    values = {
        "n_edits": 100,
        "after_all": {"locality": {"near_acc": 0.22}, "rewrite_acc": 0.9, "generated": generated},
        "capability": {"tasks": {"mmlu": 0.42}, "mean": 0.42},
        "seconds_per_edit": seconds,
        "peak_memory_gib": memory,
        "peak_memory_of": "GPU",
    }
    return Outcome(method, **values | changes)


def comparison(*outcomes, **changes):
    values = {
        "model": "SmolLM2-135M",
        "data": "ZsRE",
        "n": 100,
        "easyedit": "current source",
        "device": "CPU",
        "dtype": "float32",
        "before": {"generated": {"reliability": 0.05}},
    }
    return Comparison(**values | changes, outcomes=list(outcomes))


def drawn(made):
    """The figure; a warning of matplotlib's fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = comparison_figure(made)
        figure.canvas.draw()
    return figure


def texts(artist):
    found = artist.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_visible() and text.get_text()]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def points(axes, hollow):
    """The single markers in one panel, (x, y)."""
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if len(line.get_xdata()) == 1 and (line.get_markerfacecolor() == "white") == hollow
    ]


def labels(axes):
    """What the legend beside the costs says."""
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def test_what_is_drawn():
    figure = drawn(comparison(row("LocFT-BF", 0.97, 0.3, 8.0), row("FT", 0.61)))
    assert titles(figure) == [
        "reliability ↑", "generalization ↑", "portability ↑", "locality ↑", "capability ↑",
        "cost, with the peak memory of the GPU",
    ]  # fmt: skip
    found = texts(figure)
    for text in ("0.97", "0.61", "0.31", "0.11", "0.22", "0.42", "before editing"):
        assert text in found
    assert "SmolLM2-135M on ZsRE, 100 edits\nCPU (float32), EasyEdit: current source" in found
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["LocFT-BF", "FT"]
    assert labels(figure.axes[-1]) == [
        "LocFT-BF\n8.0 GiB", "FT\n4.0 GiB",
    ]  # fmt: skip
    assert points(figure.axes[0], hollow=False) == [(0.97, 0.0), (0.61, 1.0)]
    assert points(figure.axes[-1], hollow=False) == [(0.3, 0.97), (2.0, 0.61)]
    assert figure.axes[-1].get_xscale() == "log"
    assert "right after each edit" not in found


def test_forgetting_shows():
    each = {"generated": {"reliability": 0.99}}
    figure = drawn(comparison(row("LocFT-BF", 1.0), row("FT", 0.61, right_after_each=each)))
    first = figure.axes[0]
    assert points(first, hollow=True) == [(0.99, 1.0)]
    joined = [list(line.get_xdata()) for line in first.lines if len(line.get_xdata()) == 2]
    assert [0.99, 0.61] in joined
    places = {text.get_text(): text.xy for text in first.texts}
    assert places == {"1.00": (1.0, 0), "0.61": (0.61, 1), "0.99": (0.99, 1)}
    assert points(figure.axes[1], hollow=True) == []
    assert "right after each edit" in texts(figure.legends[0])


def test_model_before_is_a_line_where_it_was_measured():
    figure = drawn(comparison(row()))
    dashed = [[list(x.get_xdata()) for x in axes.lines if x.is_dashed()] for axes in figure.axes]
    assert dashed == [[[0.05, 0.05]], [], [], [], [], []]
    assert "before editing" not in texts(drawn(comparison(row(), before={})))


def test_methods_without_figures_have_their_status():
    broken = row("ROME")
    broken.after_all["rewrite_acc"] = math.nan
    made = comparison(
        row("FT"), Outcome("MEMIT", "failed", "boom"), Outcome("MEND", "unavailable"), broken
    )
    figure = drawn(made)
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["FT", "MEMIT", "MEND", "ROME"]
    places = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    assert (places["failed"], places["unavailable"], places["not finite"]) == (1, 2, 3)
    assert len(labels(figure.axes[-1])) == 1
    assert points(figure.axes[0], hollow=False) == [(0.5, 0.0)]


def test_all_failed():
    figure = drawn(comparison(*(Outcome(name, "failed", "boom") for name in NAMES)))
    assert titles(figure) == ["reliability ↑", "cost"]
    assert texts(figure.axes[0]).count("failed") == 8
    assert "no method has both figures" in texts(figure.axes[1])


def test_no_methods():
    assert titles(drawn(comparison())) == ["reliability ↑", "cost"]


def test_without_portability_and_capability():
    bare = row(capability=None)
    del bare.after_all["generated"]["portability"]
    assert titles(drawn(comparison(bare)))[:-1] == [
        "reliability ↑",
        "generalization ↑",
        "locality ↑",
    ]
    figure = drawn(comparison(bare, row("ROME")))
    assert texts(figure.axes[2]).count("no figure") == 1
    assert texts(figure.axes[4]).count("no figure") == 1


def test_teacher_forced_figures_stand_in():
    figure = drawn(comparison(Outcome("FT", after_all={"rewrite_acc": 0.5}, seconds_per_edit=3)))
    assert titles(figure) == ["rewrite_acc ↑", "cost"]
    assert figure.axes[1].get_ylabel() == "rewrite_acc ↑"


def test_memory_of_two_kinds_is_told_apart():
    figure = drawn(comparison(row("A"), row("B", 0.1, peak_memory_of="process")))
    assert titles(figure)[-1] == "cost"
    assert labels(figure.axes[-1]) == [
        "A\n4.0 GiB (GPU)", "B\n4.0 GiB (process)",
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 4, 8])
def test_every_method_has_a_point_and_a_look_of_its_own(n):
    draw = random.Random(n)
    outcomes = [row(name, draw.random(), 10 ** draw.uniform(-2, 3)) for name in NAMES[:n]]
    figure = drawn(comparison(*outcomes))
    axes = figure.axes[-1]
    assert [label.split("\n")[0] for label in labels(axes)] == list(NAMES[:n])
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == n
    # A method looks the same in all panels, and the legend stays within the picture.
    for i, line in enumerate(axes.lines):
        [same] = [other for other in figure.axes[0].lines
                  if list(other.get_ydata()) == [i] and not other.is_dashed()]  # fmt: skip
        assert (same.get_color(), same.get_marker()) == (line.get_color(), line.get_marker())
    box = axes.get_legend().get_window_extent()
    assert box.x0 > axes.get_window_extent().x1
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0


@pytest.mark.parametrize("n", [1, 8])
def test_text_of_the_panels_does_not_overlap(n):
    each = {"generated": {"reliability": 0.97}}
    outcomes = [row(name, 0.96, right_after_each=each) for name in NAMES[:n]]
    figure = drawn(comparison(*outcomes))
    renderer = figure.canvas.get_renderer()
    panel_titles = [axes.title.get_window_extent(renderer) for axes in figure.axes]
    figures = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    for group in (panel_titles, figures):
        assert not any(a.overlaps(b) for a, b in itertools.combinations(group, 2))


def test_names_are_text():
    nasty = "$\\frac{x$ [b]\n" + "m" * 80
    figure = drawn(comparison(row(nasty), model=nasty, data="_$x^2$_", n=7))
    name = figure.axes[0].get_yticklabels()[0].get_text()
    assert name.startswith("$\\frac{x$ [b] mm")
    assert len(name) == 22
    assert "_$x^2$_, 7 edits" in figure.get_suptitle()


def test_free_and_very_slow_methods_have_a_place():
    figure = drawn(comparison(row("A", 0.1, seconds=0.0), row("B", 0.2, seconds=1e5)))
    low, high = figure.axes[-1].get_xlim()
    assert all(low < x < high for x, _ in points(figure.axes[-1], hollow=False))


def test_png(tmp_path):
    write_comparison_picture(tmp_path / "comparison.png", comparison(row(), row("ROME", 0.1)))
    data = (tmp_path / "comparison.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1800
    assert 500 < height < 1200
    assert len(data) > 20_000
    with pytest.raises(OutputError, match="cannot be written"):
        write_comparison_picture(tmp_path / "none" / "comparison.png", comparison(row()))


def test_what_is_drawn_of_commits(tmp_path):
    made = comparison(
        row("LocFT-BF", by_commit=[[1.0], [0.4, 1.0], [0.1, 0.7, 1.0]]),
        row("$x_1$ [b]", by_commit=[[1.0], [1.0, 1.0], [1.0, 1.0, 1.0]]),
        Outcome("ROME", status="failed", reason="no room"),
        n=5,
    )
    figure = stream_figure(made)
    figure.canvas.draw()
    so_far, at_end = figure.axes
    # Commits of 1, 2 and 2 edits.
    assert so_far.lines[0].get_ydata() == pytest.approx([1.0, 2.4 / 3, 3.5 / 5])
    assert list(at_end.lines[0].get_ydata()) == [0.1, 0.7, 1.0]
    assert list(at_end.lines[0].get_xdata()) == [1, 2, 3]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LocFT-BF", "$x_1$ [b]"]
    write_stream_picture(tmp_path / "stream.png", made)
    assert (tmp_path / "stream.png").stat().st_size > 1000


def test_a_stream_in_which_all_failed():
    made = comparison(Outcome("ROME", status="failed", reason="no room"))
    assert [len(axes.lines) for axes in stream_figure(made).axes] == [0, 0]
