"""Our batched metrics against EasyEdit's own functions, one record at a time, value by value."""

import contextlib
import json
import math
import re

import numpy as np
import pytest
import torch
from helpers.toys import toy_model, toy_requests, toy_tokenizer

from locft_easyedit.data.readers import read_requests
from locft_easyedit.easyedit.cuda_as_cpu import CudaAsCPU, needs_cuda_as_cpu
from locft_easyedit.easyedit.importing import load_easyedit
from locft_easyedit.evaluation.fluency import fluency_of
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.evaluation.teacher_forced import TeacherForced, finish_locality_
from locft_easyedit.hparams import LocFTBFHyperParams

HPARAMS = LocFTBFHyperParams(
    layers=[2], rewrite_module_tmp="model.layers.{}.mlp.down_proj", lr=1e-3, device="cpu"
)
SLICES = (
    "zsre_1k",
    "counterfact_1k",
    pytest.param("wikidata_counterfact_400", marks=pytest.mark.slow),
    pytest.param("wikidata_recent_200", marks=pytest.mark.slow),
    "knowedit_zsre_300",
)


def score_records(model, tokenizer, records, how=None):
    return TeacherForced(model, tokenizer, records, how or EvalConfig()).measure("")


@pytest.fixture(scope="module")
def easyedit():
    pytest.importorskip("nltk", reason="EasyEdit needs nltk: pip install locft_easyedit[easyedit]")
    return load_easyedit()


def theirs(easyedit, model, tokenizer, records):
    device = 0 if easyedit.is_release else "cpu"
    with CudaAsCPU() if needs_cuda_as_cpu(easyedit) else contextlib.nullcontext():
        return [
            easyedit.compute_edit_quality(model, "llama", HPARAMS, tokenizer, record, device)
            for record in records
        ]


def assert_equal(ours, expected):
    """Equal in every key that EasyEdit has; NaN equals NaN, as JSON writes both."""
    assert len(ours) == len(expected)
    for mine, other in zip(ours, expected, strict=True):
        mine = {key: mine[key] for key in other}
        assert json.dumps(mine, sort_keys=True) == json.dumps(other, sort_keys=True)


def records_with_lists(n):
    """Locality and portability with several prompts of different lengths a record."""
    records = toy_requests(n)
    for i, record in enumerate(records):
        record["locality"]["many"] = {
            "prompt": [
                "The river is",
                f"Once more, the river near {record['subject']} is the",
                "A",
            ],
            "ground_truth": ["Rhine", "Loire and the Rhine", "bridge"],
        }
        record["portability"]["one_in_a_list"] = {"prompt": ["At home,"], "ground_truth": ["Ibsen"]}
        if i % 3 == 0:
            del record["rephrase_prompt"]
            record["portability"] = {}
    return records


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gptj", "gemma3"])
@pytest.mark.parametrize("bos", [False, True])
def test_toy_models(easyedit, kind, bos):
    tokenizer = toy_tokenizer(bos=bos, pad_is_eos=True)
    tokenizer.padding_side = "left"
    model, records = toy_model(kind), records_with_lists(9)
    # Padding on the left moves positions: gpt2, which learned them, notices.
    assert_equal(
        score_records(model, tokenizer, records, EvalConfig(7, 50)),
        theirs(easyedit, model, tokenizer, records),
    )


def test_text_that_holds_the_pad_token(easyedit):
    tokenizer = toy_tokenizer(pad_is_eos=True)
    records = toy_requests(3)
    records[0]["prompt"] += " </s> and"
    records[1]["target_new"] += " </s>"
    records[2]["target_new"] = "</s>"
    model = toy_model("llama")
    assert_equal(
        score_records(model, tokenizer, records), theirs(easyedit, model, tokenizer, records)
    )


@pytest.mark.parametrize("name", SLICES)
def test_real_records(easyedit, smollm2, shared_data, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")  # as BaseEditor sets it
    records = read_requests(shared_data / f"{name}.json", 10)
    assert_equal(
        score_records(model, tokenizer, records), theirs(easyedit, model, tokenizer, records)
    )


def test_fluency_with_the_same_random_state(easyedit, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk, "word_tokenize", str.split)  # its data is a download
    model, tokenizer = toy_model("llama"), toy_tokenizer(pad_is_eos=True)
    model.name_or_path = "llama"  # for other names EasyEdit's sampling fails on transformers 5
    records = toy_requests(3)
    torch.manual_seed(5)
    ours = fluency_of(model, tokenizer, records, words=str.split)
    torch.manual_seed(5)
    expected = [
        easyedit.test_generation_quality(
            model=model, tok=tokenizer, prefixes=[r["prompt"]], max_out_len=100
        )
        for r in records
    ]
    for mine, other in zip(ours, expected, strict=True):
        assert mine == pytest.approx(other)


def made_up_metrics():
    model, tokenizer, records = toy_model("llama"), toy_tokenizer(), records_with_lists(7)
    other = toy_model("llama", seed=1)
    metrics = []
    for pre, post, record in zip(
        score_records(model, tokenizer, records),
        score_records(other, tokenizer, records),
        records,
        strict=True,
    ):
        metrics.append({"pre": pre, "post": post, "requested_rewrite": record})
    return metrics


def test_locality_and_summary_of_the_current_source(easyedit, tmp_path, monkeypatch, capsys):
    if easyedit.is_release:
        pytest.skip("the release has no function of its own for these; set EASYEDIT_HOME")
    from easyeditor.editors.editor import finalize_locality_metrics
    from easyeditor.editors.utils import summary_metrics

    ours, expected = made_up_metrics(), made_up_metrics()
    for mine, other in zip(ours, expected, strict=True):
        finish_locality_(mine["pre"], mine["post"])
        finalize_locality_metrics(other, other["requested_rewrite"], HPARAMS, "llama")
    assert_equal(ours, expected)

    monkeypatch.chdir(tmp_path)  # it writes a log where it stands
    capsys.readouterr()
    summary_metrics(expected)
    printed = re.search(r"Metrics Summary:  (.*)", capsys.readouterr().out).group(1)
    wanted = eval(printed, {"np": np, "nan": math.nan})
    del wanted["metric_protocols"]
    assert summarize(ours) == wanted


def test_locality_is_the_share_of_tokens_that_stayed():
    metrics = made_up_metrics()
    for entry in metrics:
        finish_locality_(entry["pre"], entry["post"])
        before = entry["pre"]["locality"]["many_output"]
        after = entry["post"]["locality"]["many_output"]
        shares = [
            sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
            for a, b in zip(before, after, strict=True)
        ]
        assert entry["post"]["locality"]["many_acc"] == pytest.approx(shares)
    metrics[0]["pre"]["locality"]["many_output"].pop()
    with pytest.raises(ValueError, match="2 outputs before the edit and 3 after"):
        finish_locality_(metrics[0]["pre"], metrics[0]["post"])
