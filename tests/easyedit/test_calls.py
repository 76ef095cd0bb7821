"""How EasyEdit's users call the editor: classes, keywords, data sets, and where entries begin."""

import pytest
import torch
from helpers.toys import loaded_hparams, toy_model, toy_requests, toy_tokenizer

import locft_easyedit
from locft_easyedit.errors import LocFTError, ModelError, RequestError
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.teacher_forced import TeacherForced
from locft_easyedit.hparams import HyperParamsBase, LocFTBFHyperParams


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class DataSet:
    """Records as EasyEdit's `CounterFactDataset` holds them."""

    def __init__(self, requests):
        self.records = [
            {
                "case_id": i,
                "prompt": r["prompt"],
                "target_new": r["target_new"],
                "rephrase_prompt": r["rephrase_prompt"],
                "locality_prompt": r["locality"]["neighborhood"]["prompt"],
                "locality_ground_truth": r["locality"]["neighborhood"]["ground_truth"],
            }
            for i, r in enumerate(requests)
        ]

    def __getitem__(self, index):
        return self.records[index]

    def __len__(self):
        return len(self.records)


# Classes


def test_every_way_to_make_the_editor(easyedit):
    from easyeditor import BaseEditor
    from easyeditor import LocFTBFEditor as FromEasyEdit
    from easyeditor import LocFTBFHyperParams as HyperParamsFromEasyEdit

    from locft_easyedit import LocFTBFEditor

    assert FromEasyEdit is LocFTBFEditor
    assert HyperParamsFromEasyEdit is LocFTBFHyperParams
    assert issubclass(LocFTBFEditor, BaseEditor)

    class Mine(LocFTBFEditor):
        pass

    for cls, made in ((BaseEditor, LocFTBFEditor), (LocFTBFEditor, LocFTBFEditor), (Mine, Mine)):
        assert type(cls(loaded_hparams())) is made
        assert type(cls.from_hparams(loaded_hparams())) is made


def test_the_hyper_parameters_are_easyedits_while_registered(easyedit):
    assert isinstance(loaded_hparams(), easyedit.HyperParams)
    locft_easyedit.unregister()
    assert not isinstance(loaded_hparams(), easyedit.HyperParams)
    assert isinstance(loaded_hparams(), HyperParamsBase)
    first = locft_easyedit.LocFTBFEditor  # registers again
    assert first is locft_easyedit.register().BaseEditor.from_hparams(loaded_hparams()).__class__


# Keywords


@pytest.mark.parametrize("method", ["edit", "batch_edit", "edit_requests", "generate_edit"])
def test_unknown_keywords_are_refused_with_the_nearest(editor, method):
    before = weights(editor.model)
    requests = toy_requests(2)
    columns = {"prompts": ["a", "b"], "target_new": ["c", "d"]}
    given = {"requests": requests} if method == "edit_requests" else columns
    message = (
        rf"`{method}` does not know these keywords:\n"
        r"  - `sequental_edit`\. Did you mean `sequential_edit`\?\n"
        r"  - `zzz`\. Known: eval_metric, "
    )
    with pytest.raises(RequestError, match=message):
        getattr(editor, method)(**given, sequental_edit=True, zzz=1)
    assert same(weights(editor.model), before)


# Data sets


def test_a_data_set_object_is_edited_and_measured(editor):
    requests = toy_requests(3)
    metrics, _, _ = editor.edit_requests(DataSet(requests), True, verbose=False)
    assert [m["requested_rewrite"]["prompt"] for m in metrics] == [r["prompt"] for r in requests]
    assert all(m["alg_name"] == "LocFT-BF" for m in metrics)
    for entry in metrics:
        assert set(entry["post"]["locality"]) == {"neighborhood_output", "neighborhood_acc"}
        assert "rephrase_acc" in entry["post"]
    plain = editor.edit_requests(requests, True, verbose=False)[0]
    assert len(plain) == 3


def test_romes_prompts_are_trained_and_measured_with_their_subject(editor):
    metrics, model, _ = editor.edit(
        "The river near {} is the", "Rhine", subject="Ulm", sequential_edit=True, verbose=False
    )
    filled = {"prompt": "The river near Ulm is the", "target_new": "Rhine"}
    assert metrics[0]["requested_rewrite"]["prompt"] == filled["prompt"]
    [expected] = TeacherForced(model, editor.tok, [filled], EvalConfig()).measure("")
    assert metrics[0]["post"]["rewrite_acc"] == expected["rewrite_acc"]


# Where entries begin


def test_edit_dataset_begins_from_the_original(editor):
    requests = toy_requests(3)
    before = weights(editor.model)
    [expected] = TeacherForced(editor.model, editor.tok, requests[:1], EvalConfig()).measure("")
    editor.edit_requests(requests, verbose=False)  # leaves the last edit in
    assert not same(weights(editor.model), before)
    metrics, _, former = editor.edit_dataset(DataSet(requests), True, verbose=False)
    assert metrics[0]["pre"]["rewrite_acc"] == expected["rewrite_acc"]
    assert same(former, before)
    _, _, former = editor.edit_dataset(DataSet(requests), verbose=False)
    assert same(former, before)
    _, _, former = editor.edit_requests(requests, verbose=False)
    assert not same(former, before)  # the edits of a data set accumulate


def test_the_function_of_the_editor_begins_from_the_original(editor):
    requests = toy_requests(2)
    before = weights(editor.model)
    editor.edit_requests(requests, verbose=False)
    edited, former = editor.apply_algo(
        editor.model,
        editor.tok,
        requests,
        editor.hparams,
        copy=False,
        return_orig_weights=True,
        keep_original_weight=True,
        train_ds=None,
    )
    assert edited is editor.model
    assert former
    assert same(former, before)
    with editor.unedited() as model:
        assert same(weights(model), before)
    other = toy_model("llama", seed=1)
    copied, nothing = editor.apply_algo(other, editor.tok, requests, editor.hparams, copy=True)
    assert copied is not other
    assert nothing == {}


# ConvSent


def test_convsents_metrics_compare_with_the_unedited_model(easyedit):
    pair = (toy_model("llama"), toy_tokenizer())
    editor = easyedit.BaseEditor(loaded_hparams(model_name=pair))
    requests = toy_requests(2)
    asked = {
        "inner_q": "What of Ulm?",
        "inner_all_qa": ["What of Ulm? </s> I like it.", "What of Ulm? </s> I hate it."],
        "outer_all_qa": ["What of Bonn? </s> I like it.", "What of Bonn? </s> I hate it."],
        "inner_target": [0, 0],
        "all_target": [0, 1],
    }
    if easyedit.is_release:
        with pytest.raises(LocFTError, match="ConvSent's metrics need the current EasyEdit"):
            editor.edit_requests(requests, metric_kwargs=[asked] * 2, verbose=False)
        return
    with pytest.raises(RequestError, match="1 entries for 2 requests"):
        editor.edit_requests(requests, metric_kwargs=[asked], verbose=False)
    for sequential in (False, True):
        metrics, _, _ = editor.edit_requests(
            requests, sequential, metric_kwargs=[asked, asked], verbose=False
        )
        for entry in metrics:
            assert entry["dd"] > 0  # the same model twice would give 0
            assert 0 <= entry["es"] <= 1
            assert entry["fluency"]["ngram_entropy"] > 0
    editor.tok.get_vocab = lambda: {"a": 0}
    with pytest.raises(ModelError, match="which is no token of this model"):
        editor.edit_requests(requests, metric_kwargs=[asked, asked], verbose=False)
