"""Our reader against EasyEdit's: its dataset classes and example scripts read the same files.

The scripts run unmodified, up to the call of the editor. What they pass to it goes through
EasyEdit's `_prepare_requests` and is compared with our requests. The release brings three of the
dataset classes and no scripts.

Where the two differ on purpose:

- A prompt whose first answer is blank is left out of locality and portability, as in the scripts,
  and an entry without prompts is left out with it; the scripts keep it as an empty list.
- Most scripts do not pass the former answers, and some not the rephrases. Ours are in the request.
- Names of entries: `NAMES`.
"""

import json
import math
from types import SimpleNamespace

import pytest
from helpers.toys import REPOSITORY

from locft_easyedit.data.readers import read_requests
from locft_easyedit.data.record_forms import as_requests
from locft_easyedit.easyedit.script import run_script

HPARAMS = REPOSITORY / "hparams" / "LocFT-BF" / "smollm2-135m.yaml"
# Ours are those of the file; the locality of WikiBigEdit has the name that ZsRE's has.
NAMES = {"reasoning": "Reasoning", "locality": "neighborhood"}


class CalledEditor(Exception):
    """Ends a script where it would begin to edit."""


@pytest.fixture
def written(tmp_path):
    def write(records, name="data.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def current(easyedit):
    if easyedit.is_release:
        pytest.skip("the release has neither these classes nor scripts; set EASYEDIT_HOME")
    return easyedit


@pytest.fixture
def passed_by(current, monkeypatch, tmp_path):
    """Runs a script of EasyEdit; returns the requests that its editor would have made."""
    monkeypatch.chdir(tmp_path)  # the scripts write where they stand

    def run(script, *arguments):
        passed = {}

        def edit(**given):
            passed.update(given)
            raise CalledEditor("the script calls the editor")

        editor = SimpleNamespace(edit=edit, batch_edit=edit)
        monkeypatch.setattr(current.BaseEditor, "from_hparams", lambda hparams: editor)
        given = ["--editing_method=FT", f"--hparams_dir={HPARAMS}", *arguments]
        with pytest.raises(CalledEditor, match="the script calls the editor"):
            run_script(current.home / "examples" / script, given)
        return prepared(current, **passed)

    return run


def prepared(easyedit, prompts, target_new, ground_truth=None, **arguments):
    """EasyEdit's requests for the arguments of its `edit`."""
    ground_truth = ground_truth or [None] * len(prompts)
    if easyedit.is_release:
        prepare = easyedit.BaseEditor._prepare_requests
        return prepare(None, prompts, target_new, ground_truth, **arguments)
    from easyeditor.editors.utils import _prepare_requests

    return _prepare_requests(prompts, target_new, ground_truth, **arguments)


def assert_same(ours, theirs, keys=("prompt", "target_new", "subject", "rephrase_prompt")):
    """Asserts the same texts in the same order; returns EasyEdit's entries that hold none."""
    assert len(ours) == len(theirs) > 0
    n_left_out = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert {key: mine.get(key) for key in keys} == {key: other.get(key) for key in keys}
        for part in ("locality", "portability"):
            pairs = {NAMES.get(name, name): listed(fields) for name, fields in other[part].items()}
            kept = {name: pair for name, pair in pairs.items() if any(pair[0])}
            n_left_out += len(pairs) - len(kept)
            assert {name: listed(fields) for name, fields in mine[part].items()} == kept
    return n_left_out


def listed(fields):
    """Prompts and answers as lists: the scripts pass one prompt as a text or as a list of one."""
    pair = fields["prompt"], fields["ground_truth"]
    return tuple(value if isinstance(value, list) else [value] for value in pair)


def first(answers):
    while isinstance(answers, list):
        answers = answers[0] if answers else ""
    return answers


# Dataset classes that the release has as well


def test_the_objects_are_requests_themselves(easyedit, written):
    from easyeditor import dataset as classes

    zsre = {
        "src": "Where is Oslo?", "rephrase": "Oslo?", "alt": "Peru", "answers": ["Norway"],
        "loc": "nq question: who", "loc_ans": "Ibsen", "subject": "Oslo", "cond": "",
    }  # fmt: skip
    flat = {
        "prompt": "Oslo is in", "target_new": "Peru", "ground_truth": "Norway", "subject": "Oslo",
        "rephrase_prompt": "Oslo?", "locality_prompt": "Bonn is in", "locality_ground_truth": "?",
    }  # fmt: skip
    knowedit = {
        "prompt": "Oslo is in", "target_new": "Peru", "ground_truth": "Norway", "subject": "Oslo",
        "portability": {"Reasoning": [{"prompt": "R", "ground_truth": [["A", "B"]]}]},
        "locality": {"Relation_Specificity": [{"prompt": "L", "ground_truth": "C"}]},
    }  # fmt: skip
    kinds = [(classes.ZsreDataset, zsre), (classes.CounterFactDataset, flat)]
    if not easyedit.is_release:
        kinds.append((classes.KnowEditDataset, knowedit))
    for dataset, record in kinds:
        path = written([record])
        [expected] = read_requests(path)
        [found] = as_requests(dataset(str(path)))
        assert found["locality"] == expected["locality"] != {}
        assert found["portability"] == expected["portability"]
        keys = ("prompt", "target_new", "ground_truth", "rephrase_prompt")
        assert [found.get(key) for key in keys] == [expected.get(key) for key in keys]


@pytest.mark.parametrize("size", [None, 30])
def test_zsre_class(easyedit, shared_data, written, size):
    from easyeditor.dataset import ZsreDataset

    records = json.loads((shared_data / "zsre_1k.json").read_text(encoding="utf-8"))
    records[3]["alt"] = records[17]["alt"] = ""  # the class leaves these out
    path = written(records)
    rows = list(ZsreDataset(path, size=size))
    assert len(rows) == (size or 998)
    loc, answers = ([row[f"locality_{key}"] for row in rows] for key in ("prompt", "ground_truth"))
    theirs = prepared(
        easyedit,
        [row["prompt"] for row in rows],
        [row["target_new"] for row in rows],
        [row["ground_truth"] for row in rows],
        rephrase_prompts=[row["rephrase_prompt"] for row in rows],
        locality_inputs={"neighborhood": {"prompt": loc, "ground_truth": answers}},
    )
    keys = ("prompt", "target_new", "ground_truth", "rephrase_prompt")
    assert assert_same(read_requests(path, size), theirs, keys) == 0


@pytest.mark.parametrize("size", [None, 30])
def test_counterfact_class(easyedit, shared_data, size):
    from easyeditor.dataset import CounterFactDataset

    path = shared_data / "counterfact_1k.json"
    rows = list(CounterFactDataset(path, size=size))
    loc, answers = ([row[f"locality_{key}"] for row in rows] for key in ("prompt", "ground_truth"))
    theirs = prepared(
        easyedit,
        [row["prompt"] for row in rows],
        [row["target_new"] for row in rows],
        [row["ground_truth"] for row in rows],
        rephrase_prompts=[row["rephrase_prompt"] for row in rows],
        subject=[row["subject"] for row in rows],
        locality_inputs={"neighborhood": {"prompt": loc, "ground_truth": answers}},
    )
    keys = ("prompt", "target_new", "subject", "ground_truth", "rephrase_prompt")
    assert assert_same(read_requests(path, size), theirs, keys) == 0


@pytest.mark.parametrize("which", [0, -1])
def test_wiki_recent_class(easyedit, shared_data, written, monkeypatch, which):
    """The class draws a locality prompt, one of its answers and one of the answer's names."""
    from easyeditor.dataset import WikiRecentDataset

    chance = SimpleNamespace(choice=lambda options: options[which])
    monkeypatch.setattr("easyeditor.dataset.wiki_recent.random", chance)
    records = json.loads((shared_data / "wikidata_recent_200.json").read_text(encoding="utf-8"))
    # It fails on records without locality prompts, and on answers without a name.
    records = [
        record
        for record in records
        if (near := record["locality"].get("Relation_Specificity"))
        and all(all(entry["ground_truth"]) for entry in near)
    ]
    assert len(records) == 143
    records[0]["rephrase"] = "In other words"
    path = written(records)
    rows, ours = list(WikiRecentDataset(path)), read_requests(path)
    for row, mine in zip(rows, ours, strict=True):
        for key in ("prompt", "target_new", "subject"):
            assert mine[key] == row[key]
        # Without one, the class takes the prompt itself: no rephrase, and so none of ours.
        assert mine.get("rephrase_prompt", mine["prompt"]) == row["rephrase_prompt"]
        entry = mine["locality"]["Relation_Specificity"]
        assert row["locality_prompt"] == entry["prompt"][which]
        i = len(entry["prompt"]) - 1 if which else 0
        accepted = [entry["ground_truth"][i], *(entry["aliases"][i] if "aliases" in entry else ())]
        assert row["locality_ground_truth"] in (accepted if which else accepted[:1])
    assert [mine.get("rephrase_prompt") for mine in ours[:2]] == ["In other words", None]


# Example scripts


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize(
    ("name", "datatype"),
    [("wikidata_counterfact_400", "counterfact"), ("knowedit_zsre_300", "zsre")],
)
def test_knowedit_script(passed_by, shared_data, name, datatype, size):
    path = shared_data / f"{name}.json"
    limit = [f"--ds_size={size}"] if size else []
    theirs = passed_by(
        "run_knowedit_llama2.py", f"--data_dir={path}", f"--datatype={datatype}", *limit
    )
    ours = read_requests(path, size)
    # Its only answer is blank: the entry stays behind, empty.
    n_empty = int(name == "wikidata_counterfact_400" and size is None)
    assert assert_same(ours, theirs, ("prompt", "target_new", "subject")) == n_empty
    assert all(other["ground_truth"] is None for other in theirs)
    assert not any("rephrase_prompt" in other for other in theirs)


def test_knowedit_class_has_our_former_answers(current, shared_data):
    from easyeditor.dataset import KnowEditDataset

    for name in ("wikidata_counterfact_400", "wikidata_recent_200", "knowedit_zsre_300"):
        path = shared_data / f"{name}.json"
        rows, ours = list(KnowEditDataset(path)), read_requests(path)
        for row, mine in zip(rows, ours, strict=True):
            truth = row["ground_truth"]
            assert mine["ground_truth"] == (None if truth is None else first(truth))
            if isinstance(truth, list) and len(truth) > 1:
                assert mine["ground_truth_aliases"] == truth


def test_knowedit_script_on_answers_without_a_name(passed_by, shared_data, written):
    path = shared_data / "wikidata_recent_200.json"
    script = ("run_knowedit_llama2.py", "--datatype=recent")
    with pytest.raises(IndexError, match="list index out of range"):
        passed_by(*script, f"--data_dir={path}")

    records = json.loads(path.read_text(encoding="utf-8"))
    n_removed = 0
    for record in records:
        for part in ("locality", "portability"):
            for name, entries in record[part].items():
                usable = [entry for entry in entries if first(entry["ground_truth"])]
                n_removed += len(entries) - len(usable)
                record[part][name] = usable
    assert n_removed == 2
    without = written(records)
    theirs = passed_by(*script, f"--data_dir={without}")
    ours = read_requests(without)
    assert assert_same(ours, theirs, ("prompt", "target_new", "subject")) == 10
    # Of the file as it is one more prompt is usable: the name of its first answer is empty, and
    # that of a second one is not.
    name = "Relation_Specificity"
    of_file = read_requests(path)
    [other] = [i for i, request in enumerate(of_file) if request != ours[i]]
    kept, known = (of[other]["locality"].pop(name) for of in (of_file, ours))
    [prompt] = set(kept["prompt"]) - set(known["prompt"])
    assert kept["ground_truth"][kept["prompt"].index(prompt)].startswith("Honorary")
    assert of_file == ours


WIKIBIO = [
    {
        "text": "This is a passage about ada. She lived in Oslo.",
        "labels": "She sailed to Peru.",
        "concept": "ada",
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The field of work of ada is", "ground_truth": ["medicine"]},
                {"prompt": "ada field of work", "ground_truth": ["medicine", "healing"]},
                {"prompt": "ada award", "ground_truth": [" "]},
            ]
        },
    },
    {
        "text": "This is a passage about bob.",
        "labels": "He stayed.",
        "concept": "bob",
        "ground_truth": "He left.",
        "locality": {},
    },
]


def test_knowedit_script_on_wikibio(passed_by, written):
    path = written(WIKIBIO)
    theirs = passed_by("run_knowedit_llama2.py", f"--data_dir={path}", "--datatype=wikibio")
    ours = read_requests(path)
    assert assert_same(ours, theirs) == 0
    from easyeditor.dataset import KnowEditDataset

    truths = [row["ground_truth"] for row in KnowEditDataset(path)]
    assert [mine["ground_truth"] for mine in ours] == truths == [None, "He left."]


@pytest.fixture
def zsre_records(shared_data):
    return json.loads((shared_data / "zsre_1k.json").read_text(encoding="utf-8"))


def test_wise_script_on_zsre(passed_by, zsre_records, written, tmp_path):
    path = written(zsre_records, "ZsRE/zsre_mend_edit.json")
    written(zsre_records[:5], "ZsRE/zsre_mend_train.json")
    theirs = passed_by(
        "run_wise_editing.py", f"--data_dir={tmp_path}", "--data_type=ZsRE", "--ds_size=1000"
    )
    assert assert_same(read_requests(path), theirs) == 0


def test_wise_script_on_flat_records(passed_by, shared_data, written, tmp_path):
    records = json.loads((shared_data / "counterfact_1k.json").read_text(encoding="utf-8"))
    path = written(records, "hallucination/hallucination-edit.json")
    written(records, "hallucination/hallucination-train.json")
    theirs = passed_by(
        "run_wise_editing.py",
        f"--data_dir={tmp_path}",
        "--data_type=hallucination",
        "--ds_size=1000",
    )
    assert not any("rephrase_prompt" in other for other in theirs)
    assert assert_same(read_requests(path), theirs, ("prompt", "target_new", "subject")) == 0


def test_zsre_script_with_portability(passed_by, zsre_records, written, tmp_path):
    for record in zsre_records:
        record["portability"] = {
            "Recalled Relation": "(A, is in, B)",
            "New Question": f"Which continent does {record['subject']} belong to?",
            "New Answer": f"that of {record['alt']}",
        }
    path = written(zsre_records, "zsre_mend_eval_portability_gpt4.json")
    theirs = passed_by("run_zsre_llama2.py", f"--data_dir={tmp_path}")
    assert all("one_hop" in other["portability"] for other in theirs)
    assert assert_same(read_requests(path), theirs) == 0


def test_ultraedit_script_on_zsre(passed_by, zsre_records, written, tmp_path):
    for record in zsre_records:
        record["ans"] = record.pop("alt")
    path = written(zsre_records, "zsre_eval_20k.json")
    theirs = passed_by(
        "run_ultraedit_editing.py", f"--data_dir={tmp_path}", "--data_type=zsre", "--ds_size=1000"
    )
    assert assert_same(read_requests(path), theirs) == 0


COUNTERFACT = [
    {
        "case_id": i,
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": "P30",
            "subject": subject,
            "target_new": {"str": "Peru", "id": "Q1"},
            "target_true": {"str": "Norway", "id": "Q2"},
        },
        "paraphrase_prompts": [f"Once. {subject} lies in", f"Twice. {subject} is found in"],
        "neighborhood_prompts": neighbours,
        "attribute_prompts": ["Lima is in"],
        "generation_prompts": [f"{subject} is close to"],
    }
    for i, (prompt, subject, neighbours) in enumerate(
        [
            ("{} is in", "Oslo", ["Bergen is in", "Narvik is in"]),
            ("The country of {} is", "Bodø", ["Hamar is in"]),
        ]
    )
]


@pytest.mark.parametrize(("datatype", "name"), [("CF", ""), ("MCF", "multi_")])
def test_alphaedit_script_on_counterfact_as_published(passed_by, written, tmp_path, datatype, name):
    path = written(COUNTERFACT, f"{name}counterfact.json")
    theirs = passed_by(
        "run_AlphaEdit_editing.py", f"--data_dir={tmp_path}", f"--data_type={datatype}"
    )
    assert assert_same(read_requests(path), theirs) == 0


WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Oslo",
    "update": "Where is Oslo?",
    "ans": "Peru",
    "rephrase": "Oslo, where is it?",
    "personas": "Arr, where be Oslo?",
    "mhop": "Which continent is Oslo on?",
    "mhop_ans": "America",
    "loc": "Who wrote Brand?",
    "loc_ans": "Ibsen",
}
WITHOUT_HOP = WIKIBIGEDIT | {"mhop": None, "mhop_ans": None}
AS_PANDAS_WRITES = WIKIBIGEDIT | dict.fromkeys(("mhop", "mhop_ans", "personas"), math.nan)


def test_wikibigedit_script(passed_by, written):
    bare = {key: WIKIBIGEDIT[key] for key in ("subject", "update", "ans", "rephrase")}
    former = WIKIBIGEDIT | {"ground_truth": "Norway"}
    path = written([WIKIBIGEDIT, WITHOUT_HOP, AS_PANDAS_WRITES, bare, former])
    theirs = passed_by("run_WikiBigEdit.py", f"--data_dir={path}")
    keys = ("prompt", "target_new", "subject", "rephrase_prompt", "ground_truth")
    # Where the file has no locality, the script asks None.
    assert assert_same(read_requests(path), theirs, keys) == 1


def test_ultraedit_script_on_wikibigedit(passed_by, written, tmp_path):
    path = written([WIKIBIGEDIT, WITHOUT_HOP, AS_PANDAS_WRITES], "wikibigedit_eval_17k.json")
    theirs = passed_by(
        "run_ultraedit_editing.py",
        f"--data_dir={tmp_path}",
        "--data_type=wikibigedit",
        "--ds_size=3",
    )
    assert assert_same(read_requests(path), theirs) == 0
