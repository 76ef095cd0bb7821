"""Forms of a prompt: what they look like, how they are tokenized, and their training."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.toys import (
    CHAT_TEMPLATE,
    DOWN_PROJECTION,
    toy_chat_tokenizer,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)
from torch.nn import functional as F

from locft_easyedit.api import edit_model
from locft_easyedit.data.forms import CONTEXTS, ChatTemplate, Forms, Turn, ways_of
from locft_easyedit.data.requests import Edit, distinct_edits
from locft_easyedit.data.tokenization import Asked, asked_ids, tokenize_asked
from locft_easyedit.data.training_texts import TrainingTexts
from locft_easyedit.errors import HyperParamsError, ModelError, RequestError
from locft_easyedit.hparams_rules import CHAT, CONTEXT, PLAIN, QUESTION_ANSWER

WRAPPED = [CHAT, QUESTION_ANSWER, CONTEXT]
# Measured: 3e-6; rounding of packed rows.
LOSS_TOLERANCE = 1e-5


def test_a_conversation_is_rendered_up_to_its_answer():
    template = ChatTemplate(toy_chat_tokenizer())
    assert template.ask("Who?") == ("<s>system\nBe kind.</s>\n<s>user\nWho?</s>\n<s>assistant\n")
    assert template.ask("Who?", system="Be brief.", earlier=[Turn("Hi", "Hello")]) == (
        "<s>system\nBe brief.</s>\n<s>user\nHi</s>\n<s>assistant\nHello</s>\n"
        "<s>user\nWho?</s>\n<s>assistant\n"
    )
    assert template.before_question() == "<s>system\nBe kind.</s>\n<s>user\n"
    assert template.lead == ""


@pytest.mark.parametrize(
    ("end", "expected"),
    [("</s>\n", "</s>"), (" </s>", "</s>"), ("<s>", "<s>"), ("", "</s>"), ("\n", "\n")],
)
def test_the_token_that_ends_a_turn_is_the_first_behind_the_answer(end, expected):
    template = CHAT_TEMPLATE.replace("</s>\n{% endfor", end + "{% endfor")
    tokenizer = toy_chat_tokenizer(template)
    [wanted] = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert ChatTemplate(tokenizer).end_of_turn == wanted


def test_white_space_that_a_template_puts_before_an_answer_is_kept():
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert ChatTemplate(toy_chat_tokenizer(template)).lead == " "


def test_thinking_is_off_where_a_template_has_a_switch_for_it():
    switch = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    template = ChatTemplate(toy_chat_tokenizer(CHAT_TEMPLATE + switch))
    assert "<think>" not in template.ask("Who?")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no users here') }}", "with the roles user.*no users here"),
        ("{{ messages[0]['content'] ", "cannot be rendered"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "leaves out the question or the"),
    ],
)
def test_a_template_of_no_use_is_told(template, message):
    with pytest.raises(ModelError, match=message):
        ChatTemplate(toy_chat_tokenizer(template))


def test_roles_that_a_template_does_not_take_are_named():
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = ChatTemplate(toy_chat_tokenizer(no_system + CHAT_TEMPLATE))
    with pytest.raises(ModelError, match="with the roles system, user"):
        template.ask("Who?", system="Be brief.")


def test_each_form_puts_the_prompt_where_it_is_asked():
    forms = Forms(toy_chat_tokenizer(), WRAPPED)
    found = forms.all_of("The capital of Norway is", " Oslo", 7)
    plain, chat, question, one, two, asked, system, earlier = found
    assert len(forms) == len(found) == len(ways_of(WRAPPED))
    assert plain == Asked("The capital of Norway is", " Oslo")
    assert chat.text.endswith("<s>user\nThe capital of Norway is</s>\n<s>assistant\n")
    for in_chat in (chat, system, earlier):
        assert (in_chat.answer, in_chat.special_tokens) == ("Oslo", False)
        assert in_chat.end == forms.chat.end_of_turn
        assert in_chat.text.endswith("<s>user\nThe capital of Norway is</s>\n<s>assistant\n")
    assert question == Asked("Question: The capital of Norway is\nAnswer:", " Oslo")
    for text, end, n_sentences in ((one, plain, 1), (two, plain, 2), (asked, question, 1)):
        assert text.answer == " Oslo"
        before = text.text.removesuffix(end.text)
        assert before != text.text
        assert sum(sentence in before for sentence in CONTEXTS) == n_sentences
    assert any(f"system\n{sentence}</s>" in system.text for sentence in CONTEXTS)
    assert "Be kind." not in system.text
    assert earlier.text.count("assistant") == 2
    assert one == forms.ask(3, "The capital of Norway is", "Oslo", 7)
    others = {forms.ask(3, "x", "y", i).text for i in range(20)}
    assert len(others) > 5


def test_forms_without_each_other():
    tokenizer = toy_chat_tokenizer()
    lengths = {name: len(Forms(tokenizer, [name])) for name in WRAPPED}
    assert lengths == {CHAT: 2, QUESTION_ANSWER: 2, CONTEXT: 3}
    assert len(Forms(tokenizer, [])) == 1


def test_what_a_template_does_not_take_is_not_asked():
    deaf = "{% for m in messages if m.role != 'system' %}<s>{{ m.content }}</s>{% endfor %}<s>"
    forms = Forms(toy_chat_tokenizer(deaf), WRAPPED)
    assert len(forms) == len(ways_of(WRAPPED)) - 1
    assert sum("user" in one.text for one in forms.all_of("Who?", "Ann")) == 0


@pytest.mark.parametrize("options", [{}, {"bos": True}, {"bos": True, "eos": True}], ids=str)
def test_special_tokens_are_added_where_the_text_has_none(options):
    tokenizer = toy_chat_tokenizer(**options)
    asked = Forms(tokenizer, [CHAT]).all_of("Who?", "Ann", 0)
    texts = tokenize_asked(tokenizer, asked)
    plain, chat = (texts.ids[a:b].tolist() for a, b in pairwise(texts.offsets))
    assert plain.count(tokenizer.bos_token_id) == int(options.get("bos", False))
    assert plain[-1] == chat[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(chat) == asked[1].text + "Ann</s>"
    heads = asked_ids(tokenizer, asked)
    for i, head in enumerate(heads):
        start = texts.offsets[i]
        assert texts.ids[start : start + len(head)].tolist() == head
        assert len(head) == texts.target_start[i]


def test_no_end_is_appended_where_none_is_wanted():
    tokenizer = toy_chat_tokenizer()
    asked = Forms(tokenizer, [CHAT]).all_of("Who?", "Ann", 0)
    texts = tokenize_asked(tokenizer, asked, append_end=False)
    ends = [tokenizer.decode([texts.ids[end - 1]]) for end in texts.offsets[1:]]
    assert "</s>" not in ends


def naive_losses(model, tokenizer, asked):
    """Returns the loss of each text, which runs alone."""
    losses = []
    for one in asked:
        special = {"add_special_tokens": one.special_tokens}
        ids = tokenizer(one.text + one.answer, **special)["input_ids"]
        n_text = len(tokenizer(one.text, **special)["input_ids"])
        ids.append(tokenizer.eos_token_id if one.end is None else one.end)
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[n_text - 1 : -1], torch.tensor(ids[n_text:])))
    return losses


@pytest.mark.parametrize("each", [1, 3])
def test_training_in_forms_is_that_of_plain_code(each):
    tokenizer, requests = toy_chat_tokenizer(), toy_requests(7)
    requests[2]["rewordings"] = ["Which one was it?", "Name it."]
    hparams = toy_hparams(
        forms=WRAPPED, forms_per_epoch=each, num_steps=3, batch_size=4, lr=1e-3, row_tokens=40
    )
    edits = distinct_edits(requests).edits
    made = TrainingTexts.tokenize(tokenizer, edits, [None] * 7, hparams, 256)
    plain = toy_model("llama").eval()
    name = DOWN_PROJECTION["llama"].format(hparams.layers[0])
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    parameter = plain.get_parameter(name).requires_grad_(True)
    adam = torch.optim.Adam([parameter], lr=hparams.lr, foreach=False, fused=False)
    generator = torch.Generator().manual_seed(hparams.seed)
    forms, turn, expected = Forms(tokenizer, WRAPPED), made.variants.turn, []
    for epoch in range(hparams.num_steps):
        order = torch.randperm(7, generator=generator).tolist()
        for batch in (order[:4], order[4:]):
            asked = []
            for i in batch:
                own, *others = forms.all_of(edits[i].prompt, edits[i].target, i)
                # The first rewording is asked plainly, the second in the first other form.
                others += [
                    forms.ask(form, text, edits[i].target, i)
                    for form, text in enumerate(edits[i].rewordings)
                ]
                first = int(turn[i]) + epoch * each
                asked += [own, *(others[(first + k) % len(others)] for k in range(each))]
            adam.zero_grad()
            loss = torch.stack(naive_losses(plain, tokenizer, asked)).mean()
            loss.backward()
            adam.step()
            expected.append(loss.item())
    result = edit_model(toy_model("llama"), tokenizer, requests, hparams, progress=False)
    assert result.step_losses == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert result.summary()["augmented"]["forms"] == [PLAIN, *WRAPPED]
    assert result.summary()["augmented"]["rewordings"] == 2


def test_a_form_that_is_too_long_is_left_out_and_counted():
    tokenizer, edits = toy_chat_tokenizer(), distinct_edits(toy_requests(4)).edits
    whole = TrainingTexts.tokenize(tokenizer, edits, [None] * 4, toy_hparams(forms=WRAPPED), 256)
    limit = int(np.sort(whole.texts.lengths)[-3])
    made = TrainingTexts.tokenize(tokenizer, edits, [None] * 4, toy_hparams(forms=WRAPPED), limit)
    dropped = int((whole.texts.lengths > limit).sum())
    assert made.summary["dropped_too_long"] == dropped > 0
    assert made.variants.first[-1] == 4 * 8 - dropped


def test_a_template_that_is_broken_is_told_and_the_other_forms_are_trained(caplog):
    tokenizer = toy_chat_tokenizer("{{ raise_exception('broken') }}")
    with caplog.at_level(logging.WARNING):
        made = TrainingTexts.tokenize(
            tokenizer, [Edit("Who?", "Ann", 0)], [None], toy_hparams(forms=WRAPPED), 256
        )
    assert made.forms.names == (QUESTION_ANSWER, CONTEXT)
    assert "without the form `chat`" in caplog.text
    assert "broken" in caplog.text


def test_chat_that_is_asked_for_without_a_template_is_refused():
    with pytest.raises(ModelError, match="has no chat template"):
        edit_model(toy_model(), toy_tokenizer(), toy_requests(3), toy_hparams(forms=[CHAT]))


@pytest.mark.parametrize("forms", [["letter"], ["chat", "chat"], [""]])
def test_forms_that_are_none_are_refused(forms):
    with pytest.raises(HyperParamsError, match=r"`forms=.*must be a list of plain, chat"):
        toy_hparams(forms=forms)


def test_rewordings_of_a_request_are_kept_without_those_that_give_the_target_away(caplog):
    request = {
        "prompt": "The capital of Norway is",
        "target_new": "Lyon",
        "rewordings": ["Norway's capital is", "Is it Lyon?", "Norway's capital is"],
    }
    found = distinct_edits([request, request | {"rewordings": ["Norway is run from"]}])
    assert found.edits[0].rewordings == ("Norway's capital is", "Norway is run from")
    assert found.n_giving_away == 1
    assert "1 rewordings hold the target" in caplog.text
    last = distinct_edits([request, request | {"rewordings": ["Norway is run from"]}], "last")
    assert last.edits[0].rewordings == ("Norway's capital is", "Norway is run from")
    for wrong in ("one", [3], [" "]):
        with pytest.raises(RequestError, match="request 0: `rewordings"):
            distinct_edits([request | {"rewordings": wrong}])
