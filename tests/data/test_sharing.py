"""Rows in which texts share beginnings: each text's way through its row is the text itself."""

import numpy as np
import pytest
import torch
from helpers.toys import toy_model

from locft_easyedit.data.sharing import lay_out_shared
from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.prefix import frozen_prefix
from locft_easyedit.prefix.frozen_prefix import Layout
from locft_easyedit.prefix.probes import Probes
from locft_easyedit.prefix.runner import TextRunner


def random_texts(seed, n=12):
    """Texts of few different tokens, many of which begin alike; one is another's beginning."""
    generator = np.random.default_rng(seed)
    trunk = generator.integers(3, 30, 9).tolist()
    sequences = [
        trunk[: generator.integers(0, 10)] + generator.integers(3, 6, 6).tolist() for _ in range(n)
    ]
    sequences += [sequences[0], sequences[0][:-2], [*trunk, 3, 4]]
    starts = [int(generator.integers(1, len(s))) for s in sequences]
    return TokenizedTexts.from_lists(sequences, starts)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("row_tokens", [1, 8, 20, 500])
def test_each_text_attends_to_itself_alone(seed, row_tokens):
    texts = random_texts(seed)
    batch = np.random.default_rng(seed).permutation(len(texts))
    rows = lay_out_shared(texts, batch, row_tokens=row_tokens)
    n_columns = rows.token_index.shape[1]
    attends = rows.attention_mask[:, 0]
    assert bool(attends.any(-1).all())  # a softmax over nothing would be NaN
    done = 0
    for owner, i in enumerate(batch):
        ids = texts.ids[texts.offsets[i] : texts.offsets[i + 1]]
        cells = rows.scored[rows.owner == owner]
        labels = texts.ids[rows.label_index[rows.owner == owner].numpy()]
        assert labels.tolist() == ids[texts.target_start[i] :].tolist()
        for cell, position in zip(
            cells.tolist(), range(texts.target_start[i], len(ids)), strict=True
        ):
            row, column = divmod(cell, n_columns)
            seen = attends[row, column].nonzero()[:, 0]
            seen = seen[rows.position_ids[row, seen].argsort()]
            assert (
                texts.ids[rows.token_index[row, seen].numpy()].tolist() == ids[:position].tolist()
            )
            assert rows.position_ids[row, seen].tolist() == list(range(position))
            done += 1
    assert done == len(rows.scored)


def test_what_is_shared_is_there_once():
    texts = TokenizedTexts.from_lists(
        [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 3, 4, 1], [5, 6, 7, 8, 9, 2], [20, 21, 1]], [4, 5, 4, 1]
    )
    rows = lay_out_shared(texts, [0, 1, 2, 3], row_tokens=20)
    # Of the first: five tokens; the second adds two, the third nothing, the last two.
    assert int(rows.real.sum()) == 5 + 2 + 0 + 2
    assert rows.scored.tolist().count(int(rows.scored[0])) >= 1
    ones = rows.scored[rows.owner == 0], rows.scored[rows.owner == 2]
    assert torch.equal(*ones)  # the same cells predict other tokens


def test_short_beginnings_do_not_decide_about_rows():
    texts = TokenizedTexts.from_lists([[5, 6, 7 + i, 8, 9, 1] for i in range(6)], [3] * 6)
    rows = lay_out_shared(texts, range(6), row_tokens=5)
    assert int(rows.real.sum()) == 6 * 5
    assert rows.token_index.shape == (3, 10)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_texts_alone(kind):
    model, texts = toy_model(kind), random_texts(3)
    batch = np.arange(len(texts))
    found = {}
    for shared in (False, True):
        model.zero_grad()
        runner = TextRunner(model, texts, row_tokens=20, packed=shared, prefix=None, shared=shared)
        prepared = runner.prepare(batch)
        assert (prepared.rows.attention_mask.dim() == 4) is shared
        losses = runner.edit_losses(prepared)
        losses.mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found[shared] = losses.detach(), gradients
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-6)
    for one, other in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_rows_are_shared_where_that_pays_and_nowhere_else(monkeypatch):
    model, texts = toy_model(), random_texts(0)
    layout = Layout(texts, 20, True, shared=True)
    assert layout.rows(model, np.arange(len(texts))).attention_mask.dim() == 4
    assert layout.rows(model, np.arange(1)).attention_mask is None
    monkeypatch.setattr(frozen_prefix, "_FEWER", 0.0)
    assert layout.rows(model, np.arange(len(texts))).attention_mask is None


def test_a_model_that_does_not_take_such_masks():
    texts = random_texts(0)
    assert Probes(toy_model(), texts).sharing()
    blind = toy_model()
    original = blind.forward
    blind.forward = lambda *, attention_mask=None, **given: original(attention_mask=None, **given)
    assert not Probes(blind, texts).sharing()

    def refuses(*, attention_mask=None, **given):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("masks have two dimensions")
        return original(attention_mask=attention_mask, **given)

    blind.forward = refuses
    assert not Probes(blind, texts).sharing()


def test_flash_attention_is_not_asked_for_masks():
    model, texts = toy_model(), random_texts(0)
    probes = Probes(model, texts)
    model.config._attn_implementation = "flash_attention_2"
    assert not probes.sharing()
