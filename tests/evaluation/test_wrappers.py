"""Edits asked in wrappers and in chat, against naive code that renders and decodes each prompt."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.toys import FEW_KINDS, N_LAYERS, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.data.forms import CONTEXTS
from locft_easyedit.data.requests import make_requests
from locft_easyedit.distributed.world import SINGLE_PROCESS
from locft_easyedit.evaluation import divergence
from locft_easyedit.evaluation.answers import contains_any, matches_any
from locft_easyedit.evaluation.divergence import BeforeEdit
from locft_easyedit.evaluation.evaluation import Evaluation, PairedMetrics, shared_evaluation
from locft_easyedit.evaluation.generated import finish_generated_
from locft_easyedit.evaluation.metric_names import DEFAULT_METRICS
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.report import metrics_table
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.evaluation.wrapped import Wrapped
from locft_easyedit.evaluation.wrappers import (
    EARLIER,
    NAMES,
    PLEASE,
    QUOTED,
    SENTENCE,
    SYSTEM,
    wrappers_for,
)
from locft_easyedit.modeling.places import find_layers
from locft_easyedit.prefix.cut import layer_cut

# Short, for the context of a toy. A turn ends with "#", which is not the end of the sequence.
CHATS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}#{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATS
)
LAST_TURN_ALONE = (
    "{{ bos_token }}u:{{ messages[-1]['content'] if messages[-1]['role'] == 'user' else "
    "messages[-2]['content'] + '#a:' + messages[-1]['content'] + '#' }}"
    "{% if add_generation_prompt %}#a:{% endif %}"
)
N_NEW = 8
FULL = {"max_position_embeddings": 1024}
# Measured for divergences above 1e-3, as these are: rounding to float16 moves them by 1.3e-3.
KL_TOLERANCE = {"rel": 2e-3, "abs": 2e-6}


def tokenizer_with(template=CHATS, **options):
    tokenizer = toy_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


def model_of(kind="llama", **changes):
    long = {"n_positions": 1024} if kind in ("gpt2", "gptj") else FULL
    return toy_model(kind, **long, **changes)


def wrapped(model, tokenizer, records, how=None, **options):
    return Wrapped(model, tokenizer, records, how or EvalConfig(5), max_new_tokens=N_NEW, **options)


@torch.no_grad()
def edit_(model):
    """An edit of the last layer, strong enough to change answers."""
    for name, parameter in model.named_parameters():
        if f".{N_LAYERS - 1}." in name and parameter.ndim >= 2:
            parameter.mul_(-0.5)


def as_json(value):
    return json.dumps(value, sort_keys=True)


# The naive code


def chat_text(prompt, system=None, earlier=()):
    text = "<s>"
    if system:
        text += f"s:{system}#"
    for turn in earlier:
        text += f"u:{turn.question}#a:{turn.answer}#"
    return f"{text}u:{prompt}#a:"


def naive_texts(prompt):
    """Wrapper -> the text, and whether the special tokens are in it."""
    return {
        "please": (f"Please answer the question: Q: {prompt} A:", False),
        "sentence": (SENTENCE.replace("{prompt}", prompt), False),
        "quoted": (QUOTED.replace("{prompt}", prompt), False),
        "chat": (chat_text(prompt), True),
        "chat_system": (chat_text(prompt, system=SYSTEM), True),
        "chat_later": (chat_text(prompt, earlier=EARLIER), True),
    }


@torch.no_grad()
def naive_ids(tokenizer, text, in_chat):
    return tokenizer(text, add_special_tokens=not in_chat)["input_ids"]


@torch.no_grad()
def naive_answer(model, tokenizer, text, in_chat):
    """One prompt, one token at a time, without a cache."""
    ids = naive_ids(tokenizer, text, in_chat)
    n_prompt = len(ids)
    ends = {tokenizer.eos_token_id}
    if in_chat:
        ends |= {tokenizer.convert_tokens_to_ids("#")}
    while len(ids) < n_prompt + N_NEW:
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    answer = tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)
    return answer.split(".")[0].split("\n")[0].strip()


@torch.no_grad()
def naive_log_probabilities(model, tokenizer, text, in_chat):
    ids = naive_ids(tokenizer, text, in_chat)
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    return logits - logits.exp().sum().log()


def naive_metrics(model, tokenizer, record):
    answers = {
        name: naive_answer(model, tokenizer, *asked)
        for name, asked in naive_texts(record["prompt"]).items()
    }
    target = record["target_new"]
    right = {
        name: float(
            contains_any(answer, [target]) if name == "quoted" else matches_any(answer, [target])
        )
        for name, answer in answers.items()
    }
    chats = [right[name] for name in ("chat", "chat_system", "chat_later")]
    reworded = naive_answer(model, tokenizer, chat_text(record["rephrase_prompt"]), True)
    return {
        "reliability": np.mean([*right.values()]),
        "chat_reliability": np.mean(chats),
        "chat_contains_target": np.mean(
            [
                contains_any(answers[name], [target])
                for name in ("chat", "chat_system", "chat_later")
            ]
        ),
        "reliability_in": right,
        "answers": answers,
        "chat_generalization": float(matches_any(reworded, [target])),
        "chat_rephrase_answers": [reworded],
        "chat_locality_answers": {
            "neighborhood": [
                naive_answer(model, tokenizer, chat_text(prompt), True)
                for prompt in record["locality"]["neighborhood"]["prompt"]
            ]
        },
    }


def with_lists(records):
    """Locality with one prompt a record, as a list."""
    for record in records:
        entry = record["locality"]["neighborhood"]
        for key in ("prompt", "ground_truth"):
            entry[key] = [entry[key]] if isinstance(entry[key], str) else entry[key]
    return records


# The texts


def test_the_wrappers_are_no_trained_forms():
    trained = {*CONTEXTS, "Question: {prompt}\nAnswer:"}
    for frame in (PLEASE, SENTENCE, QUOTED):
        assert frame not in trained
        assert frame.replace("{prompt}", "").strip() not in trained


def test_the_texts_that_are_asked():
    prompt = "Who {or what} wrote it?"  # braces are text
    found = {w.name: w.ask(f" {prompt} ", "Ibsen") for w in wrappers_for(tokenizer_with())}
    assert {name: (one.text, not one.special_tokens) for name, one in found.items()} == naive_texts(
        prompt
    )
    assert tuple(found) == NAMES
    assert found["please"].answer == " Ibsen"
    assert found["quoted"].answer == found["chat"].answer == "Ibsen"


# Answers


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_answers_are_the_naive_ones(kind):
    model, tokenizer = model_of(kind), tokenizer_with(bos=True)
    records = with_lists(toy_requests(4))
    for i, record in enumerate(records[:2]):  # some are right: the model's own answers
        record["target_new"] = naive_answer(
            model, tokenizer, *naive_texts(record["prompt"])["chat" if i else "please"]
        )
    records = [record for record in records if record["target_new"].strip()]
    expected = [naive_metrics(model, tokenizer, record) for record in records]
    assert any(one["reliability"] for one in expected)
    for batch_size in (1, 7):
        found = wrapped(model, tokenizer, records, EvalConfig(batch_size)).measure("")
        assert found == expected


def test_the_frozen_prefix_batches_and_some_of_the_records_change_nothing():
    model, tokenizer, records = model_of(), tokenizer_with(), toy_requests(5)
    frozen = layer_cut(find_layers(model), N_LAYERS - 1)
    shared = wrapped(model, tokenizer, records, EvalConfig(4, frozen=frozen))
    plain = wrapped(model, tokenizer, records, EvalConfig(3))
    assert as_json(shared.measure("")) == as_json(plain.measure(""))
    edit_(model)
    after, again = shared.measure(""), plain.measure("")
    for one, other in zip(after, again, strict=True):
        for key in ("locality_kl", "chat_locality_kl"):
            assert one.pop(key) == pytest.approx(other.pop(key), **KL_TOLERANCE)
    assert as_json(after) == as_json(again)
    some = shared.measure("", only=[3, 1])
    assert [one["answers"] for one in some] == [after[3]["answers"], after[1]["answers"]]
    assert all(one["locality_kl"] > 0 for one in some)


def test_the_end_of_a_turn_ends_an_answer_in_chat_alone():
    model, tokenizer = model_of(), tokenizer_with()
    (record,) = make_requests(["The capital of Norway is"], ["Oslo"])
    mark = tokenizer.convert_tokens_to_ids("#")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for layer in model.model.layers:  # the last token alone decides
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=-1)
        for last, following in ((":", "O"), ("O", "s"), ("s", "#"), ("#", "l")):
            ids = [tokenizer.convert_tokens_to_ids(token) for token in (last, following)]
            model.lm_head.weight[ids[1]] += embeddings[ids[0]]
    (found,) = wrapped(model, tokenizer, [record], names=["please", "chat"]).measure("")
    assert found["answers"]["chat"] == "Os"
    assert found["answers"]["please"].startswith("Os#l")
    assert mark != tokenizer.eos_token_id


# What a tokenizer has no text for


def test_a_tokenizer_without_a_template():
    model, tokenizer, records = model_of(), toy_tokenizer(), toy_requests(2)
    found = wrapped(model, tokenizer, records).measure("")
    for one in found:
        assert tuple(one["reliability_in"]) == ("please", "sentence", "quoted")
        assert not [key for key in one if key.startswith("chat")]
    evaluation = Evaluation(model, tokenizer, records, metrics=["wrapped"])
    before = evaluation.measure()
    edit_(model)
    after = summarize(PairedMetrics(records, before, evaluation.measure()))["post"]["wrapped"]
    assert after["locality_kl"] > 0
    assert "chat_locality" not in after


@pytest.mark.parametrize(
    ("template", "left_out"),
    [(NO_SYSTEM, ["chat_system"]), (LAST_TURN_ALONE, ["chat_system", "chat_later"])],
)
def test_a_template_that_does_not_take_it_all(template, left_out, caplog):
    model, records = model_of(), toy_requests(2)
    measured = wrapped(model, tokenizer_with(template), records)
    assert caplog.text.count("does not take what these wrappers say") == 1
    assert f"question: {', '.join(left_out)}." in caplog.text
    expected = [name for name in NAMES if name not in left_out]
    for one in measured.measure(""):
        assert list(one["reliability_in"]) == expected
        assert one["reliability"] == np.mean([*one["reliability_in"].values()])
        chats = [one["reliability_in"][name] for name in expected if name.startswith("chat")]
        assert one["chat_reliability"] == np.mean(chats)
    assert caplog.text.count("does not take what these wrappers say") == 1


def test_a_template_that_cannot_be_rendered(caplog):
    names = [w.name for w in wrappers_for(tokenizer_with("{{ raise_exception('never') }}"))]
    assert names == ["please", "sentence", "quoted"]
    assert "Nothing is measured in chat" in caplog.text


def test_a_prompt_that_does_not_fit_is_not_asked(caplog):
    tokenizer, records = tokenizer_with(), toy_requests(2)
    texts = naive_texts(records[1]["prompt"])
    longest = max(len(naive_ids(tokenizer, *asked)) for asked in texts.values())
    model = toy_model(max_position_embeddings=longest + N_NEW - 1)
    found = wrapped(model, tokenizer, records[1:]).measure("")[0]
    assert len(found["reliability_in"]) == len(NAMES) - 1
    assert "1 of 8 prompts in wrappers leave no room for 8 tokens" in caplog.text


# Locality


def test_divergence_is_that_of_a_plain_softmax():
    model, tokenizer, records = model_of(), tokenizer_with(), toy_requests(3)
    for record in records:
        record["locality"]["more"] = {"prompt": ["The river is", "Oslo"], "ground_truth": "it"}
    del records[2]["locality"]

    def asked(record, in_chat):
        prompts = (
            [*record["locality"]["neighborhood"]["prompt"]]
            if isinstance(record["locality"]["neighborhood"]["prompt"], list)
            else [record["locality"]["neighborhood"]["prompt"]]
        )
        prompts += record["locality"]["more"]["prompt"]
        return [
            naive_log_probabilities(model, tokenizer, chat_text(p) if in_chat else p, in_chat)
            for p in prompts
        ]

    ways = {"locality_kl": False, "chat_locality_kl": True}
    measured = wrapped(model, tokenizer, records)
    first = measured.measure("")
    assert not any(key in one for one in first for key in ways)
    unchanged = measured.measure("")
    assert [one.get("locality_kl") for one in unchanged] == [0.0, 0.0, None]
    before = [{key: asked(r, chat) for key, chat in ways.items()} for r in records[:2]]
    edit_(model)
    after = measured.measure("")
    for record, pre, found in zip(records[:2], before, after[:2], strict=True):
        for key, in_chat in ways.items():
            pairs = zip(pre[key], asked(record, in_chat), strict=True)
            expected = np.mean([float((p.exp() * (p - q)).sum()) for p, q in pairs])
            assert expected > 1e-3
            assert found[key] == pytest.approx(expected, **KL_TOLERANCE)
    assert "locality_kl" not in after[2]


def test_impossible_tokens_and_logits_that_are_no_numbers():
    model, tokenizer, records = model_of(), tokenizer_with(), toy_requests(2)
    impossible = torch.zeros(len(tokenizer))
    impossible[7] = -math.inf
    handle = model.lm_head.register_forward_hook(lambda *args: args[2] + impossible)
    measured = wrapped(model, tokenizer, records)
    measured.measure("")
    edit_(model)
    assert all(one["locality_kl"] > 0 for one in measured.measure(""))
    handle.remove()
    assert all(math.isfinite(one["locality_kl"]) for one in measured.measure(""))
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    pre = {"reliability": 0.0, "chat_locality_answers": {"neighborhood": [""]}}
    for one in measured.measure(""):
        finish_generated_(pre, one, "chat_")
        figures = ("reliability", "chat_reliability", "locality_kl", "chat_locality_kl")
        assert all(math.isnan(one[key]) for key in (*figures, "chat_locality"))
        assert all(math.isnan(value) for value in one["reliability_in"].values())


def test_a_part_of_many_locality_prompts_is_drawn(monkeypatch):
    monkeypatch.setattr(divergence, "MOST_PROMPTS", 3)
    model, tokenizer, records = model_of(), tokenizer_with(), toy_requests(8)
    before = BeforeEdit(records)
    assert sum(map(len, before.drawn.values())) == 3
    assert BeforeEdit(records).drawn == before.drawn
    measured = wrapped(model, tokenizer, records, before=before)
    measured.measure("")
    assert before.log_probabilities.shape == (6, len(tokenizer))
    assert before.log_probabilities.dtype == torch.float16
    edit_(model)
    whole = measured.measure("")
    assert [i for i, one in enumerate(whole) if "locality_kl" in one] == sorted(before.drawn)
    # A share of the records has the figures of the whole.
    own = sorted(before.drawn)[1:] + [i for i in range(8) if i not in before.drawn][:1]
    share = BeforeEdit(records)
    wrapped(model_of(), tokenizer, [records[i] for i in own], numbers=own, before=share).keep("")
    part = wrapped(model, tokenizer, [records[i] for i in own], numbers=own, before=share)
    for i, one in zip(own, part.measure(""), strict=True):
        assert ("locality_kl" in one) == (i in before.drawn)
        if i in before.drawn:
            assert one["locality_kl"] == pytest.approx(whole[i]["locality_kl"], **KL_TOLERANCE)


def test_another_vocabulary_has_no_divergence(caplog):
    tokenizer, records = tokenizer_with(), toy_requests(1)
    before = BeforeEdit(records)
    wrapped(model_of(), tokenizer, records, before=before).keep("")
    other = model_of(vocab_size=len(tokenizer) + 8)
    (found,) = wrapped(other, tokenizer, records, before=before).measure("")
    assert "locality_kl" not in found
    assert "another vocabulary" in caplog.text


# Before and after an edit


def test_means_and_the_table():
    model, tokenizer, records = model_of(), tokenizer_with(), toy_requests(3)
    evaluation = shared_evaluation(
        SINGLE_PROCESS, model, tokenizer, records, EvalConfig(), metrics=["wrapped"]
    )
    before = evaluation.measure("before")
    edit_(model)
    paired = list(PairedMetrics(records, before, evaluation.measure("after")))
    posts = [entry["post"]["wrapped"] for entry in paired]
    summary = summarize(paired)
    found = summary["post"]["wrapped"]
    assert set(found) == {
        "reliability", "reliability_in", "chat_reliability", "chat_contains_target",
        "chat_generalization",
        "chat_locality", "locality_kl", "chat_locality_kl",
    }  # fmt: skip
    assert found["reliability"] == np.mean([one["reliability"] for one in posts])
    assert set(found["reliability_in"]) == set(NAMES)
    for name, mean in found["reliability_in"].items():
        assert mean == np.mean([one["reliability_in"][name] for one in posts])
    for entry in paired:
        pre, post = (
            entry[phase]["wrapped"]["chat_locality_answers"]["neighborhood"]
            for phase in ("pre", "post")
        )
        assert entry["post"]["wrapped"]["chat_locality"] == float(matches_any(pre[0], [post[0]]))
    labels = [str(cell) for cell in metrics_table(summary).columns[0].cells]
    assert "reliability in chat (mean)" in labels
    assert "  reliability in `chat_later`" in labels


def test_metrics_that_are_read_from_a_file_are_compared_all_the_same():
    model, tokenizer, records = model_of(), tokenizer_with(), toy_requests(2)
    whole, resumed = (Evaluation(model, tokenizer, records, metrics=["wrapped"]) for _ in range(2))
    whole.measure()
    resumed.keep()
    edit_(model)
    assert as_json(whole.measure()) == as_json(resumed.measure())


def test_wrappers_are_measured_by_default_and_can_be_left_out():
    model, tokenizer, records = model_of(), tokenizer_with(), toy_requests(1)
    assert "wrapped" in DEFAULT_METRICS
    (found,) = Evaluation(model, tokenizer, records, metrics=["accuracy", "generated"]).measure()
    assert "wrapped" not in found
