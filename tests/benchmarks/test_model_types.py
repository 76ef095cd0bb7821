"""The sweep of model types: what it finds of a few, and that each of these can be planned."""

import pytest
import torch
from helpers.scripts import script_module
from helpers.toys import REPOSITORY
from transformers import AutoModelForCausalLM

from locft_easyedit.__main__ import main
from locft_easyedit.evaluation.generated import Generated
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.plan.reader import ModelReader

model_types = script_module(REPOSITORY / "benchmarks" / "checks" / "model_types.py")
tiny_models = script_module(REPOSITORY / "benchmarks" / "checks" / "tiny_models.py")


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {"state": "trains", "prefix": "matrix", "packed": True, "cache": True}),
        ("nemotron_h", {"state": "trains", "prefix": "mlp", "packed": False}),
        ("longcat_flash", {"state": "trains", "prefix": "layer"}),
        ("prophetnet", {"state": "trains", "prefix": None}),
        ("roberta", {"state": "refused", "reason": "trains with `is_decoder: true`"}),
        ("bert", {"state": "refused", "reason": "trains with `is_decoder: true`"}),
        ("no such type", {"state": "not built"}),
    ],
)
def test_what_is_found(model_type, expected):
    found = model_types.tried(model_type)
    assert found | expected == found
    [row] = model_types.table({model_type: found})["rows"]
    assert row[:2] == [model_type, expected["state"]]


@pytest.mark.parametrize("model_type", ["rwkv", "deepseek_v4", "mamba", "llama"])
def test_sizes_are_told_of_models_without_heads_or_with_experts_by_token(model_type):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_models.small_config(model_type))
    place = model_types.place_of(model)
    reader = ModelReader(model, model_type, [place.layer], place.templates)
    shapes = reader.shapes()
    assert shapes.attention > 0
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    for device in ("cpu", "cuda"):
        saved = reader.activations(torch.bfloat16, 64, device)
        assert all(one.total > 0 for one in saved)


@pytest.mark.parametrize("model_type", ["gemma4_text", "deepseek_v4", "rwkv"])
def test_the_command_plans_types_that_count_otherwise(model_type, tmp_path, monkeypatch, capsys):
    """Head sizes by layer, experts by token, no heads at all."""
    monkeypatch.setenv("COLUMNS", "200")
    model = model_types.tiny_model(model_type)
    place = model_types.place_of(model)
    model.config.save_pretrained(tmp_path / "model")
    arguments = ["plan", "--config-name", "smollm2-135m", f"model_name={tmp_path / 'model'}",
                 f"layers=[{place.layer}]", f"rewrite_module_tmp={place.rewrite_module_tmp}",
                 "n=100", "gpu=80GiB", "device=0"]  # fmt: skip
    assert main(arguments) == 0
    told = capsys.readouterr()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{n_parameters:,} in" in told.out
    assert "prefix_host_gib=" in told.out


@pytest.mark.parametrize("model_type", ["minimax", "deepseek_v4", "rwkv"])
def test_answers_of_caches_of_other_kinds_are_those_of_each_prompt_alone(model_type):
    model = model_types.tiny_model(model_type)
    tokenizer = model_types.word_tokenizer(model_types.WORDS)
    requests = model_types.random_requests(10, model_types.WORDS)
    answers = {
        size: [
            record["answer"]
            for record in Generated(model, tokenizer, requests, EvalConfig(size)).measure("x")
        ]
        for size in (1, 64)
    }
    assert answers[64] == answers[1]
    assert len(set(answers[1])) > 3
