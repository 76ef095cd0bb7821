"""Masks of packed rows that the model is given: its own ones, made before its pass."""

import numpy as np
import pytest
import torch
from helpers.scripts import script_module
from helpers.toys import REPOSITORY
from torch.utils._python_dispatch import TorchDispatchMode

from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.modeling.forward import give_masks, run_layout
from locft_easyedit.prefix.frozen_prefix import Layout
from locft_easyedit.prefix.runner import TextRunner
from locft_easyedit.prefix.shortcuts import can_pack

model_types = script_module(REPOSITORY / "benchmarks" / "checks" / "model_types.py")

# What the host needs a number for, and waits for a GPU to get it.
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")


class Waits(TorchDispatchMode):
    """Collects the operations that make the host wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(WAITS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def model_and_texts(model_type, attention):
    model = model_types.tiny_model(model_type)
    model.set_attn_implementation(attention)
    tokenizer = model_types.word_tokenizer(model_types.WORDS)
    requests = model_types.random_requests(8, model_types.WORDS)
    ids = tokenizer([r["prompt"] for r in requests])["input_ids"]
    return model, TokenizedTexts.from_lists(ids, [len(one) - 1 for one in ids])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen2"])
def test_they_are_those_that_the_model_makes(model_type, attention):
    model, texts = model_and_texts(model_type, attention)
    assert can_pack(model, texts)
    every = np.arange(len(texts))
    given = Layout(texts, 24, packed=True).rows(model, every)
    assert given.attention_mask is not None
    give_masks(model, False)
    own = Layout(texts, 24, packed=True).rows(model, every)
    assert own.attention_mask is None
    ids = torch.from_numpy(texts.ids)
    with torch.no_grad():
        found, expected = (
            run_layout(model, rows, input_ids=ids[rows.gather_index]).logits
            for rows in (given, own)
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_with_them_the_host_waits_for_nothing_in_a_pass(model_type):
    model, texts = model_and_texts(model_type, "sdpa")

    def waits(given):
        give_masks(model, given)
        runner = TextRunner(model, texts, row_tokens=24, packed=True, prefix=None)
        prepared = runner.prepare(np.arange(len(texts)))
        with Waits() as seen:
            runner.edit_losses(prepared).sum().backward()
        return seen.found

    assert waits(False)
    assert not waits(True)
