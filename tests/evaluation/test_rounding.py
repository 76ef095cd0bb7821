"""In half precision a text's answers follow from the text, and no text is run again for them."""

import numpy as np
import pytest
import torch
from helpers.toys import toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.data.batching import cells_of, fixed_batches, fixed_shape
from locft_easyedit.evaluation.decoding import can_batch_cache
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS, Evaluation
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.training.session import EditSession

pytestmark = pytest.mark.usefixtures("short_answers")


def half(kind="llama", dtype=torch.bfloat16, **config):
    """A model of half precision with many close choices: its logits are large and coarse."""
    model = toy_model(kind, **config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model.to(dtype)


def measured(model, records, *, only=None, **how):
    evaluation = Evaluation(
        model, toy_tokenizer(), records, EvalConfig(**how), metrics=PLAIN_METRICS
    )
    return evaluation.measure(only=only)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_metrics_do_not_depend_on_what_else_is_measured(kind, dtype):
    model, records = half(kind, dtype), toy_requests(24)
    everything = measured(model, records)
    assert measured(model, records, batch_size=3, row_tokens=300, packed=True) == everything
    assert measured(model, records[5:6]) == everything[5:6]
    assert measured(model, records[::-1]) == everything[::-1]
    assert measured(model, records, only=[7, 3])[0] == everything[7]


@pytest.mark.parametrize("layer", [2, 3])
def test_metrics_do_not_depend_on_the_frozen_prefix(layer):
    model, records = half(), toy_requests(12)
    expected = measured(model, records)
    with EditSession(
        model, toy_tokenizer(), records, toy_hparams(layers=[layer]), progress=False
    ) as session:
        how = EvalConfig.from_session(session, progress=False)
        evaluation = Evaluation(model, toy_tokenizer(), records, how, metrics=PLAIN_METRICS)
        assert evaluation.measure() == expected  # the frozen layers are recorded
        assert evaluation.measure() == expected  # and replayed


def test_no_text_is_run_again():
    model, records, rows = half(), toy_requests(24), []
    assert can_batch_cache(model, [1, 2, 3])
    evaluation = Evaluation(model, toy_tokenizer(), records, metrics=("accuracy",))
    model.register_forward_pre_hook(
        lambda _, args, given: rows.append(given["input_ids"].shape), with_kwargs=True
    )
    evaluation.measure()
    assert all(shape == (fixed_shape(shape[1], 1, 512).rows, shape[1]) for shape in rows)
    n_texts = len(evaluation._accuracy.texts)
    shapes = len(set(rows))
    assert len(rows) <= n_texts / min(shape[0] for shape in rows) + 2 * shapes + 2


def test_experts_whose_rounding_depends_on_others_are_said(caplog, monkeypatch):
    from locft_easyedit.evaluation.predictions import ArgmaxPredictor

    monkeypatch.setattr(ArgmaxPredictor, "_rows_apart", lambda self: False)
    measured(half(), toy_requests(6))
    assert "Rounding may decide between the two first choices of" in caplog.text
    assert "%)" in caplog.text


def test_rows_that_depend_on_others_are_noticed(caplog):
    model = half()

    def mixed(module, args, output):
        return output + output.float().mean(0, keepdim=True).to(output.dtype)

    model.model.layers[1].mlp.register_forward_hook(mixed)
    measured(model, toy_requests(6))
    assert "`dtype: float32` decides them" in caplog.text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fixed_shapes(device):
    cells = cells_of(device)
    for length in range(1, 700):
        shape = fixed_shape(length, 3, cells)
        assert shape.columns >= length > shape.columns - 8
        assert 1 <= shape.rows <= cells // 16
        assert shape.rows * shape.columns <= max(cells, shape.columns)
    random = np.random.default_rng(0)
    lengths, scored = random.integers(1, 60, 200), random.integers(1, 40, 200)
    batches = fixed_batches(lengths, scored, cells)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        shapes = {
            fixed_shape(*pair, cells) for pair in zip(lengths[batch], scored[batch], strict=True)
        }
        [shape] = shapes
        assert len(batch) <= shape.rows
        assert scored[batch].max() <= shape.scored
