"""Edits as adapters: peft loads them, they answer as the edit, and they can be switched off."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.toys import (
    DOWN_PROJECTION,
    made_delta,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from locft_easyedit.__main__ import main
from locft_easyedit.api import edit_model
from locft_easyedit.delta.delta import Delta
from locft_easyedit.delta.low_rank import low_rank_factors
from locft_easyedit.errors import DeltaError, OutputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(3, 63).view(3, 20)
# Logits are of size 10; factors are rounded to float32, and added to the output, not the matrix.
ROUNDING = 2e-4


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def saved(path, model):
    model.save_pretrained(path)
    toy_tokenizer(pad_is_eos=True).save_pretrained(path)
    return path


def loaded(path, adapter, dtype=torch.float32):
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return PeftModel.from_pretrained(base, adapter).eval()


def several(names, model, change):
    """Returns an edit of several matrices of `model`, which then holds it."""
    parameters = dict(model.named_parameters())
    original = {name: parameters[name].detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            parameters[name].add_(change(parameters[name]))
    new = {name: parameters[name].detach().clone() for name in names}
    result = SimpleNamespace(new=new, original=original, losses=[], lora=None)
    return Delta.from_result(result, model, toy_hparams(), toy_requests(3))


def of_rank(rank):
    """Returns a change of a rank, the same one for every shape."""

    def change(matrix):
        torch.manual_seed(0)
        return (
            torch.randn(matrix.shape[0], rank) @ torch.randn(rank, matrix.shape[1]) / rank**0.5
        ).to(matrix.dtype)

    return change


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base", toy_model())


# The matrices themselves


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"])
def test_an_exact_adapter(tmp_path, kind, dtype):
    saved(tmp_path / "base", toy_model(kind).to(dtype))
    # Loaded, because `to` rounds what loading leaves in float32: the rotary frequencies.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    before = logits(model)
    made_delta(kind, model=model).export_adapter(tmp_path / "base", tmp_path / "out")
    adapted = loaded(tmp_path / "base", tmp_path / "out", dtype)
    assert torch.equal(logits(adapted), logits(model))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    assert not torch.equal(before, logits(model))


def test_an_exact_adapter_of_many_kinds_of_parameters(tmp_path):
    model = toy_model("gpt2")
    saved(tmp_path / "base", model)
    names = [name for name, _ in model.named_parameters() if ".h.1." in name]
    delta = several(names, model, lambda p: torch.full_like(p, 0.1) * torch.rand_like(p))
    delta.export_adapter(tmp_path / "base", tmp_path / "out")
    assert torch.equal(logits(loaded(tmp_path / "base", tmp_path / "out")), logits(model))


def test_an_adapter_loads_as_a_model(tmp_path, base):
    model = toy_model()
    made_delta(model=model).export_adapter(base, tmp_path / "out")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model)
    )
    (tmp_path / "edits.json").write_text(json.dumps(toy_requests(2)))
    arguments = [f"data={tmp_path}/edits.json", f"output={tmp_path}/measured"]
    assert main(["evaluate", str(tmp_path / "out"), *arguments]) == 0


def test_a_merged_model(tmp_path, base):
    model = toy_model()
    made_delta(model=model).apply_to_folder(base, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(merged), logits(model))


# Low rank


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_change_of_low_rank_is_held_by_that_rank(tmp_path, kind):
    model = toy_model(kind)
    saved(tmp_path / "base", model)
    before = logits(model)
    delta = several([DOWN_PROJECTION[kind].format(2)], model, of_rank(3))
    for rank, right in ((3, True), (2, False), (30, True)):
        out = tmp_path / str(rank)
        left_out = delta.export_lora(tmp_path / "base", out, rank=rank)
        assert (left_out < 1e-6) == right
        adapted = loaded(tmp_path / "base", out)
        assert ((logits(adapted) - logits(model)).abs().max() < ROUNDING) == right
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), before)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == min(rank, 3)
        assert config["fan_in_fan_out"] == (kind == "gpt2")


def test_each_matrix_has_the_rank_it_needs(tmp_path, base):
    model = toy_model()
    up, down = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("up", "down"))
    ranks = {up: 5, down: 2}
    parameters = dict(model.named_parameters())
    names = {id(parameters[name]): name for name in ranks}
    delta = several(list(ranks), model, lambda p: of_rank(ranks[names[id(p)]])(p))
    delta.export_lora(base, tmp_path / "out", rank=8)
    adapted = loaded(base, tmp_path / "out")
    assert (logits(adapted) - logits(model)).abs().max() < ROUNDING
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {down.removesuffix(".weight"): 2}


def test_factors_are_the_best_of_their_rank():
    delta = made_delta()
    [(name, new)] = delta.new.items()
    change = (new - delta.original[name]).double()
    singular = torch.linalg.svdvals(change)
    for rank, expected in ((1, 1), (7, 7), (31, 31), (32, 32), (100, 32)):
        factors, left_out, enough = low_rank_factors(delta, rank)
        # The rank that is named leaves out 5 % at most, and one less leaves out more.
        assert low_rank_factors(delta, enough)[1] <= 0.05
        assert enough == 1 or low_rank_factors(delta, enough - 1)[1] > 0.05
        a, b = factors[name]
        assert (a.shape, b.shape) == ((expected, 64), (32, expected))
        left = float((change - (b @ a).double()).norm())
        assert left == pytest.approx(float(singular[rank:].norm()), abs=1e-4)
        assert left_out == pytest.approx(left / float(change.norm()), abs=1e-5)
        assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-4)  # neither is larger


def trained_as_lora(model, rank, alpha):
    """Returns an edit whose factors are known."""
    name = "model.layers.2.mlp.down_proj.weight"
    torch.manual_seed(1)
    a, b = torch.randn(rank, 64), torch.randn(32, rank)
    parameter = dict(model.named_parameters())[name]
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(alpha / rank * (b @ a))
    adapter = SimpleNamespace(rank=rank, alpha=alpha, a={name: a}, b={name: b})
    result = SimpleNamespace(
        new={name: parameter.detach().clone()},
        original={name: original},
        losses=[],
        lora=adapter,
    )
    return Delta.from_result(result, model, toy_hparams(), toy_requests(3)), a, b


def test_an_edit_that_was_trained_as_lora(tmp_path, base):
    from safetensors.torch import load_file

    model = toy_model()
    delta, a, b = trained_as_lora(model, 4, 6.0)
    delta.save(tmp_path / "edit")
    Delta.load(tmp_path / "edit").export_lora(base, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_{}.weight"
    assert torch.equal(tensors[key.format("A")], a)
    assert torch.equal(tensors[key.format("B")], b)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    adapted = loaded(base, tmp_path / "out")
    assert (logits(adapted) - logits(model)).abs().max() < ROUNDING


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_training_as_lora_is_served_as_it_was_trained(tmp_path, kind):
    """From `tuning: lora` through the file to an adapter that peft loads."""
    base = saved(tmp_path / "base", toy_model(kind))
    model = toy_model(kind)
    hparams = toy_hparams(
        tuning="lora", lora_rank=3, lora_alpha=5.0, rewrite_module_tmp=DOWN_PROJECTION[kind]
    )
    requests = toy_requests(8)
    result = edit_model(model, toy_tokenizer(), requests, hparams, progress=False)
    Delta.from_result(result, model, hparams, requests).save(tmp_path / "edit")
    Delta.load(tmp_path / "edit").export_lora(base, tmp_path / "out")
    adapted = loaded(base, tmp_path / "out")
    assert (logits(adapted) - logits(model)).abs().max() < ROUNDING
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(toy_model(kind)))
    assert (logits(model) - logits(toy_model(kind))).abs().max() > 1000 * ROUNDING


# Refusals


def test_what_lora_cannot_hold(tmp_path):
    model = toy_model("gpt2")
    saved(tmp_path / "base", model)
    bias = several(["transformer.h.1.mlp.c_proj.bias"], model, torch.ones_like)
    with pytest.raises(DeltaError, match=r"c_proj.bias` is not the weight of a linear layer"):
        bias.export_lora(tmp_path / "base", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_edit(tmp_path, base):
    model = toy_model()
    delta = made_delta(model=model)
    saved(tmp_path / "edited", model)
    saved(tmp_path / "other", toy_model(seed=1))
    for method, more in ((delta.export_adapter, {}), (delta.export_lora, {"rank": 2})):
        with pytest.raises(DeltaError, match=r"does not belong to (.|\n)* is already in it"):
            method(tmp_path / "edited", tmp_path / "out", **more)
        with pytest.raises(DeltaError, match="The base is another model"):
            method(tmp_path / "other", tmp_path / "out", **more)
        with pytest.raises(OutputError, match="is there already"):
            method(base, tmp_path / "edited", **more)


def test_originals_come_from_the_base(tmp_path, base):
    model = toy_model()
    delta = made_delta(model=model)
    delta.without_originals().export_lora(base, tmp_path / "out", rank=32)
    assert (logits(loaded(base, tmp_path / "out")) - logits(model)).abs().max() < ROUNDING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`as` is missing. Add as=VALUE"),
        (["as=zip"], "`as=zip` must be one of model, adapter, lora"),
        (["as=lora"], "`rank` is missing: the edit was not trained as LoRA"),
        (["as=lora", "rank=0"], "`rank=0` must be 1 or more"),
        (["as=adapter", "rank=2"], "`rank` is for as=lora only"),
        (["as=model", "mode=x"], "Did you mean `model`"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, base, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    made_delta().save("edit")
    assert main(["delta", "export", "edit", "model=base", "output=out", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "as_" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["model", "adapter", "lora"])
def test_the_command(tmp_path, base, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    model = toy_model()
    made_delta(model=model).save("edit")
    more = ["rank=32"] if form == "lora" else []
    assert main(["delta", "export", "edit", "model=base", "output=out", f"as={form}", *more]) == 0
    printed = capsys.readouterr().out
    assert "out" in printed
    assert ("0.0 % of the change is left out" in printed) == (form == "lora")
    if form == "model":
        exported = AutoModelForCausalLM.from_pretrained("out")
    else:
        exported = loaded("base", "out")
    assert (logits(exported) - logits(model)).abs().max() <= (ROUNDING if form == "lora" else 0)


def test_a_rank_that_leaves_out_much_is_told_with_what_keeps_it(tmp_path, caplog):
    toy_model().save_pretrained(tmp_path / "base")
    delta = made_delta()
    delta.export_lora(tmp_path / "base", tmp_path / "small", rank=2)
    [message] = caplog.messages
    rank = int(re.search(r"rank=(\d+) keeps all but 5 %", message)[1])
    assert message.startswith("rank=2 leaves out ")
    assert "as=adapter" in message
    caplog.clear()
    assert delta.export_lora(tmp_path / "base", tmp_path / "large", rank=rank) <= 0.05
    assert caplog.messages == []
