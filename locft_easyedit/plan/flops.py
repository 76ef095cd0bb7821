"""Floating-point operations of a prefix, of a step and of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from .given import Workload
from .layout import Setting
from .shapes import LayerShape, ModelShapes


def prefix_flop(shapes: ModelShapes, work: Workload, cut: str) -> float:
    """Returns the operations a token of the layers below a cut."""
    flop = sum(_forward(one, shapes, work) for one in shapes.layers[: shapes.first_layer])
    first = shapes.layers[shapes.first_layer]
    if cut != "layer":
        flop += _forward(first, shapes, work) - 2 * shapes.above_cut[cut]
    # Of W x + A S x a folded change leaves only the product with A to training.
    return flop + 2 * first.confined * shapes.folds(cut)


def step_flop(shapes: ModelShapes, setting: Setting, work: Workload) -> float:
    """Returns the operations of a step on a whole mini-batch.

    A weight above the cut costs 2 operations a token forward and 2 backward to the activations;
    a trained one 2 more for its gradient. Nothing goes back beyond the first trained matrix. So do
    A and S of a confined change, unless the prefix holds what they make constant.
    """
    first = shapes.layers[shapes.first_layer]
    above = shapes.above_cut[setting.cut]
    backward = 0 if setting.cut == "matrix" else above
    token = 2.0 * (above + backward + first.trained_matmul)
    token += 2.0 * first.confined * (not shapes.folds(setting.cut))
    if setting.cut == "layer":
        token += 3 * _scores(shapes, work)
    if shapes.first_layer == len(shapes.layers) - 1:
        token *= work.step_scored if setting.cut != "layer" else 1.0
    for one in shapes.layers[shapes.first_layer + 1 :]:
        token += 2.0 * (2 * one.matmul + one.trained_matmul) + 3 * _scores(shapes, work)
        token += 2.0 * 2 * one.confined
    if shapes.first_layer < len(shapes.layers) - 1:
        token -= 2.0 * 2 * shapes.layers[-1].late * (1 - work.step_scored)
    head = 2.0 * 2 * shapes.hidden * shapes.vocab * work.step_scored
    return work.batch_size * work.step_tokens * (token + head)


def evaluation_flop(shapes: ModelShapes, work: Workload) -> float:
    """Returns the operations a token of the layers from the first trained one up, and the head."""
    upper: Sequence[LayerShape] = shapes.layers[shapes.first_layer :]
    flop = sum(_forward(one, shapes, work) for one in upper)
    flop -= 2.0 * upper[-1].late * (1 - work.scored)
    return flop + 2.0 * shapes.hidden * shapes.vocab * work.scored


def _forward(layer: LayerShape, shapes: ModelShapes, work: Workload) -> float:
    return 2.0 * layer.matmul + _scores(shapes, work)


def _scores(shapes: ModelShapes, work: Workload) -> float:
    """Returns the operations a token of attending to a row: products with keys and with values."""
    return 4.0 * work.row_tokens * shapes.attention
