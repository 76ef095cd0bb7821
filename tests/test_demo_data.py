"""The demo records are what the generator makes, and say what the table of facts supports."""

import json
from collections import Counter

import build_demo_data as facts
import pytest

RELATIONS = facts.load_relations()
RECORDS = facts.build_records()
TRUTH = {name: facts.true_answers(relation) for name, relation in RELATIONS.items()}
FOLDER = facts.FOLDER


def read(name):
    return (FOLDER / f"demo_{name}.json").read_text(encoding="utf-8")


def templates(relation):
    hop = [relation["portability"]["prompt"]] if "portability" in relation else []
    return [relation["prompt"], *relation["rephrase"], *hop]


@pytest.mark.parametrize("name", ["counterfact", "knowedit"])
def test_files_equal_generator_output(name):
    rows = getattr(facts, f"to_{name}")(facts.build_records())
    assert read(name) == json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    assert (FOLDER / f"demo_{name}.json").stat().st_size < 700 * 1024


def test_main_writes_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "FOLDER", tmp_path)
    facts.main()
    for name in ("counterfact", "knowedit"):
        assert (tmp_path / f"demo_{name}.json").read_text(encoding="utf-8") == read(name)


def test_seed_decides_everything():
    assert facts.build_records(3) == facts.build_records(3)
    assert facts.build_records(3) != RECORDS


def test_size_and_mixture():
    assert len(RECORDS) >= 500
    assert len(RELATIONS) >= 12
    assert sum(len(truth) for truth in TRUTH.values()) >= 560
    assert sum("portability" in relation for relation in RELATIONS.values()) >= 7
    # Relations are mixed evenly enough that any slice of 100 records has at least ten.
    for start in range(0, len(RECORDS) - 100, 100):
        assert len({r["relation"] for r in RECORDS[start : start + 100]}) >= 10


@pytest.mark.parametrize("name", RELATIONS)
def test_table_is_sound(name):
    relation = RELATIONS[name]
    for template in templates(relation):
        assert template == template.strip()
        assert template.count("{}") == template.count("{") == template.count("}") == 1
    assert len(set(templates(relation))) == len(templates(relation)) >= 4
    subjects = [subject for group in relation["facts"].values() for subject in group]
    assert len(set(subjects)) == len(subjects)
    for word in [*subjects, *relation["facts"]]:
        assert isinstance(word, str)
        assert word == word.strip()
    for key, answers in relation.get("also_true", {}).items():
        assert key in subjects or key in relation["facts"]
        assert set(answers) <= set(relation["facts"])
    if "portability" in relation:
        assert set(relation["portability"]["values"]) == set(relation["facts"])


def test_prompts_are_unique_and_name_the_subject():
    prompts = [r["prompt"] for r in RECORDS]
    rephrases = [p for r in RECORDS for p in r["rephrase_prompts"]]
    assert max(Counter(prompts).values()) == max(Counter(rephrases).values()) == 1
    everywhere = {RELATIONS[n]["prompt"].format(s) for n, truth in TRUTH.items() for s in truth}
    assert not everywhere & set(rephrases)
    for r in RECORDS:
        assert len(r["rephrase_prompts"]) >= 2
        assert all(r["subject"] in prompt for prompt in [r["prompt"], *r["rephrase_prompts"]])


def test_targets_are_false():
    for r in RECORDS:
        relation, truth = RELATIONS[r["relation"]], TRUTH[r["relation"]][r["subject"]]
        also_true = relation.get("also_true", {})
        assert r["ground_truth"] == truth != r["target_new"]
        assert r["target_new"] in relation["facts"]
        assert r["target_new"] not in also_true.get(r["subject"], [])
        assert r["target_new"] not in also_true.get(truth, [])


def test_neighborhood_is_true_and_never_edited():
    edited = {r["prompt"] for r in RECORDS}
    for r in RECORDS:
        template, truth = RELATIONS[r["relation"]]["prompt"], TRUTH[r["relation"]]
        by_prompt = {template.format(subject): answer for subject, answer in truth.items()}
        assert len({item["prompt"] for item in r["neighborhood"]}) == 2
        for item in r["neighborhood"]:
            assert item["prompt"] not in edited
            assert item["ground_truth"] == by_prompt[item["prompt"]] != r["target_new"]


def test_neighborhood_prefers_the_same_answer():
    for r in RECORDS:
        truth = TRUTH[r["relation"]]
        edited = {e["subject"] for e in RECORDS if e["relation"] == r["relation"]}
        same = [s for s in truth if s not in edited and truth[s] == r["ground_truth"]]
        found = sum(item["ground_truth"] == r["ground_truth"] for item in r["neighborhood"])
        assert found == min(2, len(same))


def test_portability_follows_from_the_new_target():
    for r in RECORDS:
        hop = RELATIONS[r["relation"]].get("portability")
        if hop is None:
            assert r["portability"] is None
            continue
        assert r["portability"] == {
            "prompt": hop["prompt"].format(r["subject"]),
            "ground_truth": hop["values"][r["target_new"]],
        }
        assert r["portability"]["ground_truth"] != hop["values"][r["ground_truth"]]


def test_counterfact_file_has_what_easyedit_reads():
    # The keys that CounterFactDataset's collate functions index.
    keys = {"prompt", "target_new", "ground_truth", "rephrase_prompt"}
    keys |= {"locality_prompt", "locality_ground_truth"}
    for number, row in enumerate(json.loads(read("counterfact"))):
        assert row["case_id"] == number
        assert all(isinstance(row[key], str) and row[key] for key in [*keys, "subject"])
        assert row["neighborhood_prompts"][0] == row["locality_prompt"]
        assert row["neighborhood_answers"][0] == row["locality_ground_truth"]
        assert len(row["neighborhood_prompts"]) == len(row["neighborhood_answers"]) == 2
        assert ("portability_prompt" in row) == ("portability_ground_truth" in row)


def test_knowedit_file_has_what_easyedit_reads():
    # KnowEditDataset: the four strings, `portability`, and `locality` as its collate indexes it.
    for row, r in zip(json.loads(read("knowedit")), RECORDS, strict=True):
        for key in ("subject", "prompt", "target_new", "ground_truth"):
            assert row[key] == r[key]
        assert row["rephrase_prompt"] == r["rephrase_prompts"][0]
        assert list(row["locality"]) == ["Relation_Specificity"]
        assert len(row["locality"]["Relation_Specificity"]) == 2
        assert list(row["portability"]) == (["Reasoning"] if r["portability"] else [])
        for item in [
            *row["locality"]["Relation_Specificity"],
            *row["portability"].get("Reasoning", []),
        ]:
            assert isinstance(item["prompt"], str)
            assert [type(answer) for answer in item["ground_truth"]] == [str]
