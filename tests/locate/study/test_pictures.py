"""The pictures of a location study, looked at through the artists of their figures."""

import dataclasses
import math
import struct
import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from test_study_outcome import cell, study
from test_study_tables import marked

from locft_easyedit.errors import OutputError
from locft_easyedit.locate.study.heat_maps import heat_figure, write_heat_maps
from locft_easyedit.locate.study.pareto import front_figure, pareto_front, write_front
from locft_easyedit.locate.study.study_outcome import DIVERGED, FAILED, OUT_OF_MEMORY
from locft_easyedit.modeling.locations import MODULES

PENDING = "#e4e4e4"


def small(**changes):
    """Three layers of two modules; layer 2's `up` is missing."""
    cells = [
        cell(0, "up", score=0.2, drift=0.5, generalization=0.30, reliability=0.3),
        cell(0, "down", score=0.3, drift=0.1, generalization=0.40),
        cell(1, "up", score=0.4, drift=0.01, generalization=0.50),
        cell(1, "down", score=0.9, drift=0.02, generalization=0.70),
        cell(1, "down", lr=2e-3, score=0.5, drift=0.3, generalization=0.80),
        cell(2, "down", score=0.6, drift=0.05, generalization=0.60),
    ]
    return study(*cells, **changes)


def drawn(make, found):
    """The figure; a warning of matplotlib's fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = make(found)
        FigureCanvasAgg(figure).draw()
    return figure


def panels(figure):
    return {axes.get_title(loc="left").split(" ")[0]: axes for axes in figure.axes
            if axes.get_title(loc="left")}  # fmt: skip


def values(axes):
    return np.ma.filled(axes.images[0].get_array().astype(float), math.nan)


def rectangles(axes):
    """(column, row) -> patch, of those that fill a field."""
    return {
        (round(patch.get_x() + 0.5), round(patch.get_y() + 0.5)): patch
        for patch in axes.patches
        if isinstance(patch, Rectangle) and patch.get_fill()
    }


def frames(axes):
    return {
        (round(patch.get_x() + 0.5), round(patch.get_y() + 0.5))
        for patch in axes.patches
        if not patch.get_fill()
    }


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_a_panel_for_each_figure_that_is_there():
    figure = drawn(heat_figure, small())
    assert list(panels(figure)) == ["reliability", "generalization", "drift", "score"]
    only = study(cell(0), cell(1))
    assert list(panels(drawn(heat_figure, only))) == ["reliability", "reworded", "drift", "score"]
    everything = study(
        cell(0, generalization=0.1, locality=0.2, portability=0.3, capability=0.4, rephrase_acc=0.5)
    )
    assert list(panels(drawn(heat_figure, everything))) == [
        "reliability", "generalization", "locality", "portability", "capability", "drift", "score",
    ]  # fmt: skip


def test_every_place_has_the_figures_of_its_best_rate():
    found = panels(drawn(heat_figure, small()))
    assert [label.get_text() for label in found["score"].get_yticklabels()] == ["up", "down"]
    np.testing.assert_array_equal(values(found["score"]), [[0.2, 0.4, math.nan], [0.3, 0.9, 0.6]])
    # Layer 1's `down` generalizes better at the other rate, but its score is worse there.
    np.testing.assert_array_equal(
        values(found["generalization"]), [[0.3, 0.5, math.nan], [0.4, 0.7, 0.6]]
    )
    np.testing.assert_array_equal(
        values(found["drift"]), [[0.5, 0.01, math.nan], [0.1, 0.02, 0.05]]
    )


def test_rows_are_in_the_order_of_the_modules():
    found = study(*(cell(0, module) for module in reversed(MODULES)))
    axes = panels(drawn(heat_figure, found))["score"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(MODULES)


def test_drift_is_on_a_log_scale_and_the_others_are_not():
    found = panels(drawn(heat_figure, small()))
    assert isinstance(found["drift"].images[0].norm, LogNorm)
    assert not isinstance(found["score"].images[0].norm, LogNorm)
    # More drift is darker, a better score is lighter.
    light = {name: axes.images[0].cmap for name, axes in found.items()}
    assert sum(light["drift"](0.0)[:3]) > sum(light["drift"](1.0)[:3])
    assert sum(light["score"](0.0)[:3]) < sum(light["score"](1.0)[:3])


def test_equal_figures_and_no_drift_at_all_are_drawn():
    found = study(*(cell(layer, drift=0.0, reliability=1.0) for layer in range(3)))
    panel = panels(drawn(heat_figure, found))
    np.testing.assert_array_equal(values(panel["drift"]), [[1e-6] * 3])
    assert panel["reliability"].images[0].get_clim() == pytest.approx((0.9, 1.0))


def test_the_chosen_place_has_a_frame_in_every_panel():
    for axes in panels(drawn(heat_figure, small())).values():
        assert frames(axes) == {(1, 1)}


def test_a_place_that_the_model_does_not_have_stays_blank():
    for axes in panels(drawn(heat_figure, small())).values():
        assert rectangles(axes) == {}


def test_what_happened_to_a_place_without_figures_shows():
    found = study(
        cell(0), marked(1, DIVERGED), marked(2, OUT_OF_MEMORY), marked(3, FAILED),
        marked(0, DIVERGED, lr=1.0),
    )  # fmt: skip
    figure = drawn(heat_figure, found)
    for axes in panels(figure).values():
        hatches = {place: patch.get_hatch() for place, patch in rectangles(axes).items()}
        # Layer 0 has figures at another rate.
        assert set(hatches) == {(1, 0), (2, 0), (3, 0)}
        assert len(set(hatches.values())) == 3
        assert None not in hatches.values()
    assert legend_texts(figure) == ["chosen", DIVERGED, OUT_OF_MEMORY, FAILED]


def test_what_is_not_measured_yet_is_grey_and_what_is_not_there_is_blank():
    done = small()
    there = [one.cell for one in done.cells]
    more = [cell(3, "down").cell, cell(1, "down", lr=3e-3).cell]
    found = dataclasses.replace(done, planned=(*there, *more), n_cells=8)
    figure = drawn(heat_figure, found)
    for axes in panels(figure).values():
        [(place, patch)] = rectangles(axes).items()
        assert place == (3, 1)
        assert to_hex(patch.get_facecolor()) == PENDING
    assert "not measured yet" in legend_texts(figure)


def test_nothing_measured_and_nothing_left_are_drawn_too():
    for found in (study(n_cells=3), study(marked(0, DIVERGED), marked(1, DIVERGED))):
        assert list(panels(drawn(heat_figure, found))) == ["score"]
        front = drawn(front_figure, found)
        assert "no cell has figures" in [text.get_text() for text in front.axes[0].texts]


@pytest.mark.parametrize("make", [heat_figure, front_figure])
def test_the_title_says_model_data_edits_and_choice_and_is_no_formula(make):
    found = dataclasses.replace(small(), model="$x_{$ model", data="zsre\n.json", n=1234)
    figure = drawn(make, found)
    title = " ".join(figure.get_suptitle().split())
    assert "$x_{$ model on zsre .json, 1,234 edits a cell" in title
    assert "chosen: layer 1 down, lr 0.001" in title
    long = drawn(make, dataclasses.replace(found, model="name/" * 100))
    renderer = long.canvas.get_renderer()
    box = Text.get_window_extent(long._suptitle, renderer)
    assert box.x0 >= 0
    assert box.x1 <= long.bbox.x1


@pytest.mark.parametrize("n_layers", [1, 30, 80])
def test_pictures_of_small_and_deep_models_keep_their_size(tmp_path, n_layers):
    found = study(*(cell(layer, drift=0.01 * (layer + 1)) for layer in range(n_layers)))
    write_heat_maps(tmp_path / "heat.png", found)
    write_front(tmp_path / "front.png", found)
    assert 900 <= png_size(tmp_path / "heat.png")[0] <= 2200
    assert png_size(tmp_path / "front.png")[0] == 1650


def test_layers_are_all_named_up_to_forty():
    for n_layers, n_ticks in ((30, 30), (80, 16)):
        found = study(*(cell(layer) for layer in range(n_layers)))
        axes = panels(drawn(heat_figure, found))["score"]
        assert len(axes.get_xticks()) == n_ticks


def test_the_columns_are_the_layers_that_were_visited():
    found = study(cell(2, "down", score=0.2), cell(20, "down", score=0.9), cell(29, "up"))
    figure = drawn(heat_figure, found)
    axes = panels(figure)["score"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "20", "29"]
    assert values(axes).shape == (2, 3)
    assert values(axes)[1].tolist()[:2] == [0.2, 0.9]
    assert frames(axes) == {(1, 1)}


def test_figures_are_written_into_the_fields_of_few_layers():
    axes = panels(drawn(heat_figure, small()))["score"]
    assert sorted(t.get_text() for t in axes.texts) == ["0.20", "0.30", "0.40", "0.60", "0.90"]
    deep = study(*(cell(layer) for layer in range(30)))
    assert not panels(drawn(heat_figure, deep))["score"].texts


def naive_front(cells):
    """Cells that none beats: none is at least as good in both and better in one."""
    pairs = [(one.figures["drift"], one.figures["generalization"]) for one in cells]
    return {
        pair
        for pair in pairs
        if not any(d <= pair[0] and g >= pair[1] and (d, g) != pair for d, g in pairs)
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_cell_beats(seed):
    random = np.random.default_rng(seed)
    # Coarse figures, so that there are ties.
    cells = [
        cell(layer, drift=float(random.integers(1, 9)), generalization=float(random.integers(9)))
        for layer in range(40)
    ]
    front = pareto_front(study(*cells))
    found = [(one.figures["drift"], one.figures["generalization"]) for one in front]
    assert len(found) == len(set(found))
    assert set(found) == naive_front(cells)
    assert found == sorted(found)


def test_all_cells_are_points_and_hollow_ones_did_not_learn():
    axes = drawn(front_figure, small()).axes[0]
    markers = [line for line in axes.lines if len(line.get_xdata()) == 1]
    star = [line for line in markers if line.get_marker() == "*"]
    points = [line for line in markers if line.get_marker() != "*"]
    assert {(line.get_xdata()[0], line.get_ydata()[0]) for line in points} == {
        (one.figures["drift"], one.figures["generalization"]) for one in small().cells
    }
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in star] == [(0.02, 0.7)]
    hollow = [line for line in points if line.get_markerfacecolor() == "none"]
    assert [line.get_ydata()[0] for line in hollow] == [0.3]
    assert len({line.get_marker() for line in points}) == 2
    assert len({line.get_markeredgecolor() for line in points}) == 3
    assert axes.get_xscale() == "log"


def test_the_front_is_a_step_line_with_a_list_of_its_cells():
    figure = drawn(front_figure, small())
    [line] = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
    assert line.get_drawstyle() == "steps-post"
    assert list(line.get_xdata())[:-1] == [0.01, 0.02, 0.3]
    assert list(line.get_ydata()) == [0.5, 0.7, 0.8, 0.8]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2", "3"]
    listed = [text.get_text().split("\n")[0].strip() for text in figure.legends[0].get_texts()]
    assert listed == [
        "1  layer 1 up, lr 0.001", "2  layer 1 down, lr 0.001", "3  layer 1 down, lr 0.002",
    ]  # fmt: skip
    named = legend_texts(figure)[3:]
    assert named == ["up", "down", "reliability below 0.9", "chosen"]


@pytest.mark.parametrize("chosen", [56, 57, 58])  # neighbours: not all have a number anyway
def test_a_long_front_names_some_cells_and_the_chosen_one(chosen):
    cells = [
        cell(layer, drift=1e-3 * 1.05**layer, generalization=0.005 * layer, score=0.5)
        for layer in range(100)
    ]
    cells[chosen] = dataclasses.replace(
        cells[chosen], figures={**cells[chosen].figures, "score": 0.9}
    )
    figure = drawn(front_figure, study(*cells))
    listed = [text.get_text() for text in figure.legends[0].get_texts()]
    assert 8 <= len(listed) <= 16
    assert any(f"layer {chosen} down" in text for text in listed)
    assert "layer 99 down" in listed[-1]
    assert figure.legends[0].get_title().get_text() == f"the front ({len(listed)} of 100)"
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]
    apart = [not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert sum(apart) >= len(apart) - 2  # the chosen one may stand close to its neighbours


def test_rewordings_take_the_place_of_rephrases_that_the_data_lacks():
    figure = drawn(front_figure, study(cell(0, reworded=0.4), cell(1, reworded=0.6, drift=0.2)))
    assert figure.axes[0].get_ylabel().startswith("reworded")
    assert [one.figures["reworded"] for one in pareto_front(study(cell(0, reworded=0.4)))] == [0.4]


def test_cells_without_a_finite_point_are_left_out():
    found = study(cell(0, generalization=0.5), cell(1, generalization=math.nan), cell(2))
    axes = drawn(front_figure, found).axes[0]
    markers = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert {line.get_ydata()[0] for line in markers} == {0.5}


@pytest.mark.parametrize("write", [write_heat_maps, write_front])
def test_a_picture_that_cannot_be_written_is_an_output_error(tmp_path, write):
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "nowhere" / "picture.png", small())
