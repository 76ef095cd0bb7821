"""Editing data: each published form becomes the same requests, and a bad file says where."""

import json
import math

import pytest

from locft_easyedit.data.readers import read_requests
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.errors import DataError


@pytest.fixture
def written(tmp_path):
    def write(content, name="data.json"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8")
        return path

    return write


def request(prompt, target, truth=None, *, locality=None, portability=None, **more):
    parts = {"locality": locality or {}, "portability": portability or {}}
    return {"prompt": prompt, "target_new": target, "ground_truth": truth, **parts, **more}


def part(prompts, answers, aliases=None):
    more = {} if aliases is None else {"aliases": aliases}
    return {"prompt": prompts, "ground_truth": answers, **more}


def near(*pairs):
    prompts, answers = zip(*pairs, strict=True)
    return {"neighborhood": part(list(prompts), list(answers))}


ZSRE = {
    "subject": "Oslo",
    "src": "Where is Oslo?",
    "rephrase": "Oslo, where is it?",
    "alt": "Peru",
    "answers": ["Norway", "Kingdom of Norway"],
    "loc": "nq question: who wrote it?",
    "loc_ans": "Ibsen",
    "cond": "Norway >> Peru",
}
ZSRE_REQUEST = request(
    "Where is Oslo?",
    "Peru",
    "Norway",
    subject="Oslo",
    rephrase_prompt="Oslo, where is it?",
    ground_truth_aliases=["Norway", "Kingdom of Norway"],
    locality=near(("nq question: who wrote it?", "Ibsen")),
)
HOP = {"New Question": "Which continent?", "New Answer": "America"}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Oslo",
    "update": "Where is Oslo?",
    "ans": "Peru",
    "rephrase": "Oslo, where is it?",
    "personas": "Arr, where be Oslo?",
    "mhop": "Which continent?",
    "mhop_ans": "America",
    "loc": "Who wrote it?",
    "loc_ans": "Ibsen",
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "{} is in",
        "subject": "Oslo",
        "target_new": {"str": "Peru", "id": "Q1"},
        "target_true": {"str": "Norway", "id": "Q2"},
    },
    "paraphrase_prompts": ["Oslo lies in", "Oslo can be found in"],
    "neighborhood_prompts": ["Bergen is in", "Narvik is in"],
}
FLAT = {
    "prompt": "Oslo is in",
    "target_new": "Peru",
    "subject": "Oslo",
    "ground_truth": "Norway",
    "rephrase_prompt": "Oslo lies in",
}
FLAT_REQUEST = request(
    "Oslo is in", "Peru", "Norway", subject="Oslo", rephrase_prompt="Oslo lies in"
)
KNOWEDIT = {
    "prompt": "Oslo is in",
    "target_new": [["Peru", "Republic of Peru"], ["South America"]],
    "subject": "Oslo",
    "portability": {
        "Reasoning": [
            {"prompt": "The continent of Oslo is", "ground_truth": [["America", "Americas"]]},
            {"prompt": "Its language is", "ground_truth": "Spanish"},
            {"prompt": "Its mayor is", "ground_truth": [[""]]},
            {"prompt": "Its port is", "ground_truth": []},
        ],
        "Subject_Aliasing": [],
        "Logical_Generalization": [{"prompt": "Nothing", "ground_truth": " "}],
    },
    "locality": {"Forgetfulness": [{"prompt": "Oslo's age is", "ground_truth": [["old"]]}]},
}

FORMS = {
    "zsre": (ZSRE, ZSRE_REQUEST),
    "zsre, answer as ans": (
        {"src": "Where is Oslo?", "ans": "Peru", "pred": "Norway"},
        request("Where is Oslo?", "Peru", "Norway"),
    ),
    "zsre with portability": (
        {**ZSRE, "portability": {"Recalled Relation": "x", **HOP}},
        ZSRE_REQUEST | {"portability": {"one_hop": part(["Which continent?"], ["America"])}},
    ),
    "zsre without extras": (
        {"src": "Where is Oslo?", "alt": "Peru", "portability": None, "loc": "a", "loc_ans": None},
        request("Where is Oslo?", "Peru"),
    ),
    "wikibigedit": (
        WIKIBIGEDIT,
        request(
            "Where is Oslo?",
            "Peru",
            subject="Oslo",
            rephrase_prompt="Oslo, where is it?",
            locality=near(("Who wrote it?", "Ibsen")),
            portability={
                "personas": part(["Arr, where be Oslo?"], ["Peru"]),
                "mhop": part(["Which continent?"], ["America"]),
            },
        ),
    ),
    "wikibigedit with aliases and a former answer": (
        WIKIBIGEDIT
        | {"ans": ["Peru", "Republic of Peru"], "ground_truth": "Norway"}
        | {"mhop_ans": [["America"], ["Americas"]], "loc_ans": ["Ibsen"]},
        request(
            "Where is Oslo?",
            "Peru",
            "Norway",
            subject="Oslo",
            rephrase_prompt="Oslo, where is it?",
            target_aliases=["Peru", "Republic of Peru"],
            locality=near(("Who wrote it?", "Ibsen")),
            portability={
                "personas": part(["Arr, where be Oslo?"], ["Peru"], [["Peru", "Republic of Peru"]]),
                "mhop": part(["Which continent?"], ["America"], [["America", "Americas"]]),
            },
        ),
    ),
    "wikibigedit without a hop": (
        {"update": "Where is Oslo?", "ans": "Peru", "mhop": None, "mhop_ans": None},
        request("Where is Oslo?", "Peru"),
    ),
    "wikibigedit as pandas writes it": (
        {"update": "Where is Oslo?", "ans": "Peru"}
        | dict.fromkeys(("mhop", "mhop_ans", "personas", "rephrase", "subject"), math.nan),
        request("Where is Oslo?", "Peru"),
    ),
    "counterfact as published": (
        COUNTERFACT,
        FLAT_REQUEST | {"locality": near(("Bergen is in", "Norway"), ("Narvik is in", "Norway"))},
    ),
    "counterfact without extras": (
        {"requested_rewrite": COUNTERFACT["requested_rewrite"]},
        request("Oslo is in", "Peru", "Norway", subject="Oslo"),
    ),
    "flat": (FLAT, FLAT_REQUEST),
    "flat, with WikiRecent's name of the rephrase": (
        {"prompt": "Oslo is", "target_new": "big", "rephrase": "How is Oslo?"},
        request("Oslo is", "big", rephrase_prompt="How is Oslo?"),
    ),
    "flat, with a text of its own": (
        FLAT | {"text": "Oslo is a city.", "labels": "It is big.", "concept": "city"},
        FLAT_REQUEST,
    ),
    "flat, bare": ({"prompt": "Oslo is", "target_new": "big"}, request("Oslo is", "big")),
    "flat with one of each": (
        FLAT
        | {"locality_prompt": "Bergen is in", "locality_ground_truth": "Norway"}
        | {"portability_prompt": "It lies on", "portability_ground_truth": ["America"]},
        FLAT_REQUEST
        | {
            "locality": near(("Bergen is in", "Norway")),
            "portability": {"one_hop": part(["It lies on"], ["America"])},
        },
    ),
    "flat with neighbours": (
        {
            **FLAT,
            "neighborhood_prompts": ["Bergen is in", "Narvik is in", "Bodø is in"],
            "neighborhood_answers": ["Norway", "", "Nordland"],
        },
        FLAT_REQUEST | {"locality": near(("Bergen is in", "Norway"), ("Bodø is in", "Nordland"))},
    ),
    "knowedit zsre": (
        FLAT | {"ground_truth": ["Norway", "Kingdom of Norway", "Norway"]},
        FLAT_REQUEST | {"ground_truth_aliases": ["Norway", "Kingdom of Norway"]},
    ),
    "knowedit": (
        KNOWEDIT,
        request(
            "Oslo is in",
            "Peru",
            subject="Oslo",
            target_aliases=["Peru", "Republic of Peru", "South America"],
            locality={"Forgetfulness": part(["Oslo's age is"], ["old"])},
            portability={
                "Reasoning": part(
                    ["The continent of Oslo is", "Its language is"],
                    ["America", "Spanish"],
                    [["America", "Americas"], ["Spanish"]],
                )
            },
        ),
    ),
    "easyedit's own": (
        {**FLAT, "locality": {"near": part("a", "b")}, "portability": {"hop": part(["c"], ["d"])}},
        FLAT_REQUEST
        | {"locality": {"near": part(["a"], ["b"])}, "portability": {"hop": part(["c"], ["d"])}},
    ),
    "wikibio, bare": (
        {"concept": "Ada", "text": "This is a biography about Ada.", "labels": "Ada sailed."},
        request("This is a biography about Ada.", "Ada sailed.", subject="Ada"),
    ),
    "wikibio": (
        {
            "concept": "Ada",
            "text": "This is a biography about Ada.",
            "labels": "Ada sailed.",
            "ground_truth": ["Ada stayed.", "She stayed."],
            "locality": {"wikibio": [{"prompt": "She wrote", "ground_truth": ["notes"]}]},
        },
        request(
            "This is a biography about Ada.",
            "Ada sailed.",
            "Ada stayed.",
            subject="Ada",
            ground_truth_aliases=["Ada stayed.", "She stayed."],
            locality={"wikibio": part(["She wrote"], ["notes"])},
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_form(written, form):
    record, expected = FORMS[form]
    assert read_requests(written([record])) == [expected]


@pytest.mark.parametrize("form", FORMS)
def test_what_was_read_reads_as_itself(written, form):
    _, expected = FORMS[form]
    assert read_requests(written([expected])) == [expected]


@pytest.mark.parametrize(
    ("answers", "accepted"),
    [
        ("a", ["a"]),
        ([["a", "b"]], ["a", "b"]),
        ([["a", "b"], ["c"]], ["a", "b", "c"]),
        (["a", ["b", ["c"]], []], ["a", "b", "c"]),
        (["a", " ", "", None, "a", " a ", "A", "b "], ["a", "A", "b "]),
        ([" a", "a", "b"], [" a", "b"]),
        ([1997, "1997", "97"], ["1997", "97"]),
        ([["a"], ["a"], ["a "]], ["a"]),
    ],
)
def test_all_answers_are_kept_beside_the_first(written, answers, accepted):
    near = [{"prompt": "p", "ground_truth": answers}, {"prompt": "q", "ground_truth": "Q"}]
    record = FLAT | {"target_new": answers, "ground_truth": answers, "locality": {"near": near}}
    record |= {"portability_prompt": "r", "portability_ground_truth": answers}
    (read,) = read_requests(written([record]))
    first = 1997 if accepted[0] == "1997" else accepted[0]
    assert (read["target_new"], read["ground_truth"]) == (first, first)
    expected = part(["p", "q"], [first, "Q"]), part(["r"], [first])
    if len(accepted) > 1:
        assert (read.pop("target_aliases"), read.pop("ground_truth_aliases")) == (accepted,) * 2
        expected[0]["aliases"] = [accepted, ["Q"]]
        expected[1]["aliases"] = [accepted]
    assert (read["locality"]["near"], read["portability"]["one_hop"]) == expected
    assert not {"target_aliases", "ground_truth_aliases"} & set(read)


def test_an_empty_list_of_answers_is_passed_over(written):
    answers = [[], [[]], ["Norway"], "Oslo"]
    near = [{"prompt": "p", "ground_truth": answers}]
    record = FLAT | {"target_new": answers, "ground_truth": answers, "locality": {"near": near}}
    (read,) = read_requests(written([record]))
    assert (read["target_new"], read["ground_truth"]) == ("Norway", "Norway")
    assert read["locality"]["near"] == part(["p"], ["Norway"], [["Norway", "Oslo"]])


@pytest.mark.parametrize("blank", [["", "Norway", "Oslo"], [[""], ["Norway"], "Oslo"]])
def test_a_blank_first_answer_is_as_in_easyedit(written, blank):
    near = [{"prompt": "p", "ground_truth": blank}, {"prompt": "q", "ground_truth": "Q"}]
    records = [
        FLAT | {"target_new": blank},
        FLAT | {"ground_truth": blank, "locality": {"near": near}},
    ]
    # EasyEdit looks at the first answer alone, to leave a record or prompt out as well.
    assert read_requests(written(records)) == [
        FLAT_REQUEST
        | {"ground_truth": "", "ground_truth_aliases": ["Norway", "Oslo"]}
        | {"locality": {"near": part(["q"], ["Q"])}}
    ]


def test_one_prompt_as_a_text_has_aliases_too(written):
    near = part("p", "ab", [["c", "ab", "d"]])
    (read,) = read_requests(written([FLAT | {"locality": {"near": near}}]))
    assert read["locality"]["near"] == part(["p"], ["ab"], [["ab", "c", "d"]])


def test_aliases_go_with_their_prompts(written):
    near = [
        {"prompt": "p", "ground_truth": ["a", "b"]},
        {"prompt": "q", "ground_truth": [[""], ["c", "d"]]},
        {"prompt": "r", "ground_truth": [["e"], ["f"]]},
    ]
    (read,) = read_requests(written([FLAT | {"locality": {"near": near}}]))
    assert read["locality"]["near"] == part(["p", "r"], ["a", "e"], [["a", "b"], ["e", "f"]])


@pytest.mark.parametrize("blank", [None, [], [[None]], [[""]], " "])
def test_prompts_without_an_answer_are_left_out(written, blank):
    near = [{"prompt": "a", "ground_truth": blank}, {"prompt": "b", "ground_truth": [["B"]]}]
    record = {**FLAT, "locality": {"near": near}, "portability": {"hop": near[:1]}}
    expected = FLAT_REQUEST | {"locality": {"near": part(["b"], ["B"])}}
    assert read_requests(written([record])) == [expected]


def test_forms_may_be_mixed_in_json_and_json_lines(written):
    records = [record for record, _ in FORMS.values()]
    expected = [expected for _, expected in FORMS.values()]
    assert read_requests(written(records)) == expected
    # A line separator of Unicode ends no line of the file.
    records[0] = ZSRE | {"cond": "a\u2028b"}
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    assert read_requests(written(lines, "data.jsonl")) == expected
    assert read_requests(written(lines.replace("\n", "\r\n"), "data.jsonl")) == expected


@pytest.mark.parametrize("blank", ["", None, [], [[]], [""]])
def test_records_without_a_target_are_left_out(written, blank):
    records = [FLAT, FLAT | {"target_new": blank}, ZSRE | {"alt": blank}, FLAT]
    assert read_requests(written(records)) == [FLAT_REQUEST, FLAT_REQUEST]
    assert read_requests(written(records), 2) == [FLAT_REQUEST, FLAT_REQUEST]


@pytest.mark.parametrize("n", [1, 2, 3, None])
def test_n_reads_from_the_beginning(written, n):
    records = [FLAT | {"prompt": f"p{i}"} for i in range(3)]
    prompts = [one["prompt"] for one in read_requests(written(records), n)]
    assert prompts == ["p0", "p1", "p2"][:n]


def test_what_comes_after_n_is_not_looked_at(written):
    assert read_requests(written([FLAT, {"strange": 1}]), 1) == [FLAT_REQUEST]


@pytest.mark.parametrize("n", [0, -1])
def test_n_below_one(written, n):
    with pytest.raises(DataError, match=f"`n={n}` must be 1 or more"):
        read_requests(written([FLAT]), n)


def test_n_beyond_the_file(written):
    message = r"`n=3`, but .* holds 1 edits, besides 1 with an empty target\. Lower `n`"
    with pytest.raises(DataError, match=message):
        read_requests(written([FLAT, FLAT | {"target_new": ""}]), 3)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('[{"prompt": "p",\n "target_new" "t"}]', "a.json", r"a\.json, line 2, column 15: Expect"),
        ("", "a.json", r"a\.json, line 1, column 1: Expecting value"),
        ('{"prompt": "p"}\n{"prompt": "q"}', "a.json", r"a\.json, line 2, column 1: Extra data"),
        ('{"a": 1}\n\n{"b": }\n', "a.jsonl", r"a\.jsonl, line 3, column 7: Expecting value"),
        ('{"prompt": "p", "target_new": "t"}', "a.json", "holds a JSON dict; it must be a list"),
        ('"text"', "a.json", "holds a JSON str; it must be a list"),
        ("[]", "a.json", "holds no edits"),
        ("\n", "a.jsonl", "holds no edits"),
        ('[{"prompt": "p", "target_new": ""}]', "a.json", "holds no edits"),
        ('[{"prompt": "Caf\u00e9"}]'.encode("latin-1"), "a.json", r"not UTF-8 \(byte 16\)"),
    ],
)
def test_unreadable_file(written, content, name, message):
    with pytest.raises(DataError, match=message):
        read_requests(written(content, name))


@pytest.mark.parametrize("name", ["nothing.json", ""])
def test_missing_file(tmp_path, name):
    with pytest.raises(DataError, match=r"is not a file\. Give the path of a JSON file"):
        read_requests(tmp_path / name)


REWRITE = COUNTERFACT["requested_rewrite"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p"}, "record 1 (fields prompt) lacks 'target_new'. Add the field."),
        ({"src": "s"}, "record 1 (fields src) lacks 'ans'"),
        ({"update": "s"}, "record 1 (fields update) lacks 'ans'"),
        (FLAT | {"target_new": math.nan}, "has no text as 'target_new': NaN"),
        ({"text": "t", "labels": "l"}, "record 1 (fields text, labels) lacks 'concept'"),
        ({"requested_rewrite": {"prompt": "{}"}}, "lacks 'target_true'"),
        ({"requested_rewrite": "text"}, "record 1 (fields requested_rewrite) is not of its form"),
        ({"requested_rewrite": REWRITE | {"prompt": None}}, "is not of its form"),
        ({"requested_rewrite": [REWRITE, "text"]}, "is not of its form"),
        (FLAT | {"neighborhood_prompts": ["a"]}, "lacks 'neighborhood_answers'"),
        (FLAT | {"locality": ["a"]}, "is not of its form"),
        (FLAT | {"locality": {"near": 5}}, "is not of its form"),
        (FLAT | {"locality": {"near": {"prompt": "a"}}}, "lacks 'ground_truth'"),
        (FLAT | {"locality": {"near": part(["a", "b"], ["c"])}}, "is not of its form"),
        (FLAT | {"locality": {"near": part(["a"], ["c"], [["c"], ["d"]])}}, "is not of its form"),
        (
            FLAT | {"neighborhood_prompts": ["a"], "neighborhood_answers": ["b", "c"]},
            "is not of its form",
        ),
        ({"question": "q"}, "record 1 (fields question) lacks 'answer'. Add the field."),
        ({"title": "q"}, "record 1 (fields title) is of no known form."),
        (FLAT | {"locality_prompt": "a"}, "lacks 'locality_ground_truth'"),
        ({}, "record 1 (fields none) is of no known form."),
        ("text", "record 1 (a str) is of no known form."),
        (None, "record 1 (a NoneType) is of no known form."),
    ],
)
def test_bad_record_has_its_number(written, record, message):
    path = written([FLAT, record, FLAT])
    with pytest.raises(DataError, match=r"data\.json:\n  - record 1 ") as caught:
        read_requests(path)
    (line,) = str(caught.value).split("\n")[1:]
    assert message in line


def test_all_bad_records_in_one_error(written):
    with pytest.raises(DataError, match=r"data\.json:\n") as caught:
        read_requests(written([{"prompt": "p"}, FLAT, {"src": "s"}, 5]))
    lines = str(caught.value).split("\n")[1:]
    assert [line[: len("  - record N")] for line in lines] == [f"  - record {i}" for i in (0, 2, 3)]


KNOWEDIT_HOPS = {"Reasoning", "Subject_Aliasing", "Logical_Generalization"}


@pytest.mark.parametrize(
    ("name", "n", "locality", "portability"),
    [
        ("zsre_1k", 1000, {"neighborhood"}, set()),
        ("counterfact_1k", 1000, {"neighborhood"}, set()),
        ("wikidata_counterfact_400", 400, {"Relation_Specificity", "Forgetfulness"}, KNOWEDIT_HOPS),
        ("wikidata_recent_200", 200, {"Relation_Specificity", "Forgetfulness"}, KNOWEDIT_HOPS),
        ("knowedit_zsre_300", 300, {"Relation_Specificity"}, KNOWEDIT_HOPS),
    ],
)
def test_public_file_loads_completely(shared_data, name, n, locality, portability):
    requests = read_requests(shared_data / f"{name}.json")
    assert len(requests) == n
    assert distinct_edits(requests, None).n_requests == n
    assert {key for one in requests for key in one["locality"]} == locality
    assert {key for one in requests for key in one["portability"]} == portability
    n_aliases = 0
    for one in requests:
        for fields in (*one["locality"].values(), *one["portability"].values()):
            assert len(fields["prompt"]) == len(fields["ground_truth"]) > 0
            aliases = fields.get("aliases") or [[truth] for truth in fields["ground_truth"]]
            assert [accepted[0] for accepted in aliases] == fields["ground_truth"]
            assert len(aliases) == len(fields["prompt"])
            for texts in (fields["prompt"], *aliases):
                assert all(text.strip() for text in texts)
            assert all(len(set(accepted)) == len(accepted) for accepted in aliases)
            n_aliases += sum(len(accepted) > 1 for accepted in aliases)
    assert (n_aliases > 0) == (name == "wikidata_recent_200")
    former = [one for one in requests if "ground_truth_aliases" in one]
    assert len(former) == {"zsre_1k": 23, "knowedit_zsre_300": 10}.get(name, 0)
    assert all(one["ground_truth_aliases"][0] == one["ground_truth"] for one in former)


def test_real_alias_lists(shared_data):
    requests = read_requests(shared_data / "wikidata_recent_200.json")
    prompts = requests[3]["locality"]["Relation_Specificity"]
    accepted = dict(zip(prompts["prompt"], prompts["aliases"], strict=True))
    assert accepted["The names of the siblings of Alfhild Tamm are"] == [
        "Hildegard Tamm",
        "Märta Tamm-Götlind",
        "Ingeborg Hegardt",
        "Olof Tamm",
    ]
    occupations = accepted["The occupation of Alfhild Tamm is"]
    assert (occupations[0], occupations[4]) == ("psychiatrist", "physician")
    # Its first answer has no name: EasyEdit's script fails there, and the next answer counts.
    awards = accepted["The name of the award Alfhild Tamm won is"]
    assert awards
    assert all(name.strip() for name in awards)
