"""Edits one on top of the other: in and out in order, and in no other order."""

import copy

import pytest
import torch
from helpers.toys import made_delta, toy_model

from locft_easyedit.delta.apply import apply_deltas_, revert_deltas_
from locft_easyedit.errors import DeltaError


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def stack(layers, kind="llama"):
    """Returns the model before, the values after each edit, and the edits."""
    model = toy_model(kind)
    base, states, deltas = copy.deepcopy(model), [values_of(model)], []
    for i, layer in enumerate(layers):
        deltas.append(made_delta(kind, layer, model=model, scale=1.5 + i))
        states.append(values_of(model))
    return base, states, deltas


PLACES = {"same": [2, 2, 2], "different": [1, 2, 3], "mixed": [1, 2, 1]}


@pytest.mark.parametrize("layers", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_order(layers, kind):
    model, states, deltas = stack(layers, kind)
    apply_deltas_(model, deltas)
    assert same(states[3], values_of(model))
    revert_deltas_(model, deltas[:0:-1])
    assert same(states[1], values_of(model))
    deltas[0].revert_(model)
    assert same(states[0], values_of(model))
    for delta, state in zip(deltas, states[1:], strict=True):
        delta.apply_(model)
        assert same(state, values_of(model))


@pytest.mark.parametrize("layers", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("order", [(1,), (2,), (1, 0), (0, 2), (0, 2, 1), (0, 1, 1), (0, 0)])
def test_in_no_other_order(layers, order):
    model, states, deltas = stack(layers)
    with pytest.raises(DeltaError, match=r"cannot be applied to LlamaForCausalLM"):
        apply_deltas_(model, [deltas[i] for i in order])
    assert same(states[0], values_of(model))


@pytest.mark.parametrize("layers", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("order", [(0,), (1,), (0, 1, 2), (2, 0), (2, 1, 1), (2, 2)])
def test_out_in_no_other_order(layers, order):
    model, states, deltas = stack(layers)
    apply_deltas_(model, deltas)
    with pytest.raises(DeltaError, match="cannot be taken out of LlamaForCausalLM"):
        revert_deltas_(model, [deltas[i] for i in order])
    assert same(states[3], values_of(model))


def test_what_is_told():
    model, _, deltas = stack([2, 2])
    with pytest.raises(DeltaError, match=r"neither (.|\n)* first apply what was in it\."):
        deltas[1].apply_(model)
    apply_deltas_(model, deltas)
    with pytest.raises(DeltaError, match=r"Another edit is in there(.|\n)*revert later ones first"):
        deltas[0].revert_(model)
    with pytest.raises(DeltaError, match="No edit was given"):
        apply_deltas_(model, [])


def test_switched_on_for_a_while_on_top_of_another():
    model, states, deltas = stack([1, 2])
    deltas[0].apply_(model)
    with pytest.raises(KeyError, match="within"), deltas[1].applied(model):  # noqa: PT012
        assert same(states[2], values_of(model))
        raise KeyError("within")
    assert same(states[1], values_of(model))
