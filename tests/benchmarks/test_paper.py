"""The studies of the paper's claims, on a toy: what is run, what is said of it, what is drawn."""

import json
import random
import runpy
import sys

import pytest
from helpers.toys import REPOSITORY, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.data.forms import ChatTemplate
from locft_easyedit.evaluation.evaluation import Evaluation
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.hparams import LocFTBFHyperParams

FOLDER = REPOSITORY / "benchmarks" / "paper"
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"


@pytest.fixture
def study(monkeypatch, capsys, toy_folder):
    """Runs a study on twelve edits, in this process; returns what it prints."""
    (toy_folder / "edits.json").write_text(json.dumps(toy_requests(12)))

    def with_arguments(name, *arguments, output="out"):
        monkeypatch.syspath_prepend(FOLDER.parent)
        monkeypatch.syspath_prepend(FOLDER)
        given = ["--model", "toy", "--hparams", "toy.yaml", "--data", "edits.json"]
        given += ["--seeds", "0", "--output", output, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        for made in ("table.md", "summary.json", "study.png"):
            assert (toy_folder / output / made).stat().st_size > 0
        return capsys.readouterr().out

    return with_arguments


def lines(folder="out"):
    with open(f"{folder}/runs.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def said(folder="out"):
    with open(f"{folder}/summary.json", encoding="utf-8") as file:
        return json.load(file)["seen"]


def test_edits_are_looked_at_shard_by_shard(study):
    told = study("depth_first", "--n", 5, "--only", "FT-M_depth_first", "FT-M_breadth_first",
                 "--all", "lr=5e-2,num_steps=20")  # fmt: skip
    depth, breadth = lines()
    assert depth["changes"]["pipeline"] == "depth_first"
    assert [point["edits"] for point in depth["points"]] == [1, 2, 3, 4, 5]
    assert [point["epochs"] for point in breadth["points"]] == [1, 2, 4, 8, 20]
    for line in (depth, breadth):
        shards = line["points"][-1]["reliability"]
        assert sum(shards) / 5 == pytest.approx(line["figures"]["reliability"])
    # Each shard is one edit here: the first is known once it was trained, others are not yet.
    assert depth["points"][0]["reliability"][0] == 1.0
    assert sum(depth["points"][0]["reliability"]) < 5
    assert sum(breadth["points"][-1]["reliability"]) > sum(breadth["points"][0]["reliability"])
    [sentence] = said()
    assert "FT-M, depth-first to breadth-first" in sentence
    assert sentence in told
    assert sentence.endswith("Seen.") == (
        breadth["figures"]["reliability"] > depth["figures"]["reliability"]
    )


def test_more_edits_than_half_of_a_file_have_no_shards(study):
    with pytest.raises(SystemExit, match="more than half"):
        study("depth_first", "--n", 8, "--only", "FT-M_depth_first")


def test_mini_batches_and_capability(study):
    study("mini_batches", "--n", 4, "--only", 1, 4, "--all", "num_steps=3")
    one, four = lines()
    assert (one["updates"], four["updates"]) == (12, 3)
    assert 0 <= one["figures"]["capability"] <= 1
    assert "capability" in one["before"]
    assert "from 1 to 4 edits a step" in said()[0]


def test_more_edits_as_published(study):
    study("more_edits", "--n", 2, 6, "--only", "as_published")
    assert [line["edits"] for line in lines()] == [2, 6]
    assert "from 2 to 6 edits" in said()[0]


def test_places_are_told_by_module_and_layer(study):
    study("places", "--n", 3, "--only", "down_1", "mlp_1", "--all", "lr=5e-2,num_steps=20")
    down, mlp = lines()
    assert down["changes"]["layers"] == mlp["changes"]["layers"] == [1]
    assert mlp["figures"]["kl"] != down["figures"]["kl"]
    [sentence] = said()
    n_learned = sum(line["figures"]["reliability"] >= 0.9 for line in lines())
    assert f"{n_learned} of 2 places" in sentence
    assert "in layer 1" in sentence


def test_methods_is_a_comparison(toy_folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    given = ["--config-name", "toy.yaml", "data=edits.json", "n=2", "methods=[LocFT-BF]"]
    monkeypatch.setattr(sys, "argv", ["methods.py", *given, "output=out"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / "methods.py"), run_name="__main__")
    assert end.value.code == 0
    assert "locft_basics" in capsys.readouterr().out


def test_each_edit_gets_five_prefixes_of_the_models_own(study):
    study("prefixes", "--n", 4)
    plain, prefixed = lines()
    assert [line["data"] for line in (plain, prefixed)] == ["edits.json", "edits_prefixes.json"]
    with open("out/edits_prefixes.json", encoding="utf-8") as file:
        requests = json.load(file)
    for request in requests:
        assert len({*request["rewordings"]}) == 5
        assert all(text.endswith(f". {request['prompt']}") for text in request["rewordings"])
    assert prefixed["figures"] != plain["figures"]


def test_the_port_asks_in_chat_as_it_trains(study, toy_folder):
    tokenizer = toy_tokenizer(pad_is_eos=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(toy_folder / "toy")
    study("port", "--n", 4, "--only", "edit", "token")
    found = [(line["data"], line["variant"]) for line in lines()]
    assert found == [(f"edits{where}.json", variant) for where in ("", "_in_chat")
                     for variant in ("edit", "token")]  # fmt: skip
    with open("out/edits_in_chat.json", encoding="utf-8") as file:
        requests = json.load(file)
    plain = toy_requests(12)
    asked = ChatTemplate(tokenizer).ask(plain[0]["prompt"])
    assert requests[0]["prompt"] == asked
    assert requests[0]["target_new"] == plain[0]["target_new"]
    # What is measured of the file in chat is what a hand-made edit gives.
    model, half = toy_model("llama"), requests[6:]
    drawn = [request for request in half if request["prompt"] in drawn_prompts(half)]
    hparams = LocFTBFHyperParams.from_hparams("toy.yaml")
    hparams.seed = 0
    edit_model(model, tokenizer, drawn, hparams, progress=False)
    evaluation = Evaluation(model, tokenizer, drawn, metrics=["generated"])
    found = summarize([{"post": one} for one in evaluation.measure()])
    share = found["post"]["generated"]["reliability"]
    assert lines()[2]["figures"]["reliability"] == pytest.approx(share)


def drawn_prompts(half):
    """The four prompts of these six that seed 0 draws."""
    return {half[i - 6]["prompt"] for i in random.Random(0).sample(range(6, 12), 4)}
