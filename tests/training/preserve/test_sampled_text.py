"""What a model asks itself, and what leads up to the ends of prompts: against naive sums."""

from copy import copy

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.data.forms import Forms
from locft_easyedit.data.requests import Edit
from locft_easyedit.training.preserve import filters as prepare
from locft_easyedit.training.preserve import sampled_text as sampled
from locft_easyedit.training.preserve import source_statistics as statistics
from locft_easyedit.training.preserve.input_moments import end_moments, keys_of
from locft_easyedit.training.preserve.sampled_text import BEGINNINGS, SampledText, asked_prompts
from locft_easyedit.training.preserve.source_statistics import (
    answered_ids,
    asked_moments,
    prompt_ids,
)
from locft_easyedit.training.session import EditSession

DOWN = DOWN_PROJECTION["llama"].removesuffix(".weight")
PLAIN_ALONE = Forms(toy_tokenizer(), [])
MODULES = [DOWN.format(2), DOWN.format(1)]
# Sums of some hundred products in float32, in another order: measured at most 3e-7 of the largest.
TOLERANCE = 3e-6


def keys(model, module, documents):
    """Each document's keys in float64, [T, D], one document at a time."""
    found = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _, inputs, __: found.append(inputs[0][0].double())
    )
    with torch.no_grad():
        for document in documents:
            model(torch.tensor([document]))
    handle.remove()
    return found


def moment(rows):
    return sum((k.T @ k for k in rows), torch.zeros(64, 64).double())


def close(found, expected):
    return (found.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture
def asking(monkeypatch):
    """Lets a model ask itself what a toy's tokenizer knows."""
    text = SampledText(
        ["The dog ran home."] * 8,
        ["Who"] * 8,
        ["Question: Where is the dog?", "The home of Paris is in", "Question: Who ran"],
    )
    monkeypatch.setattr(statistics, "sampled_text", lambda *_, **__: text)
    return ["Where is the dog?", "Question: Where is the dog?\nAnswer:", "where is the dog",
            "The home of Paris is"]  # fmt: skip


# Prompts


def test_a_question_comes_in_three_forms_and_a_statement_ends_where_an_answer_may_follow():
    texts = [
        "Question: Who was the first king of Norway? He was Harald.",
        "The capital of the old kingdom was moved to Bergen in the year",
        "Question: How old",
        "It is.",
        "The author of the book said nothing to anybody",
        "Question: Who was the first king of Norway!",
    ]
    question = "Who was the first king of Norway"
    assert asked_prompts(texts) == [
        f"{question}?",
        f"Question: {question}?\nAnswer:",
        question.lower(),
        "The capital of the old kingdom was moved to Bergen in",
    ]


@pytest.mark.parametrize("begun", BEGINNINGS)
def test_every_beginning_can_lead_to_a_prompt(begun):
    [*prompts] = asked_prompts([f"{begun} old and famous Lake Garda is in Italy"])
    assert prompts
    assert all("italy" not in p.lower() or begun.startswith("Question") for p in prompts)


# Moments


def test_moments_of_what_is_asked_are_those_of_last_tokens_and_computed_once(
    asking, tmp_path, monkeypatch
):
    model, tokenizer = toy_model(), toy_tokenizer()
    found = asked_moments(model, tokenizer, MODULES, PLAIN_ALONE, cache=tmp_path, progress=False)
    documents = prompt_ids(model, tokenizer, asking, PLAIN_ALONE)
    assert found.n_tokens == len(asking)
    for module in MODULES:
        last = [k[-1:] for k in keys(model, module, documents)]
        assert close(found.second[module], moment(last) / len(asking))
    monkeypatch.setattr(statistics, "second_moments", None)  # they are kept
    again = asked_moments(model, tokenizer, MODULES, PLAIN_ALONE, cache=tmp_path, progress=False)
    assert all(torch.equal(again.second[m], found.second[m]) for m in MODULES)
    assert again.digest == found.digest


def test_a_model_that_asks_itself_nothing_has_no_such_moments(monkeypatch):
    text = SampledText(["The dog ran home."], ["Who"], ["Question: Who", "The"])
    monkeypatch.setattr(statistics, "sampled_text", lambda *_, **__: text)
    assert (
        asked_moments(
            toy_model(), toy_tokenizer(), MODULES, PLAIN_ALONE, cache=None, progress=False
        )
        is None
    )


def test_sums_over_ends_and_over_what_is_before_them():
    model, tokenizer = toy_model(), toy_tokenizer()
    documents = prompt_ids(model, tokenizer, [r["prompt"] for r in toy_requests(9)], PLAIN_ALONE)
    last, before = end_moments(model, documents, MODULES, description="", progress=False)
    rest = {}
    counts = [1 + i % 2 for i in range(len(documents))]
    ends = keys_of(
        model, documents, MODULES, last=counts, before=rest, description="", progress=False
    )
    for module in MODULES:
        naive = keys(model, module, documents)
        assert close(last[module], moment([k[-1:] for k in naive]))
        assert close(before[module], moment([k[:-1] for k in naive]))
        counted = list(zip(naive, counts, strict=True))
        assert close(rest[module], moment([k[:-n] for k, n in counted]))
        assert close(ends[module], torch.cat([k[-n:] for k, n in counted]))


def test_what_is_answered_is_cut_to_the_end_of_the_context(monkeypatch):
    model, tokenizer = toy_model(), toy_tokenizer()
    edit = Edit("The dog ran home to", "Paris in the north", 0)
    [(whole, n_tokens)] = answered_ids(
        model, tokenizer, PLAIN_ALONE.all_of(edit.prompt, edit.target)
    )
    target = tokenizer(" " + edit.target)["input_ids"]
    assert whole == [*tokenizer(edit.prompt)["input_ids"], *target[:-1]]
    assert n_tokens == len(target) > 2
    for context in (len(whole) + 1, len(whole), 4, 2, 1):
        monkeypatch.setattr(model.config, "max_position_embeddings", context)
        [(ids, n_left)] = answered_ids(
            model, tokenizer, PLAIN_ALONE.all_of(edit.prompt, edit.target)
        )
        assert ids == whole[-context:]
        assert n_left == min(n_tokens, context)


def test_all_that_is_measured_for_the_preset_counts_by_its_weight(asking, monkeypatch, tmp_path):
    for name in ("DOCUMENTS", "BATCH"):
        monkeypatch.setattr(sampled, f"_{name}", 8)
    seen = []
    compute = prepare.mixed
    monkeypatch.setattr(
        prepare, "mixed", lambda m, *of: seen.append((dict(m), *map(copy, of))) or compute(m, *of)
    )
    monkeypatch.setattr(statistics, "_check_enough", lambda *_: None)
    requests = [
        r
        | {
            "subject": r["prompt"].split()[0],
            "rewordings": [f"So: {r['prompt']}", r["prompt"] + " the"],
        }
        for r in toy_requests(6)
    ]
    hparams = toy_hparams(
        alg_name="LocFT-BF+",
        forms=[],
        preserve_dir=str(tmp_path),
        rewrite_module_tmp=f"{DOWN}.weight",
    )
    model, tokenizer = toy_model(), toy_tokenizer()
    with EditSession(model, tokenizer, requests, hparams, progress=False) as session:
        wordings, subjects = session.training_texts.wordings, session.training_texts.subjects
        sources = session._protection.filters.summary["sources"]
    [(moments, weights, with_first)] = seen
    assert with_first == {"sampled", "context"}
    assert weights == {"sampled": 1.0, **prepare._WEIGHTS}
    assert moments.keys() == weights.keys()
    near = prepare.neighbours_of(wordings, subjects, each=8, most=8 * 64, seed=hparams.seed).prompts
    own = [prompt for each in wordings for prompt in each]
    module = DOWN.format(hparams.layers[0])
    before = [
        k[:-1]
        for k in keys(model, module, prompt_ids(model, tokenizer, [*near, *own], PLAIN_ALONE))
    ]
    assert close(moments["context"], moment(before))
    assert sources["context"]["prompts"] == len(own)
    assert sources["sampled"]["prompts"] == len(asking)
