"""LocFT-BF inside EasyEdit: the release in CI, the current source where EASYEDIT_HOME says so."""

import inspect
import json
import logging
import os
import signal

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, loaded_hparams, toy_model, toy_requests, toy_tokenizer

import locft_easyedit
from locft_easyedit.api import edit_model
from locft_easyedit.easyedit import chat, editor_class
from locft_easyedit.errors import (
    EditInterrupted,
    HyperParamsError,
    LocFTError,
    ModelError,
    OutputError,
    RequestError,
)
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.teacher_forced import TeacherForced
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.training.step import TrainingStep

YAML = """
alg_name: LocFT-BF
model_name: {model}
device: cpu
layers: [2]
rewrite_module_tmp: model.layers.{{}}.mlp.down_proj.weight
lr: 1e-2
num_steps: 3
batch_size: 4
"""


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def columns(requests):
    """Requests as the arguments of `edit`."""
    part = {
        f"{name}_inputs": {
            key: {
                field: [r[name][key][field] for r in requests]
                for field in ("prompt", "ground_truth")
            }
            for key in requests[0][name]
        }
        for name in ("locality", "portability")
    }
    return {
        "prompts": [r["prompt"] for r in requests],
        "target_new": [r["target_new"] for r in requests],
        "rephrase_prompts": [r["rephrase_prompt"] for r in requests],
        "subject": ["not in any prompt"] * len(requests),
        **part,
    }


# Registration


def test_registering_adds_the_method_and_unregistering_puts_everything_back(easyedit, tmp_path):
    locft_easyedit.unregister()
    ft = next(c for c in easyedit.HyperParams.__subclasses__() if c.__name__ == "FTHyperParams")
    watched = [
        (easyedit.BaseEditor, "from_hparams"),
        (easyedit.BaseEditor, "__init__"),
        (easyedit.BaseEditor, "edit"),
        (easyedit.BatchEditor, "is_batchable_method"),
        (ft, "from_hparams"),
    ]
    before = [vars(cls)[name] for cls, name in watched]
    methods = dict(easyedit.ALG_DICT)
    assert "LocFT-BF" not in methods
    for _ in range(2):
        locft_easyedit.register()
    assert set(easyedit.ALG_DICT) == {*methods, "LocFT-BF", "LocFT-BF+"}
    assert easyedit.BatchEditor.is_batchable_method("LocFT-BF+")
    assert easyedit.BatchEditor.is_batchable_method("LocFT-BF")
    assert easyedit.BatchEditor.is_batchable_method("MEMIT")
    assert not easyedit.BatchEditor.is_batchable_method("ROME")
    assert issubclass(editor_class(), easyedit.BaseEditor)
    assert editor_class().__name__ == "LocFTBFEditor"

    path = tmp_path / "ours.yaml"
    path.write_text(YAML.format(model="somewhere"))
    assert isinstance(ft.from_hparams(str(path)), LocFTBFHyperParams)
    assert isinstance(ft.from_hparams(str(path.with_suffix(""))), LocFTBFHyperParams)
    other = tmp_path / "other.yaml"
    other.write_text("alg_name: ROME\n")
    with pytest.raises((AssertionError, ValueError, KeyError)):  # FT's own refusal
        ft.from_hparams(str(other))

    for _ in range(2):
        locft_easyedit.unregister()
    assert [vars(cls)[name] for cls, name in watched] == before
    assert dict(easyedit.ALG_DICT) == methods
    assert editor_class() is None


def test_the_preset_is_a_method_of_easyedit(easyedit, tmp_path):
    path = tmp_path / "plus.yaml"
    text = YAML.format(model="somewhere").replace("LocFT-BF", "LocFT-BF+")
    path.write_text(f"{text}preserve_dir: {tmp_path / 'kept'}\n")
    locft_easyedit.register()
    hparams = LocFTBFHyperParams.from_hparams(str(path))
    hparams.model_name = (toy_model(), toy_tokenizer())
    editor = easyedit.BaseEditor.from_hparams(hparams)
    requests = [request | {"subject": request["prompt"].split()[0]} for request in toy_requests(4)]
    subjects = [request["subject"] for request in requests]
    metrics, _, _ = editor.batch_edit(**columns(requests) | {"subject": subjects})
    result = editor.last_result
    assert len(metrics) == 4
    assert result.augmented["forms"] == ["plain", "question_answer", "context"]  # no template
    sources = {"sampled", "neighbours", "context"}
    assert set(result.preserved["sources"]) == sources
    assert result.preserved["sources"]["neighbours"]["prompts"] > 4
    assert result.losses[-1] < result.losses[0]
    # What was measured of the model is found again.
    assert any((tmp_path / "kept").rglob("*"))


def test_the_editor_comes_from_base_editor(easyedit):
    editor = easyedit.BaseEditor.from_hparams(loaded_hparams())
    assert type(editor).__name__ == "LocFTBFEditor"
    assert isinstance(editor, easyedit.BaseEditor)
    assert editor.hparams.alg_name == editor.alg_name == "LocFT-BF"


def test_signatures_are_those_of_the_current_easyedit(easyedit):
    if easyedit.is_release:
        pytest.skip("the release has older signatures; set EASYEDIT_HOME to compare")
    for name in ("edit", "batch_edit", "edit_requests", "normal_edit", "generate_edit"):
        ours = inspect.signature(getattr(editor_class(), name)).parameters
        theirs = inspect.signature(getattr(easyedit.BaseEditor, name)).parameters
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ], name


def test_the_function_in_alg_dict_edits_a_model(easyedit):
    model, tokenizer, h = toy_model("llama"), toy_tokenizer(), loaded_hparams()
    before = weights(model)
    requests = toy_requests(4)
    edited, former = easyedit.ALG_DICT["LocFT-BF"](
        model, tokenizer, requests, h, copy=True, return_orig_weights=True, train_ds=None
    )
    assert same(weights(model), before)
    assert not same(weights(edited), before)
    assert same(former, before)
    same_model, nothing = easyedit.ALG_DICT["LocFT-BF"](model, tokenizer, requests, h)
    assert same_model is model
    assert nothing == {}
    assert same(weights(model), weights(edited))


# Editing


@pytest.mark.parametrize("call", ["edit", "batch_edit"])
def test_edits_are_trained_together_and_measured_after_all_of_them(editor, call):
    requests = toy_requests(6)
    before = weights(editor.model)
    reference = toy_model("llama")
    expected = edit_model(reference, editor.tok, requests, editor.hparams, progress=False)

    editor.hparams.batch_size = 4  # as EasyEdit's scripts do; a chunk is never trained by itself
    metrics, model, former = getattr(editor, call)(
        **columns(requests), sequential_edit=True, verbose=False, keep_original_weight=True
    )
    assert model is editor.model
    assert same(weights(model), weights(reference))
    assert same(former, before)
    assert editor.last_result.step_losses == expected.step_losses
    assert [m["case_id"] for m in metrics] == list(range(6))
    assert [m["requested_rewrite"]["prompt"] for m in metrics] == [r["prompt"] for r in requests]
    after = TeacherForced(model, editor.tok, requests, EvalConfig()).measure("")
    for entry, score in zip(metrics, after, strict=True):
        assert entry["post"]["rewrite_acc"] == score["rewrite_acc"]
        assert set(entry["pre"]["locality"]) == {"neighborhood_output"}
        assert set(entry["post"]["locality"]) == {"neighborhood_output", "neighborhood_acc"}
        assert set(entry["post"]["portability"]) == {"one_hop_acc"}
        assert ("time" in entry) == (call == "batch_edit")
    json.dumps(metrics)


def test_without_sequential_edit_the_next_call_starts_from_the_original(editor):
    before = weights(editor.model)
    requests = toy_requests(5)
    _, model, _ = editor.batch_edit(**columns(requests), verbose=False)
    first = weights(model)
    assert not same(first, before)  # what is returned carries the edits
    _, model, former = editor.batch_edit(**columns(requests), verbose=False)
    assert same(former, before)
    assert same(weights(model), first)


def test_with_sequential_edit_edits_accumulate(editor):
    requests = toy_requests(6)
    editor.edit_requests(requests[:3], sequential_edit=True, verbose=False)
    first = weights(editor.model)
    _, _, former = editor.edit_requests(requests[3:], sequential_edit=True, verbose=False)
    assert same(former, first)
    assert not same(weights(editor.model), first)


def test_an_interrupted_call_goes_on_where_it_was(editor, tmp_path, monkeypatch):
    requests, before = toy_requests(8), weights(editor.model)
    plain = toy_model("llama")
    edit_model(plain, editor.tok, requests, editor.hparams, progress=False)
    editor.hparams.checkpoint_dir = str(tmp_path)
    steps, take_ = [], TrainingStep.take_

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_(self, *args)

    monkeypatch.setattr(TrainingStep, "take_", interrupted)
    with pytest.raises(EditInterrupted, match="epoch 2, after 1 of its mini-batches"):
        editor.batch_edit(**columns(requests), verbose=False)
    assert same(weights(editor.model), before)
    _, model, former = editor.batch_edit(**columns(requests), verbose=False)
    assert same(weights(model), weights(plain))
    assert same(former, before)
    assert len(steps) == 6  # three epochs of two, none of them twice


def test_the_unedited_model_answers_beside_the_edited_one(editor):
    before, requests = weights(editor.model), toy_requests(6)
    with editor.unedited() as model:  # nothing was edited yet
        assert same(weights(model), before)
    editor.edit_requests(requests[:3], sequential_edit=True, verbose=False)
    editor.edit_requests(requests[3:], sequential_edit=True, verbose=False)
    edited = weights(editor.model)
    assert not same(edited, before)
    with editor.unedited() as model:
        assert model is editor.model
        assert same(weights(model), before)  # before both edits, not between them
    assert same(weights(editor.model), edited)
    editor.edit_requests(requests, sequential_edit=False, verbose=False)
    with editor.unedited() as model:
        assert same(weights(model), before)


def test_edit_without_sequential_edit_makes_each_edit_alone(editor):
    requests = toy_requests(4)
    metrics, model, former = editor.edit(**columns(requests), verbose=False)
    assert same(former, weights(toy_model("llama")))
    for entry, request in zip(metrics, requests, strict=True):
        alone = toy_model("llama")
        edit_model(alone, editor.tok, [request], editor.hparams, progress=False)
        [expected] = TeacherForced(alone, editor.tok, [request], EvalConfig()).measure("")
        assert entry["post"]["rewrite_acc"] == expected["rewrite_acc"]
        assert entry["post"]["portability"] == expected["portability"]
    # The model returned carries the last one. Measured: 2.3e-6 at most, where Adam divides a
    # gradient that is rounding by itself; an edit moves weights by up to 3e-2.
    assert torch.allclose(model.model.layers[2].mlp.down_proj.weight,
                          alone.model.layers[2].mlp.down_proj.weight, atol=1e-5)  # fmt: skip


def test_one_expert_is_edited_and_put_back(easyedit):
    model = toy_model("mixtral")
    template = f"{DOWN_PROJECTION['mixtral']}[3]"
    h = loaded_hparams(model_name=(model, toy_tokenizer()), rewrite_module_tmp=template)
    editor, before = easyedit.BaseEditor.from_hparams(h), weights(model)
    _, _, former = editor.edit_requests(toy_requests(3), sequential_edit=True, verbose=False)
    assert same(former, before)
    name = DOWN_PROJECTION["mixtral"].format(2)
    assert [n for n, p in weights(model).items() if not torch.equal(p, before[n])] == [name]
    assert torch.equal(model.get_parameter(name)[:3], before[name][:3])
    first = weights(model)
    editor.edit_requests(toy_requests(3), sequential_edit=False, verbose=False)
    assert not same(weights(model), first)
    assert torch.equal(model.get_parameter(name)[:3], before[name][:3])


def test_edits_made_alone_are_never_in_conflict(editor, caplog):
    editor.hparams.on_conflict = "error"
    first = toy_requests(1)[0]
    requests = [first, {**first, "target_new": "Elsewhere"}]
    metrics, _, _ = editor.edit_requests(requests, verbose=False)
    assert len(metrics) == 2
    with pytest.raises(RequestError, match="different targets"):
        editor.edit_requests(requests, sequential_edit=True, verbose=False)


def test_one_prompt_may_be_given_as_a_text(editor):
    metrics, _, _ = editor.edit("The river is", "the Rhine", verbose=False)
    assert len(metrics) == 1
    assert set(metrics[0]["post"]) == {"rewrite_acc", "locality", "portability", "metric_meta"}


def test_normal_edit_returns_the_edited_model_and_no_metrics(editor):
    before = weights(editor.model)
    requests = toy_requests(3)
    metrics, model, former = editor.normal_edit(
        [r["prompt"] for r in requests], [r["target_new"] for r in requests]
    )
    assert metrics is None
    assert not same(weights(model), before)
    assert same(former, before)


def test_generate_edit_collects_chat_answers(editor, monkeypatch):
    with pytest.raises(ModelError, match="no chat template"):
        editor.generate_edit("The river is", "the Rhine", verbose=False)
    monkeypatch.setattr(chat, "_MAX_NEW_TOKENS", 3)
    editor.tok.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    requests = toy_requests(2)
    arguments = columns(requests)
    arguments["portability_inputs"] = {"por_hop": arguments["portability_inputs"]["one_hop"]}
    results, _, _ = editor.generate_edit(**arguments, sequential_edit=True, verbose=False)
    assert len(results) == 2
    for entry in results:
        for phase in ("pre", "post"):
            assert set(entry[phase]) == {"rewrite_ans", "rephrase_ans", "portability_ans"}
            assert isinstance(entry[phase]["rewrite_ans"], str)
            assert len(entry[phase]["portability_ans"]) == 1
    kept = [{"pre": entry["pre"]} for entry in results]
    again, _, _ = editor.generate_edit(**arguments, pre_edit=kept, verbose=False)
    assert [entry["pre"] for entry in again] == [entry["pre"] for entry in results]


def test_measurements_before_the_edit_can_be_kept_in_a_file(editor, tmp_path):
    requests = toy_requests(3)
    path = tmp_path / "pre.json"
    first, _, _ = editor.edit_requests(requests, pre_file=str(path), verbose=False)
    kept = json.loads(path.read_text())
    assert [entry["pre"] for entry in kept] == [entry["pre"] for entry in first]
    again, _, _ = editor.edit_requests(requests, pre_edit=kept, verbose=False)
    assert [m["post"] for m in again] == [m["post"] for m in first]
    with pytest.raises(LocFTError, match="2 entries for 3 requests"):
        editor.edit_requests(requests, pre_edit=kept[:2], verbose=False)


def test_a_file_of_measurements_that_cannot_be_written_is_as_it_was(editor, tmp_path, monkeypatch):
    path = tmp_path / "pre.json"
    path.write_text("old")
    before = weights(editor.model)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"pre\.json cannot be written: No space left"):
        editor.edit_requests(toy_requests(3), pre_file=str(path), verbose=False)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    assert same(before, weights(editor.model))


def test_fluency_without_the_data_of_nltk_warns_and_goes_on(editor, monkeypatch, caplog):
    import nltk

    def no_data(text, language="english", preserve_line=False):
        if not preserve_line:
            raise LookupError("punkt_tab")
        return text.split()

    monkeypatch.setattr(nltk, "word_tokenize", no_data)
    with caplog.at_level(logging.WARNING):
        metrics, _, _ = editor.edit_requests(
            toy_requests(2), sequential_edit=True, test_generation=True, verbose=False
        )
    assert all(m["post"]["fluency"]["ngram_entropy"] > 0 for m in metrics)
    assert [r for r in caplog.records if "nltk.downloader punkt_tab" in r.getMessage()]


# Bad input


def test_bad_input_is_refused_before_the_model_is_touched(editor, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was measured")

    monkeypatch.setattr("locft_easyedit.evaluation.teacher_forced.TeacherForced.measure", never)
    before = weights(editor.model)
    with pytest.raises(RequestError, match="empty"):
        editor.edit_requests([], verbose=False)
    with pytest.raises(RequestError, match="target_new: 1"):
        editor.edit(["a", "b"], ["c"], verbose=False)
    with pytest.raises(RequestError, match="blank"):
        editor.batch_edit(["a", " "], ["b", "c"], verbose=False)
    editor.hparams.layers = [40]
    with pytest.raises(LocFTError, match=r"`layers=\[40\]` is out of range"):
        editor.edit_requests(toy_requests(2), verbose=False)
    editor.hparams.layers = [2]
    editor.hparams.lr = -1.0
    with pytest.raises(HyperParamsError, match=r"`lr=-1.0` must be above 0"):
        editor.edit_requests(toy_requests(2), verbose=False)
    editor.hparams.lr = 1e-2
    with pytest.raises(LocFTError, match="metric_kwargs"):
        editor.edit_requests(toy_requests(2), metric_kwargs=[{}], verbose=False)
    assert same(weights(editor.model), before)


def test_bad_models_and_devices_are_refused(easyedit, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("./no/such/folder", "does not exist"),
        (str(tmp_path / "empty"), "without config.json"),
        (None, "must be a model's folder"),
    ):
        with pytest.raises(LocFTError, match=message):
            easyedit.BaseEditor.from_hparams(loaded_hparams(model_name=name))
    with pytest.raises(HyperParamsError, match="is no device"):
        easyedit.BaseEditor.from_hparams(loaded_hparams(device="nowhere"))
    if not torch.cuda.is_available():
        with pytest.raises(HyperParamsError, match=r"`device=0` needs a CUDA GPU"):
            easyedit.BaseEditor.from_hparams(loaded_hparams(device=0))


def test_evaluation_types_need_the_current_source(easyedit):
    if not easyedit.is_release:
        pytest.skip("this is the current source, which has them")
    editor = easyedit.BaseEditor.from_hparams(loaded_hparams(evaluation_type="generate-text"))
    with pytest.raises(HyperParamsError, match="needs the current EasyEdit"):
        editor.edit_requests(toy_requests(2), verbose=False)


@pytest.mark.parametrize("eval_metric", ["ppl", "ood_ppl"])
def test_perplexity_of_requests_without_locality(editor, eval_metric):
    metrics, _, _ = editor.edit(
        ["The river is"], ["the Rhine"], eval_metric=eval_metric, verbose=False
    )
    key = "rewrite_ppl" if eval_metric == "ppl" else "ood_acc"
    assert metrics[0]["post"][key] != metrics[0]["pre"][key] or eval_metric == "ood_ppl"
    assert "rewrite_acc" not in metrics[0]["post"]
    assert metrics[0]["post"]["metric_meta"]["rewrite"]["result_key"] == key
