"""Request dictionaries as EasyEdit makes them, and the distinct edits that they ask for."""

import copy
import logging
from collections import UserDict

import pytest

from locft_easyedit.data.requests import Edit, distinct_edits, make_requests
from locft_easyedit.errors import RequestError

PROMPTS = ["Oslo is in", "Torino plays in", "He speaks"]
TARGETS = ["Peru", "a park", "Faroese"]
LOCALITY = {
    "neighborhood": {
        "prompt": ["Bergen is in", None, ["I speak", "You speak"]],
        "ground_truth": ["Norway", None, ["Danish", "Dutch"]],
    },
    "distracting": {"prompt": ["a", "b", []], "ground_truth": ["A", "B", []]},
}
PORTABILITY = {"one_hop": {"prompt": ["x", "y", "z"], "ground_truth": ["X", "Y", "Z"]}}


def request(prompt="The sky is", target="green", **more):
    return {"prompt": prompt, "target_new": target, **more}


def pairs(edits):
    return [(edit.prompt, edit.target, edit.request) for edit in edits]


def test_plain_requests():
    assert make_requests(PROMPTS, TARGETS) == [
        {
            "prompt": prompt,
            "target_new": target,
            "ground_truth": None,
            "locality": {},
            "portability": {},
        }
        for prompt, target in zip(PROMPTS, TARGETS, strict=True)
    ]


def test_all_arguments():
    first, second, third = make_requests(
        PROMPTS,
        TARGETS,
        ground_truth=["Norway", None, "Danish"],
        target_neg=["n0", "n1", "n2"],
        rephrase_prompts=["r0", "r1", "r2"],
        locality_inputs=LOCALITY,
        portability_inputs=PORTABILITY,
        subject=["Oslo", "nowhere in the prompt", "He"],
        loc_prompts=["l0", "l1"],
    )
    assert first == {
        "prompt": "Oslo is in",
        "target_new": "Peru",
        "ground_truth": "Norway",
        "target_neg": "n0",
        "subject": "Oslo",
        "rephrase_prompt": "r0",
        "loc_prompt": "l0",
        "locality": {
            "neighborhood": {"prompt": "Bergen is in", "ground_truth": "Norway"},
            "distracting": {"prompt": "a", "ground_truth": "A"},
        },
        "portability": {"one_hop": {"prompt": "x", "ground_truth": "X"}},
    }
    assert second["subject"] == "nowhere in the prompt"
    assert second["ground_truth"] is None
    assert second["locality"] == {"distracting": {"prompt": "b", "ground_truth": "B"}}
    assert second["loc_prompt"] == "l1"
    lists = {"prompt": ["I speak", "You speak"], "ground_truth": ["Danish", "Dutch"]}
    assert third["locality"] == {"neighborhood": lists}
    assert third["loc_prompt"] == "l0"


def test_one_of_each_as_text():
    part = {"name": {"prompt": "p", "ground_truth": "g"}}
    (made,) = make_requests(
        "The sky is", "green", "blue", "red", "Above is", part, part, subject="sky", loc_prompts="l"
    )
    assert made == request(
        ground_truth="blue",
        target_neg="red",
        rephrase_prompt="Above is",
        subject="sky",
        loc_prompt="l",
        locality=part,
        portability=part,
    )


@pytest.mark.parametrize("kind", [tuple, iter])
def test_other_sequences_of_prompts(kind):
    made = make_requests(kind(PROMPTS), kind(TARGETS), rephrase_prompts=kind(["a", "b", "c"]))
    assert made == make_requests(PROMPTS, TARGETS, rephrase_prompts=["a", "b", "c"])


def test_no_prompts_make_no_requests():
    assert make_requests([], [], loc_prompts=["l"]) == []


def test_long_loc_prompts_are_cut():
    made = make_requests(PROMPTS, TARGETS, loc_prompts=list("abcde"))
    assert [one["loc_prompt"] for one in made] == ["a", "b", "c"]


def test_arguments_are_left_alone():
    locality = {"name": {"prompt": "p", "ground_truth": "g"}}
    arguments = {
        "prompts": ["The sky is"],
        "target_new": ["green"],
        "ground_truth": "blue",
        "locality_inputs": locality,
        "portability_inputs": {"hop": {"prompt": ["p"], "ground_truth": ["g"]}},
        "loc_prompts": ["a", "b"],
    }
    before = copy.deepcopy(arguments)
    make_requests(**arguments)[0]["locality"]["name"]["prompt"] = "changed"
    assert arguments == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"target_new": ["a"]}, "target_new: 1"),
        ({"target_new": "a"}, "target_new: 1"),
        ({"ground_truth": ["a", "b"]}, "ground_truth: 2"),
        ({"target_neg": []}, "target_neg: 0"),
        ({"subject": ["a"] * 4}, "subject: 4"),
        ({"rephrase_prompts": "a"}, "rephrase_prompts: 1"),
        ({"loc_prompts": []}, "loc_prompts: 0"),
        (
            {"locality_inputs": {"near": {"prompt": ["a"], "ground_truth": list("abc")}}},
            "locality_inputs['near']['prompt']: 1",
        ),
        (
            {"portability_inputs": {"hop": {"prompt": list("abc"), "ground_truth": []}}},
            "portability_inputs['hop']['ground_truth']: 0",
        ),
        (
            {"portability_inputs": {"hop": {"prompt": list("abc")}}},
            "portability_inputs['hop']['ground_truth']: missing",
        ),
    ],
)
def test_length_mismatch(arguments, line):
    with pytest.raises(RequestError, match="3 prompts, but lists of other lengths") as caught:
        make_requests(**{"prompts": PROMPTS, "target_new": TARGETS} | arguments)
    assert str(caught.value).split("\n")[1:] == [f"  - {line}"]


def test_all_length_mismatches_in_one_error():
    with pytest.raises(RequestError, match="3 prompts, but lists of other lengths") as caught:
        make_requests(
            PROMPTS,
            TARGETS[:2],
            ground_truth=["a"],
            subject=list("abcd"),
            rephrase_prompts=[],
            locality_inputs={"near": {"prompt": ["a"], "ground_truth": ["b", "c"]}},
        )
    keys = ["target_new: 2", "ground_truth: 1", "subject: 4", "rephrase_prompts: 0"]
    near = [f"locality_inputs['near']['{k}']: {n}" for k, n in (("prompt", 1), ("ground_truth", 2))]
    assert str(caught.value).split("\n")[1:] == [f"  - {line}" for line in keys + near]


def test_distinct_requests_stay_in_order():
    edits = distinct_edits(make_requests(PROMPTS, TARGETS))
    assert pairs(edits.edits) == list(zip(PROMPTS, TARGETS, range(3), strict=True))
    assert (edits.n_requests, edits.n_merged, edits.n_conflicts, edits.n_replaced) == (3, 0, 0, 0)


def test_duplicates_are_merged_whatever_their_other_keys():
    requests = [request(), request("b", "c"), request(subject="x"), request(), request(" b", "c")]
    edits = distinct_edits(requests)
    assert pairs(edits.edits) == [("The sky is", "green", 0), ("b", "c", 1), (" b", "c", 4)]
    assert (edits.n_requests, edits.n_merged, edits.n_conflicts, edits.n_replaced) == (5, 2, 0, 0)


def test_requests_are_left_alone_and_may_be_a_tuple_of_any_mapping():
    requests = (UserDict(request()), request("b", "c"))
    before = copy.deepcopy(requests)
    assert distinct_edits(requests).edits == [
        Edit("The sky is", "green", 0),
        Edit("b", "c", 1),
    ]
    assert requests == before


# Two prompts in conflict; "a" is asked for once more in between.
CONFLICTS = [
    request("p", "a"),
    request("q", "x"),
    request("p", "b"),
    request("only", "one"),
    request("p", "a"),
    request("q", "y"),
]


def test_conflicts_are_trained_with_one_warning(caplog):
    with caplog.at_level(logging.INFO, logger="locft_easyedit"):
        edits = distinct_edits(CONFLICTS)
    assert pairs(edits.edits) == [
        ("p", "a", 0),
        ("q", "x", 1),
        ("p", "b", 2),
        ("only", "one", 3),
        ("q", "y", 5),
    ]
    assert (edits.n_requests, edits.n_merged, edits.n_conflicts, edits.n_replaced) == (6, 1, 2, 0)
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    message = warning.getMessage()
    assert message.startswith("2 prompts come with different targets")
    assert "'p' -> 'a' (request 0), 'b' (request 2)" in message
    assert "1 requests repeat another one" in caplog.text


def test_conflicts_stop_with_all_of_them(caplog):
    with pytest.raises(RequestError, match="2 prompts come with different targets") as caught:
        distinct_edits(CONFLICTS, "error")
    assert "'p' -> 'a' (request 0), 'b' (request 2)" in str(caught.value)
    assert "'q' -> 'x' (request 1), 'y' (request 5)" in str(caught.value)
    assert not caplog.records


def test_last_target_of_a_conflict_is_kept(caplog):
    edits = distinct_edits(CONFLICTS, "last")
    # "a" was asked for again after "b": the latest mention counts.
    assert pairs(edits.edits) == [("only", "one", 3), ("p", "a", 4), ("q", "y", 5)]
    assert (edits.n_requests, edits.n_merged, edits.n_conflicts, edits.n_replaced) == (6, 1, 2, 2)
    assert not caplog.records


def test_conflicts_without_a_warning(caplog):
    assert distinct_edits(CONFLICTS, None) == distinct_edits(CONFLICTS, "train")
    caplog.clear()
    distinct_edits(CONFLICTS, None)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("on_conflict", ["train", "error", "last", None])
def test_without_conflicts_the_rule_changes_nothing(on_conflict, caplog):
    requests = [request(), request("b", "c"), request("d", "e")]
    edits = distinct_edits(requests, on_conflict)
    assert pairs(edits.edits) == [("The sky is", "green", 0), ("b", "c", 1), ("d", "e", 2)]
    assert not caplog.records


# "last" moves a merged request behind others: its order must still be the one of the list.
def test_merged_requests_keep_the_list_order_without_a_conflict():
    requests = [request("p", "a"), request("q", "x"), request("p", "a")]
    numbers = [edit.request for edit in distinct_edits(requests, "last").edits]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("requests", [[], ()])
def test_empty_list(requests):
    with pytest.raises(RequestError, match="The list of requests is empty"):
        distinct_edits(requests)


@pytest.mark.parametrize("requests", [request(), "text", b"text", None, 5, iter([request()])])
def test_no_list(requests):
    with pytest.raises(RequestError, match=r"requests is a .*must be a list of dictionaries"):
        distinct_edits(requests)


@pytest.mark.parametrize("key", ["prompt", "target_new"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "is blank"),
        (" \t\n\u00a0", "is blank"),
        (None, "is not a text"),
        (5, "is not a text"),
        (["Paris"], "is not a text"),
        (b"Paris", "is not a text"),
        ("Paris \ud83d", "holds a lone surrogate"),
    ],
)
def test_unusable_field(key, value, problem):
    with pytest.raises(RequestError, match="The requests cannot be trained") as caught:
        distinct_edits([request(), {**request(), key: value}])
    (line,) = str(caught.value).split("\n")[1:]
    assert line.startswith(f"  - request 1: `{key}={value!r}` {problem}")
    str(caught.value).encode("utf-8")  # what is wrong can be printed


def test_all_unusable_requests_in_one_error():
    requests = [{"prompt": "p"}, "text", request("", 5), request(), {}]
    with pytest.raises(RequestError, match="The requests cannot be trained") as caught:
        distinct_edits(requests)
    lines = str(caught.value).split("\n")[1:]
    starts = [f"  - request {i}" for i in (0, 1, 2, 2, 4, 4)]
    assert [line[: len(starts[0])] for line in lines] == starts


def test_many_problems_are_counted():
    with pytest.raises(RequestError, match="and 15 more of the kind"):
        distinct_edits([request(target="")] * 25)
