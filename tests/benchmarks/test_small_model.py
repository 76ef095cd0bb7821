"""The script that trains a small model on facts, for a few seconds and on a few facts."""

import json
import sys

import pytest
import torch
from helpers.scripts import script_module
from helpers.toys import REPOSITORY, toy_requests
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = REPOSITORY / "benchmarks" / "small_model.py"


@pytest.fixture(scope="module")
def script():
    return script_module(SCRIPT)


@pytest.fixture
def data(tmp_path):
    requests = toy_requests(3)
    for i, request in enumerate(requests):
        request["ground_truth"] = ("Rome", "Spanish", "Ajax")[i]
    (tmp_path / "edits.json").write_text(json.dumps(requests))
    return tmp_path / "edits.json"


def test_a_model_is_trained_and_saved(script, data, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    arguments = [
        "small_model.py", str(data), "--n", "3", "--output", str(folder), "--epochs", "80",
        "--hidden", "32", "--layers", "1", "--vocabulary", "300", "--plain-kib", "2",
        "--lr", "0.02",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    state = torch.random.get_rng_state()
    script.main()
    torch.random.set_rng_state(state)
    about = json.loads((folder / "facts.json").read_text())
    assert about["data"] == ["edits.json"]
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id != tokenizer.pad_token_id
    facts = script.original_facts([data], 3)
    # What it says of itself is what it generates.
    right = 0
    for prompt, answer in facts["prompts"]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        ends = {"pad_token_id": 0, "eos_token_id": 2}
        new = model.generate(ids, max_new_tokens=12, do_sample=False, **ends)[0, ids.shape[1] :]
        right += tokenizer.decode(new, skip_special_tokens=True) == f" {answer}"
    assert about["known"]["prompts"] == pytest.approx(right / 3, abs=1e-3)
    assert right > 0


def test_the_old_answers_are_learned_and_never_the_new_ones(script, data):
    facts = script.original_facts([data], 3)
    requests = toy_requests(3)
    assert [answer for _, answer in facts["prompts"]] == ["Rome", "Spanish", "Ajax"]
    assert [p for p, _ in facts["rephrase prompts"]] == [r["rephrase_prompt"] for r in requests]
    assert [a for _, a in facts["locality prompts"]] == ["Loire", "Rhine", "Loire"]


def test_rows_keep_documents_whole_and_weigh_answers_more(script):
    documents = [([1, 5, 6, 2], 2), ([1, 7, 2], 3), ([1, 8, 9, 9, 2], 1)]
    ids, positions, weights = next(iter(script.batches(documents, row=8, rows=2)))
    assert ids.tolist() == [[1, 5, 6, 2, 1, 7, 2, 0], [1, 8, 9, 9, 2, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 0, 0]]
    heavy = script.ANSWER_WEIGHT
    assert weights.tolist()[0] == [0, 1, heavy, heavy, 0, 1, 1, 0]
    assert [len(rows[0]) for rows in script.batches(documents, row=8, rows=1)] == [1, 1]


def test_plain_text_has_nothing_of_the_text_that_drift_is_measured_on(script):
    health = (REPOSITORY / "locft_easyedit" / "training" / "health_text.txt").read_text()
    texts = script.plain_text(40 * 1024)
    assert 30 * 1024 < sum(map(len, texts)) < 60 * 1024
    assert len(texts) == len(set(texts))
    sentences = [s.strip() for s in health.replace("\n", " ").split(".") if len(s.split()) > 4]
    assert len(sentences) > 10
    assert not [s for s in sentences if any(s in text for text in texts)]
