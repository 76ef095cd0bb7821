"""Requests of any shape: edits, or one error of the kind that says what to do."""

import pytest
from helpers.hostile import LEAVES, TEXTS, Deep, attempt, real, values
from helpers.toys import toy_model, toy_requests, toy_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locft_easyedit.data.requests import distinct_edits, make_requests, with_leading_space
from locft_easyedit.data.tokenization import tokenize_edits
from locft_easyedit.errors import RequestError
from locft_easyedit.evaluation.prompts import Questions

KEYS = st.sampled_from(
    ["prompt", "target_new", "ground_truth", "rephrase_prompt", "locality", "portability", "x"]
)
REQUESTS = st.lists(
    st.dictionaries(KEYS, values(KEYS), max_size=6)
    | st.fixed_dictionaries(
        {"prompt": TEXTS | LEAVES, "target_new": TEXTS | LEAVES},
        optional={"rephrase_prompt": values(KEYS), "locality": values(KEYS)},
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(REQUESTS | values(KEYS), st.sampled_from(["train", "last", "error", None]))
@example([{"prompt": Deep(5000), "target_new": "a"}], "train")
@example([{"prompt": "a" * 100_000, "target_new": 7}], "train")
@example([{"prompt": "a", "target_new": "b"}, {"prompt": "a", "target_new": "c" * 99_999}], "error")
def test_any_requests_are_edits_or_refused(requests, on_conflict):
    requests = real(requests)
    found, refused = attempt(RequestError, distinct_edits, requests, on_conflict)
    if refused:
        return
    assert found.n_requests == len(requests) == len(found.edit_of_request)
    for i, place in enumerate(found.edit_of_request):
        if place is not None:
            edit = found.edits[place]
            assert edit.prompt == requests[i]["prompt"]
            assert with_leading_space(edit.target) == with_leading_space(requests[i]["target_new"])
    texts = tokenize_edits(toy_tokenizer(), found.edits)  # what was accepted can be tokenized
    assert len(texts) == len(found.edits)


@settings(max_examples=150, deadline=None)
@given(REQUESTS)
@example([toy_requests(1)[0] | {"locality": {"a": {"prompt": "x", "ground_truth": "\ud800"}}}])
@example([toy_requests(1)[0] | {"locality": {"a": {"prompt": ["x"], "ground_truth": [None]}}}])
@example([toy_requests(1)[0] | {"portability": [1]}])
def test_any_requests_are_questions_or_refused(requests):
    questions, _ = attempt(RequestError, lambda: list(Questions(real(requests))))
    for question in questions or []:
        assert len(question.prompts) == len(question.answers)
        if question.prompts:  # the tokenizer itself takes no empty list
            toy_tokenizer()(question.prompts + question.answers)


ARGUMENTS = st.fixed_dictionaries(
    {"prompts": values() | st.lists(TEXTS, max_size=3), "target_new": values()},
    optional={
        "ground_truth": values(),
        "rephrase_prompts": values(),
        "subject": values(),
        "loc_prompts": values(),
        "locality_inputs": values(st.sampled_from(["a", "prompt", "ground_truth"])),
        "portability_inputs": values(st.sampled_from(["a", "prompt", "ground_truth"])),
    },
)


@settings(max_examples=150, deadline=None)
@given(ARGUMENTS)
@example({"prompts": ["a"], "target_new": ["b"], "locality_inputs": 5})
@example({"prompts": ["a"], "target_new": ["b"], "locality_inputs": {"n": 5}})
def test_any_arguments_of_the_editor_are_requests_or_refused(arguments):
    arguments = real(arguments)
    made, refused = attempt(RequestError, make_requests, **arguments)
    if refused:
        return
    prompts = arguments["prompts"]
    assert [r["prompt"] for r in made] == ([prompts] if isinstance(prompts, str) else list(prompts))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.text(min_size=1))
def test_what_was_given_comes_back(prompts, target):
    targets = [target + str(i) for i in range(len(prompts))]
    near = {"n": {"prompt": prompts, "ground_truth": targets}}
    made = make_requests(prompts, targets, locality_inputs=near)
    assert [r["prompt"] for r in made] == prompts
    assert [r["target_new"] for r in made] == targets
    assert [r["locality"]["n"]["ground_truth"] for r in made] == targets


def test_requests_are_refused_before_the_model_is_touched():
    from helpers.toys import toy_hparams

    from locft_easyedit.api import edit_model

    model = toy_model()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RequestError, match="request 1 is a list, not a dictionary"):
        edit_model(model, toy_tokenizer(), [*toy_requests(1), []], toy_hparams(), progress=False)
    assert all((a == b).all() for a, b in zip(model.parameters(), before, strict=True))
