"""Edits of single experts as files: only their slices are held, and the others are watched."""

import copy

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.delta import folder
from locft_easyedit.delta.apply import apply_deltas_, revert_deltas_
from locft_easyedit.delta.delta import Delta
from locft_easyedit.delta.folder import write_changed_folder
from locft_easyedit.delta.metadata import problems_of, sealed
from locft_easyedit.errors import DeltaError
from locft_easyedit.modeling.parameter_slices import parameters_named
from locft_easyedit.training.result import EditResult

DOWN = DOWN_PROJECTION["mixtral"].format(2)
OTHER = DOWN_PROJECTION["mixtral"].format(1)
ATTENTION = "model.layers.1.self_attn.o_proj.weight"


def made(model, *names, scale=1.5):
    """Returns an edit of these parameters that was made by hand; the model holds it afterwards."""
    parameters = parameters_named(model, names)
    original = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(-scale).add_(0.01)
    new = {name: p.detach().clone() for name, p in parameters.items()}
    edits = distinct_edits(toy_requests(3))
    result = EditResult([2.0], [], original, new, {}, 1, True, 3, edits, True, True)
    return Delta.from_result(result, model, toy_hparams())


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def saved(path, model):
    model.save_pretrained(path)
    toy_tokenizer(pad_is_eos=True).save_pretrained(path)
    return path


def test_a_file_holds_the_slice_alone_and_puts_it_there_and_back(tmp_path):
    model = toy_model("mixtral")
    base, before = copy.deepcopy(model), values_of(model)
    delta = made(model, f"{DOWN}[3]")
    delta.save(tmp_path / "edit")
    loaded = Delta.load(tmp_path / "edit")
    assert loaded.new[f"{DOWN}[3]"].shape == model.get_parameter(DOWN).shape[1:]
    assert loaded.metadata["frozen"].keys() >= {f"{DOWN}[{i}]" for i in (0, 1, 2)}
    assert not loaded.metadata["frozen"].keys() & {DOWN, f"{DOWN}[3]"}
    assert loaded.verify(base).state == "base"
    assert loaded.verify(model).state == "applied"
    with loaded.applied(base):
        assert same(values_of(base), values_of(model))
    assert same(values_of(base), before)
    loaded.apply_(base)
    assert same(values_of(base), values_of(model))
    loaded.revert_(base)
    assert same(values_of(base), before)
    lean = loaded.without_originals().with_originals(before)
    assert torch.equal(lean.original[f"{DOWN}[3]"], before[DOWN][3])


@pytest.mark.parametrize("expert", [0, 3])
def test_a_change_of_another_expert_shows(expert):
    model = toy_model("mixtral")
    delta = made(model, f"{DOWN}[1]")
    with torch.no_grad():
        model.get_parameter(DOWN)[expert].mul_(2)
    report = delta.verify(model)
    assert report.state == "neither"
    assert f"`{DOWN}[{expert}]`: 1 of" in report.differences[0]


def test_a_model_with_fewer_experts_is_another_one():
    delta = made(toy_model("mixtral"), f"{DOWN}[3]")
    [line] = delta.verify(toy_model("mixtral", num_local_experts=3)).differences
    assert line == (f"`{DOWN}[3]`: it is not in the model, whose `{DOWN}` is [3, 32, 64].")
    assert "it is not in the model." in delta.verify(toy_model("llama")).differences[0]


STACKS = {
    "one expert, another": [[f"{DOWN}[3]"], [f"{DOWN}[1]"], [f"{DOWN}[3]"]],
    "an expert, then all": [[f"{DOWN}[3]"], [DOWN], [f"{DOWN}[0]"]],
    "all, an expert, all": [[DOWN], [f"{DOWN}[2]"], [DOWN]],
    "elsewhere in between": [[f"{DOWN}[3]", f"{DOWN}[0]"], [ATTENTION], [f"{OTHER}[1]"]],
}


@pytest.mark.parametrize("names", STACKS.values(), ids=STACKS)
def test_edits_one_on_top_of_the_other(names, tmp_path, monkeypatch):
    model = toy_model("mixtral")
    base, states, deltas = copy.deepcopy(model), [values_of(model)], []
    for i, edited in enumerate(names):
        deltas.append(made(model, *edited, scale=1.5 + i))
        states.append(values_of(model))
    apply_deltas_(base, deltas)
    assert same(values_of(base), states[3])
    revert_deltas_(base, deltas[::-1])
    assert same(values_of(base), states[0])
    with pytest.raises(DeltaError, match="cannot be applied to MixtralForCausalLM"):
        apply_deltas_(base, deltas[1:])
    assert same(values_of(base), states[0])

    saved(tmp_path / "base", base)  # its experts have other names on disk: it is loaded
    assert write_changed_folder(deltas, tmp_path / "base", tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(values_of(out), states[3])
    assert write_changed_folder(deltas[::-1], tmp_path / "out", tmp_path / "back", reverted=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert same(values_of(back), states[0])


@pytest.mark.parametrize("names", STACKS.values(), ids=STACKS)
def test_files_with_fused_experts_are_rewritten_where_they_are(names, tmp_path, monkeypatch):
    model = toy_model("mixtral")
    path = saved(tmp_path / "base", model)
    fused = {name: p.detach().clone() for name, p in model.named_parameters()}
    for file in path.glob("model*.safetensors*"):
        file.unlink()
    save_file(fused, path / "model.safetensors", metadata={"format": "pt"})
    deltas = [made(model, *edited, scale=1.5 + i) for i, edited in enumerate(names)]
    monkeypatch.setattr(folder, "load_causal_lm", None)
    assert not write_changed_folder(deltas, path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())
    assert not write_changed_folder(
        deltas[::-1], tmp_path / "out", tmp_path / "back", reverted=True
    )
    both = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("base", "back"))
    assert len(set(both)) == 1
    lean = deltas[0].without_originals().with_originals(path)
    assert same(lean.original, deltas[0].original)


def test_an_adapter_holds_the_experts_with_the_edited_one_among_them(tmp_path):
    model = toy_model("mixtral")
    path = saved(tmp_path / "base", model)
    delta = made(model, f"{DOWN}[3]")
    delta.export_adapter(path, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(3, 63).view(3, 20)
    with torch.no_grad():
        before, expected = base(ids).logits, model(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(adapted(ids).logits, expected)
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, before)
    assert not torch.equal(before, expected)
    with pytest.raises(DeltaError, match=r"is not the weight of a linear layer"):
        delta.export_lora(path, tmp_path / "lora", rank=4)


def test_a_file_that_names_a_part_beside_the_whole_is_refused():
    model = toy_model("mixtral")
    delta = made(model, f"{DOWN}[3]")
    frozen = delta.metadata["frozen"] | {DOWN: "0" * 16}
    [line] = problems_of(sealed(delta.metadata | {"frozen": frozen}))
    assert line == f"`{DOWN}[0]` is named beside `{DOWN}`, which it is in."
