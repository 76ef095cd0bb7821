"""Records of more data sets, what EasyEdit's data set objects hold, and ROME's prompts."""

import pytest

from locft_easyedit.data.record_forms import as_requests, requests_in
from locft_easyedit.data.requests import distinct_edits, filled_in, make_requests
from locft_easyedit.errors import DataError

EDIT = {
    "prompt": "{} lies in",
    "subject": "Oslo",
    "target_new": {"str": "Peru"},
    "target_true": {"str": "Norway"},
    "question": "Where does {} lie?",
}


def read(*records):
    return requests_in(records, "The records")[0]


def part(prompts, answers, **aliases):
    return {"prompt": prompts, "ground_truth": answers, **aliases}


class DataSet:
    """A data set as PyTorch has them: items and a length, and no list."""

    def __init__(self, *records):
        self.records = records

    def __getitem__(self, index):
        return self.records[index]

    def __len__(self):
        return len(self.records)


def test_mquake_is_several_edits_and_its_questions_follow_the_last():
    other = {**EDIT, "subject": "Lima", "question": "Where is Lima?"}
    record = {
        "case_id": 7,
        "requested_rewrite": [EDIT, other],
        "questions": ["Which sea is near Oslo?", "Oslo is at which sea?"],
        "answer": "North Sea",
        "new_answer": "Pacific",
        "new_answer_alias": ["Pacific Ocean"],
    }
    first, last = read(record)
    assert (first["prompt"], first["target_new"], first["ground_truth"]) == (
        "Oslo lies in", "Peru", "Norway",
    )  # fmt: skip
    assert first["rephrase_prompt"] == "Where does Oslo lie?"
    assert first["portability"] == {}
    assert (last["prompt"], last["rephrase_prompt"]) == ("Lima lies in", "Where is Lima?")
    names = [["Pacific", "Pacific Ocean"]] * 2
    expected = part(record["questions"], ["Pacific", "Pacific"], aliases=names)
    assert last["portability"] == {"multi_hop": expected}
    assert requests_in([record], "The records", n=1)[0] == [first]


def test_cknowedit():
    record = {
        "prompt": "请解释如下成语：北京",
        "target_new": "新",
        "target_old": "旧",
        "rephrase": ["什么是北京？"],
        "portability": [{"prompt": "P", "answer": "A"}],
        "locality": [{}, {"prompt": "L", "answer": "B"}],
    }
    (request,) = read(record)
    assert (request["target_new"], request["ground_truth"]) == ("新", "旧")
    assert request["rephrase_prompt"] == "什么是北京？"
    assert request["portability"] == {"por_hop": part(["P"], ["A"])}
    assert request["locality"] == {"loc_hop": part(["L"], ["B"])}


def test_qaedit_and_plain_questions():
    qaedit = {
        "prompt": "Who wrote it?",
        "subject": "it",
        "rephrase": "Its author?",
        "target": "Ibsen",
        "locality": [{"loc": "Who ran?", "loc_ans": "Ada"}],
    }
    (request,) = read(qaedit)
    assert (request["target_new"], request["rephrase_prompt"]) == ("Ibsen", "Its author?")
    assert request["locality"] == {"neighborhood": part(["Who ran?"], ["Ada"])}
    (request,) = read({"question": "What helps?", "answer": ["Rest", "Sleep"]})
    assert (request["prompt"], request["target_new"]) == ("What helps?", "Rest")
    assert request["target_aliases"] == ["Rest", "Sleep"]
    assert "rephrase_prompt" not in request


# What EasyEdit's data set objects hold


def test_requests_are_returned_as_they_are():
    requests = make_requests(["a", "b"], ["c", "d"], rephrase_prompts=["e", "f"], subject=["", "g"])
    assert as_requests(requests) is requests
    assert as_requests("text") == "text"
    assert as_requests(DataSet(*requests)) == requests


def test_flat_records_of_a_data_set():
    record = {
        "case_id": 0,
        "prompt": "Oslo is in",
        "target_new": "Peru",
        "ground_truth": "Norway",
        "rephrase_prompt": "Where is Oslo?",
        "locality_prompt": "Bergen is in",
        "locality_ground_truth": "Norway",
        "cond": "Norway >> Peru || Oslo is in",
    }
    (request,) = as_requests(DataSet(record))
    assert request["locality"] == {"neighborhood": part(["Bergen is in"], ["Norway"])}
    assert request["rephrase_prompt"] == "Where is Oslo?"
    assert as_requests([record]) == [request]  # a list of them as well


def test_records_of_knowedit_and_wikibigedit_objects():
    knowedit = {
        "subject": "Oslo", "prompt": "Oslo is in", "target_new": "Peru", "ground_truth": "Norway",
        "portability_r": [{"prompt": "R", "ground_truth": [["A", "B"]]}],
        "portability_s": None, "portability_l": None,
        "locality_rs": [{"prompt": "L", "ground_truth": "C"}], "locality_f": None,
    }  # fmt: skip
    (request,) = as_requests(DataSet(knowedit))
    reasoning = part(["R"], ["A"], aliases=[["A", "B"]])
    assert request["portability"] == {"Reasoning": reasoning}
    assert request["locality"] == {"Relation_Specificity": part(["L"], ["C"])}
    wikibigedit = {
        "subject": "Oslo", "prompt": "Where is it?", "target_new": "Peru", "rephrase": "Its place?",
        "portability_personas": "Arr, where?", "portability_hop": None, "portability_hop_ans": None,
        "locality": "Where is Bergen?", "locality_ans": "Norway",
    }  # fmt: skip
    (request,) = as_requests(DataSet(wikibigedit))
    assert request["rephrase_prompt"] == "Its place?"
    assert request["portability"] == {"personas": part(["Arr, where?"], ["Peru"])}
    assert request["locality"] == {"neighborhood": part(["Where is Bergen?"], ["Norway"])}


def test_a_record_that_cannot_be_read_has_its_number():
    good = {"prompt": "a", "target_new": "b", "locality_prompt": "c", "locality_ground_truth": "d"}
    bad = {**good, "locality_rs": [{"prompt": "e"}]}
    with pytest.raises(DataError, match=r"The records:\n.*record 1 .*lacks 'answer'"):
        as_requests(DataSet(good, bad))


# ROME's prompts


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("{} lies in", "Oslo", "Oslo lies in"),
        ("In Python, {} is", "Python", "In Python, {} is"),  # it names its subject
        ("{} and {} are", "Oslo", "{} and {} are"),
        ("{0} is {x}", "Oslo", "{0} is {x}"),
        ("{} is {:>2000000000}", "Oslo", "Oslo is {:>2000000000}"),
        ("{} lies in", "{0.__class__}", "{0.__class__} lies in"),
        ("{} lies in", None, "{} lies in"),
        ("{} lies in", " ", "{} lies in"),
    ],
)
def test_the_subject_takes_the_place_of_the_braces(prompt, subject, expected):
    assert filled_in(prompt, subject) == expected


def test_every_entry_fills_them_in():
    request = {**EDIT, "target_new": "Peru", "rephrase_prompt": "Where is {}?"}
    for requests in (
        make_requests(EDIT["prompt"], "Peru", subject="Oslo"),
        read(request),
        as_requests([{**request, "target_new": {"str": "Peru"}}]),
    ):
        assert requests[0]["prompt"] == "Oslo lies in"
    assert distinct_edits([request]).edits[0].prompt == "Oslo lies in"
    assert request["prompt"] == "{} lies in"
