"""Answers that are not generated to their end: what counts stays the same."""

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_model, toy_requests, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from locft_easyedit.evaluation.answers import Verdicts, inner_stops, matches_any, up_to_stop
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS, Evaluation, PairedMetrics
from locft_easyedit.evaluation.generated import Generated
from locft_easyedit.evaluation.greedy_decoder import GreedyDecoder
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.prompts import Questions
from locft_easyedit.evaluation.summary import summarize

FIGURES = ("reliability", "generalization", "portability", "locality")


def verdicts_of(target):
    records = [{"prompt": "The sea is", "target_new": target}]
    return Verdicts(Questions(records), records, [{}])


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("", True),
        ("Lake", True),
        ("the lake", True),
        ("The", True),
        ("LAKE, C", True),
        ("lake co", True),
        ("lakeco", True),  # a tokenizer may yet put the space there
        ("lake \ufffd", True),  # a character that is not complete
        ("lake d", False),
        ("river", False),
        ("lake como is", False),
        ("in lake", False),
    ],
)
def test_what_may_still_count(text, is_open):
    assert verdicts_of("Lake Como").open(0, text) is is_open


words = st.text(st.sampled_from("aAnNtThHeE ΟΣς.-'é日 b"), max_size=12)


@given(answer=words, target=words, data=st.data())
def test_an_answer_that_counts_is_open_at_every_point(answer, target, data):
    text = data.draw(st.sampled_from([answer, target, f"the {target}", target.upper()]))
    text = up_to_stop(text, inner_stops([target]))  # there decoding ends
    if target.strip() and matches_any(text, [target]):
        verdicts = verdicts_of(target)
        assert all(verdicts.open(0, text[:end]) for end in range(len(text) + 1))


def trained(model):
    """Moves the model, so that some answers change and others do not."""
    torch.manual_seed(1)
    parameter = dict(model.named_parameters())[DOWN_PROJECTION["llama"].format(2)]
    with torch.no_grad():
        parameter.add_(0.005 * torch.randn_like(parameter))


@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_figures_are_those_of_whole_answers(batch_size, monkeypatch):
    model, tokenizer = toy_model("llama"), toy_tokenizer(pad_is_eos=True)
    requests = toy_requests(6)
    # What the model says already counts as right for some: else nothing would ever count.
    told = Generated(model, tokenizer, requests, EvalConfig()).measure("before")
    for request, found in zip(requests, told, strict=True):
        request["target_new"] = found["answer"] or "x"
        request["portability"]["one_hop"]["ground_truth"] = (
            found["portability_answers"]["one_hop"][0] or "x"
        )
    how = EvalConfig(batch_size)
    before = Evaluation(model, tokenizer, requests, how, metrics=PLAIN_METRICS).measure("before")
    trained(model)

    n_asked = []
    original = GreedyDecoder._pick

    def pick(self, logits, *args):
        n_asked[-1] += len(logits)
        return original(self, logits, *args)

    monkeypatch.setattr(GreedyDecoder, "_pick", pick)
    summaries = []
    for against in (None, before):
        n_asked.append(0)
        evaluation = Evaluation(
            model, tokenizer, requests, how, metrics=PLAIN_METRICS, before=against
        )
        after = evaluation.measure("after")
        summaries.append(summarize(PairedMetrics(requests, before, after))["post"]["generated"])
    whole, cut = summaries
    assert {name: cut[name] for name in FIGURES} == {name: whole[name] for name in FIGURES}
    assert 0 < whole["reliability"] < 1
    assert 0 < whole["locality"] < 1
    assert "contains_target" in whole
    assert not {"contains_target", "old_answer"} & set(cut)
    assert n_asked[1] < 0.7 * n_asked[0]


def test_answers_before_the_edit_must_be_there():
    records = toy_requests(2)
    with pytest.raises(ValueError, match="2 records, 1 measured before"):
        Verdicts(Questions(records), records, [{}])
    with pytest.raises(ValueError, match="request 0, locality 'neighborhood': its answers before"):
        Verdicts(Questions(records), records, [{}, {}])
