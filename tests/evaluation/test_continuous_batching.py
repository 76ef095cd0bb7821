"""Rows that are filled again give each text what it would get alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.toys import toy_model
from transformers import GPTNeoConfig, GPTNeoForCausalLM, MambaConfig, MambaForCausalLM

from locft_easyedit.evaluation import continuous_batching as batching
from locft_easyedit.evaluation import decoding
from locft_easyedit.evaluation.continuous_batching import (
    attention_span,
    cache_width,
    decode_refilled,
)
from locft_easyedit.evaluation.decoding import decode_, static_span
from locft_easyedit.modeling.modes import evaluation_mode

CELLS = 32  # two rows
N = 9


def some_texts(n=N):
    random = np.random.default_rng(0)
    return [random.integers(3, 40, 1 + 3 * i % 20).tolist() for i in range(n)]


def lengths_wanted(texts):
    """Each text ends at a length of its own."""
    return [len(text) + 1 + 5 * i % 7 for i, text in enumerate(texts)]


@torch.no_grad()
def naive(model, texts, wanted):
    """Each text alone, read whole for every token."""
    grown = [list(text) for text in texts]
    for text, most in zip(grown, wanted, strict=True):
        while len(text) < most:
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return grown


def decoded(model, texts, wanted, decode=decode_refilled, **how):
    found, how = {}, {"cells": CELLS, "span": float("inf")} | how
    with evaluation_mode(model), torch.no_grad():
        rest = decode(
            model,
            np.array([*map(len, texts)]),
            lambda i: list(texts[i]),
            found.__setitem__,
            pick=lambda logits, numbers, so_far: logits.argmax(-1),
            done=lambda i, ids: len(ids) >= wanted[i],
            **how,
        )
    return [found.get(i) for i in range(len(texts))], rest


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "qwen3", "mixtral"])
def test_texts_grow_as_they_do_alone(kind):
    model, texts = toy_model(kind), some_texts()
    wanted = lengths_wanted(texts)
    found, rest = decoded(model, texts, wanted)
    assert found == naive(model, texts, wanted)
    assert rest == {}


def test_a_text_that_is_done_makes_room_for_the_next():
    """Both rows have a text in every step but the last ones."""
    model, texts, shapes = toy_model(), [[5, 6, 7]] * 12, []
    model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    wanted = [4 + (i % 3) * 4 for i in range(12)]  # a token, which comes of reading it; 5, or 9
    assert decoded(model, texts, wanted)[0] == naive(toy_model(), texts, wanted)
    assert set(shapes) == {(2, 1), (2, 8)}
    assert shapes.count((2, 8)) == 6
    tokens = sum(wanted) - 12 * 4
    assert tokens / 2 <= shapes.count((2, 1)) <= tokens / 2 + 4


def test_a_text_without_room_goes_on_in_a_wider_cache(monkeypatch):
    model, texts, widths = toy_model(), some_texts(3), []
    rows = batching._Rows
    monkeypatch.setattr(batching, "_Rows", lambda *args: widths.append(args[2]) or rows(*args))
    wanted = [len(text) + most for text, most in zip(texts, (2, 100, 140), strict=True)]
    assert decoded(model, texts, wanted)[0] == naive(model, texts, wanted)
    assert widths == [64, 128, 192]


@pytest.mark.parametrize("at", ["reading", "a step"])
def test_fewer_rows_where_memory_runs_out(at, monkeypatch, caplog):
    model, texts = toy_model(), some_texts()
    wanted, refused = lengths_wanted(texts), []

    def full(_, args, given):
        rows, columns = given["input_ids"].shape
        first = (columns > 1) == (at == "reading")
        if rows == 4 and first and len(refused) < 2:
            refused.append(rows)
            raise torch.OutOfMemoryError("pretended")

    model.register_forward_pre_hook(full, with_kwargs=True)
    found, _ = decoded(model, texts, wanted, cells=64)
    assert found == naive(toy_model(), texts, wanted)
    assert refused
    assert "4 rows of a key-value cache do not fit into memory: 2 from here on." in caplog.text


def test_a_gpu_gives_a_share_of_its_memory(monkeypatch):
    total = SimpleNamespace(total_memory=16 * 1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    cuda = torch.device("cuda")
    assert batching._affordable(256, 3, cuda) == 256
    assert batching._affordable(256, 4, cuda) == 128
    assert batching._affordable(256, 9999, cuda) == 1
    assert batching._affordable(256, 9999, torch.device("cpu")) == 256


def test_fewer_rows_than_texts_are_read_at_once(monkeypatch):
    monkeypatch.setattr(batching, "_affordable", lambda *_: 3)
    texts = some_texts(20)
    wanted = lengths_wanted(texts)
    assert decoded(toy_model(), texts, wanted, cells=512)[0] == naive(toy_model(), texts, wanted)


def test_memory_that_never_suffices_is_an_error():
    model = toy_model()

    def full(*_):
        raise torch.OutOfMemoryError("pretended")

    model.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        decoded(model, some_texts(), lengths_wanted(some_texts()))


def test_a_layer_that_sees_few_tokens_limits_the_cache():
    model = toy_model("gemma3", sliding_window=70)
    assert attention_span(model, [5, 6, 7], CELLS) == 70
    assert attention_span(toy_model(), [5, 6, 7], CELLS) == float("inf")
    texts = [[5, 6, 7], [8] * 60, [9, 10]]
    wanted = [5, 64, 50]
    found, rest = decoded(model, texts, wanted, span=70)
    expected = naive(model, texts, wanted)
    assert found == [expected[0], None, expected[2]]
    assert rest == {1: texts[1]}


def test_a_text_that_outgrows_all_caches_is_given_back():
    model = toy_model()
    texts, wanted = [[5, 6, 7], [8, 9]], [5, 80]
    found, rest = decoded(model, texts, wanted, span=64)
    expected = naive(model, texts, wanted)
    assert found == [expected[0], None]
    assert rest == {1: expected[1][: len(rest[1])]}
    assert cache_width(len(rest[1]), CELLS) > 64


def test_in_half_precision_what_does_not_fit_is_decoded_all_the_same():
    texts = [[5, 6, 7], [8] * 60, [9, 10]]
    wanted = [5, 64, 80]

    def narrow():
        return toy_model("gemma3", sliding_window=70).bfloat16()

    found, _ = decoded_by_choice(narrow(), texts, wanted)
    assert [len(ids) for ids in found] == wanted
    # A text's answer does not depend on what else is asked, or was asked first.
    assert [decoded_by_choice(narrow(), [text], [most])[0][0]
            for text, most in zip(texts, wanted, strict=True)] == found  # fmt: skip


@pytest.mark.parametrize("length", [1, 7, 60, 500])
def test_the_trial_does_not_depend_on_how_long_the_first_text_is(length):
    assert static_span(toy_model("gemma3", sliding_window=70), [8] * length) == 70
    assert static_span(toy_model(), [8] * length) == 512


def test_a_window_that_follows_from_the_length_of_the_cache_is_noticed():
    config = GPTNeoConfig(
        vocab_size=50, hidden_size=16, num_layers=2, attention_types=[[["global", "local"], 1]],
        num_heads=2, window_size=64, max_position_embeddings=600, initializer_range=0.2,
    )  # fmt: skip
    assert static_span(GPTNeoForCausalLM(config).eval(), [5, 6, 7]) == 0


def decoded_by_choice(model, texts, wanted):
    def decode(*args, cells, span, **how):
        decode_(*args, batch_size=2, description="", **how)

    return decoded(model, texts, wanted, decode)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_half_precision_fills_rows_again(kind, monkeypatch):
    model = toy_model(kind).bfloat16()
    monkeypatch.setattr(decoding, "_decode_cached", None)
    monkeypatch.setattr(decoding, "_decode_anew", None)
    texts, wanted = some_texts(), lengths_wanted(some_texts())
    found, _ = decoded_by_choice(model, texts, wanted)
    assert all(found)
    alone = [decoded_by_choice(toy_model(kind).bfloat16(), [text], [most])[0][0]
             for text, most in zip(texts, wanted, strict=True)]  # fmt: skip
    assert alone == found


def test_the_trial_fills_a_row_again(monkeypatch):
    take, taken = batching._Layer.take, set()

    def once(self, given, members, rows):
        fresh = [row for row in rows.tolist() if (id(self), row) not in taken]
        taken.update((id(self), row) for row in fresh)
        if fresh:
            take(self, given, members[: len(fresh)], torch.tensor(fresh))

    monkeypatch.setattr(batching._Layer, "take", once)
    assert static_span(toy_model(), [5, 6, 7]) == 0
    assert static_span(toy_model().bfloat16(), [5, 6, 7]) == 0


@pytest.mark.parametrize("wrong", ["positions", "columns"])
def test_a_cache_that_changes_the_logits_is_not_used(wrong, monkeypatch):
    step = batching.run_next

    def other(model, cache, **inputs):
        if wrong == "positions":
            inputs["position_ids"] = inputs["position_ids"] + 1
        else:
            inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
        return step(model, cache, **inputs)

    assert static_span(toy_model(), [5, 6, 7]) == 512
    assert static_span(toy_model().bfloat16(), [5, 6, 7]) == 512
    monkeypatch.setattr(batching, "run_next", other)
    assert static_span(toy_model(), [5, 6, 7]) == 0
    assert static_span(toy_model().bfloat16(), [5, 6, 7]) == 0


def test_a_cache_of_states_has_no_rows_to_fill():
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert static_span(MambaForCausalLM(config).eval(), [5, 6, 7]) == 0


def test_numbers_that_are_none_stay_in_their_text():
    """One row: what the first text has left behind lies beyond the end of the second."""
    model, last = toy_model(), 4
    texts, wanted = [[5] * 12, [6, 7]], [15, 10]
    expected = naive(toy_model(), texts[1:], wanted[1:])
    with torch.no_grad():
        model.get_input_embeddings().weight[last] = float("nan")
    found = {}
    with evaluation_mode(model), torch.no_grad():
        decode_refilled(
            model,
            np.array([12, 2]),
            lambda i: list(texts[i]),
            found.__setitem__,
            pick=lambda logits, numbers, so_far: torch.where(
                torch.tensor(numbers) == 0, last, logits.argmax(-1)
            ),
            done=lambda i, ids: len(ids) >= wanted[i],
            cells=16,
            span=float("inf"),
        )
    assert found[1] == expected[0]
