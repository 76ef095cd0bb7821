"""What a call of the editor must not do when it is refused, repeated, or handled carelessly."""

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer
from test_editor import columns, same, weights
from torch import nn

from locft_easyedit.api import edit_model
from locft_easyedit.data.requests import distinct_edits, make_requests
from locft_easyedit.errors import LocFTError, PlaceError, RequestError
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.places import select_place
from locft_easyedit.training.trained_weights import TrainedWeights

HPARAMS = toy_hparams(num_steps=2)


def test_a_refused_call_leaves_the_edits_of_the_last_one_in(editor):
    editor.edit_requests(toy_requests(1), verbose=False)
    edited = weights(editor.model)
    requests = toy_requests(2)
    requests[1]["rephrase_prompt"] = " "
    for refused in (
        lambda: editor.edit("", "x", verbose=False),
        lambda: editor.edit_requests(None, verbose=False),
        lambda: editor.edit_requests(requests, verbose=False),
        lambda: editor.batch_edit(["a"], ["b", "c"], verbose=False),
        lambda: editor.normal_edit([" "], ["b"]),
    ):
        with pytest.raises(RequestError):
            refused()
        assert same(weights(editor.model), edited)


def test_measurements_of_other_requests_are_refused_before_training(editor):
    before = weights(editor.model)
    for kept in (
        [{"pre": {"locality": {}, "portability": {}}}] * 2,
        [{}] * 2,
        [{"pre": {"locality": {"neighborhood_output": [[1], [2]]}}}] * 2,
    ):
        with pytest.raises(LocFTError, match="`pre_edit` is of other requests"):
            editor.edit_requests(
                toy_requests(2), sequential_edit=True, pre_edit=kept, verbose=False
            )
        assert same(weights(editor.model), before)


def test_the_returned_weights_are_the_callers_own(editor):
    before = weights(editor.model)
    _, _, former = editor.batch_edit(**columns(toy_requests(3)), verbose=False)
    for value in former.values():
        value.zero_()
    former.clear()
    editor.batch_edit(**columns(toy_requests(3)), verbose=False)
    _, _, former = editor.batch_edit(**columns(toy_requests(3)), verbose=False)
    assert former
    assert same(former, before)


def test_place_and_rate_may_change_between_calls(editor):
    before = weights(editor.model)
    editor.edit_requests(toy_requests(2), verbose=False)
    editor.hparams.layers = [1]
    _, _, former = editor.batch_edit(**columns(toy_requests(2)), verbose=False)
    assert list(former) == [DOWN_PROJECTION["llama"].format(1)]
    after = weights(editor.model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(former)


def test_a_failure_after_the_last_step_restores_as_well(monkeypatch):
    model = toy_model("llama")
    before = weights(model)

    def no_memory(self):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(TrainedWeights, "values", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        edit_model(model, toy_tokenizer(), toy_requests(3), HPARAMS, progress=False)
    assert same(weights(model), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_may_have_turned_gradients_off(mode):
    expected = edit_model(
        toy_model("llama"), toy_tokenizer(), toy_requests(3), HPARAMS, progress=False
    )
    model = toy_model("llama")
    with mode():
        result = edit_model(model, toy_tokenizer(), toy_requests(3), HPARAMS, progress=False)
    assert result.step_losses == expected.step_losses


def test_the_callers_gradients_stay():
    model = toy_model("llama")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    edit_model(model, toy_tokenizer(), toy_requests(3), HPARAMS, progress=False)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_targets_that_differ_in_their_leading_space_are_one():
    edits = distinct_edits(make_requests(["p", "p", "q"], ["Paris", " Paris", "x"]), "error")
    assert (len(edits.edits), edits.n_merged, edits.n_conflicts) == (2, 1, 0)
    assert edits.edit_of_request == [0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "x"), "prompts is a NoneType"),
        ((5, "x"), "prompts is a int"),
        ((["a"], None), "target_new is a NoneType"),
        (
            (["a"], ["b"], None, None, None, {"near": None}),
            r"locality_inputs\['near'\]\['prompt'\]: missing",
        ),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_named(arguments, message):
    with pytest.raises(RequestError, match=message):
        make_requests(*arguments)


def test_evaluation_prompts_beyond_the_context_are_refused(editor):
    requests = toy_requests(2)
    requests[1]["rephrase_prompt"] = "The river " * 300
    before = weights(editor.model)
    with pytest.raises(RequestError, match=r"request 1, rephrase has \d+ tokens.* is 256"):
        editor.edit_requests(requests, sequential_edit=True, verbose=False)
    assert same(weights(editor.model), before)


def test_unsuitable_precisions_and_quantized_layers_are_refused_with_the_reason():
    with pytest.raises(PlaceError, match="float64; train float32"):
        select_place(toy_model("llama").double(), [2], [DOWN_PROJECTION["llama"]])
    model = toy_model("llama")
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    model.model.layers[2].mlp.down_proj = packed
    with pytest.raises(PlaceError, match="is quantized"):
        select_place(model, [2], [DOWN_PROJECTION["llama"]])


def test_secrets_are_not_written():
    h = LocFTBFHyperParams(layers=[2], rewrite_module_tmp="a.{}", lr=1e-2, api_key="secret")
    assert "secret" not in str(h.to_dict())
