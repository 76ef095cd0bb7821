"""Cells of a study: each is a plain run, and leaves the model as it was."""

import math

import pytest
import torch
from helpers.toys import (
    DOWN_PROJECTION,
    REPOSITORY,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)

from locft_easyedit.api import edit_and_measure
from locft_easyedit.errors import PlaceError
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.locate.score import Drift, score
from locft_easyedit.locate.study.cell import Bench, figures_of, measure_before
from locft_easyedit.locate.study.study_outcome import DIVERGED, FAILED, OK, OUT_OF_MEMORY
from locft_easyedit.modeling.locations import Location, find_locations, select_locations
from locft_easyedit.training.edit_training import EditTraining
from locft_easyedit.training.health import health_texts
from locft_easyedit.training.session import EditSession

pytestmark = pytest.mark.usefixtures("short_answers")
KEPT_PROMPTS = str(REPOSITORY / "tests" / "helpers" / "kept_prompts.json")
SEEN = ("reliability", "reworded", "drift", "score")


def make_bench(kind="llama", requests=None, **changes):
    model, tokenizer = toy_model(kind), toy_tokenizer(pad_is_eos=True)
    requests = toy_requests(6) if requests is None else requests
    hparams = toy_hparams(rewrite_module_tmp=DOWN_PROJECTION[kind], **changes)
    before = measure_before(model, tokenizer, requests, hparams)
    return Bench(model, tokenizer, requests, hparams, before, range(4))


def location_of(model, layer, module):
    [found] = select_locations(find_locations(model), [layer], [module])
    return found


def tried(bench, layer=2, module="down", rates=(1e-2,)):
    return list(bench.cells(location_of(bench.model, layer, module), rates, lambda cell: None))


@pytest.fixture
def trained(monkeypatch):
    """The results of all trainings."""
    results, original = [], EditSession.train_

    def train_(self, *args, **kwargs):
        results.append(original(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(EditSession, "train_", train_)
    return results


@pytest.mark.parametrize(
    ("kind", "module", "more"),
    [
        ("llama", "down", {}),
        ("llama", "layer", {}),
        ("gpt2", "qkv", {}),
        ("gemma3", "mlp", {}),
        ("llama", "down", {"forms": ["context"], "preserve": [KEPT_PROMPTS, "neighbours"]}),
        ("gpt2", "down", {"forms": ["context"], "preserve": [KEPT_PROMPTS]}),
    ],
)
def test_a_cell_is_a_plain_run(kind, module, more, trained):
    # The rate before it, in the same session, leaves no trace.
    bench = make_bench(kind, num_steps=8, **more)
    [_, cell] = tried(bench, 1, module, [3e-3, 1e-2])
    place = location_of(bench.model, 1, module)

    model, tokenizer = toy_model(kind), toy_tokenizer(pad_is_eos=True)
    texts, _ = health_texts(model, tokenizer)
    drift = Drift(model, texts, packed=True)
    hparams = toy_hparams(
        layers=[1], rewrite_module_tmp=place.rewrite_module_tmp, lr=1e-2, num_steps=8, **more
    )
    run = edit_and_measure(
        model, tokenizer, toy_requests(6), hparams, metrics=PLAIN_METRICS, progress=False
    )

    assert cell.state == OK
    for name, matrix in run.result.new.items():
        assert torch.equal(trained[1].new[name], matrix)
        assert not torch.equal(trained[0].new[name], matrix)
    assert trained[1].losses == run.result.losses
    plain = figures_of(summarize(run.metrics)["post"])
    assert {"reliability", "generalization", "locality", "portability", "locality_acc"} <= set(
        plain
    )
    assert {name: cell.figures[name] for name in plain} == plain
    assert cell.figures["drift"] == pytest.approx(drift.measure(), rel=1e-4)
    assert cell.epochs == len(run.result.losses)
    assert cell.parameters == sum(matrix.numel() for matrix in run.result.new.values())


def test_the_model_is_the_same_after_every_cell():
    bench = make_bench()
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in bench.model.parameters()]
    moved = tried(bench, 2, "layer", [1e-2, 1e30])
    assert [one.state for one in moved] == [OK, DIVERGED]
    assert moved[0].figures["drift"] > 0
    after = bench.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert flags == [parameter.requires_grad for parameter in bench.model.parameters()]


def test_a_cell_that_diverges_is_marked_and_the_next_is_tried():
    marked, well = tried(make_bench(), 2, "layer", [1e30, 1e-2])
    assert (marked.state, marked.figures) == (DIVERGED, {})
    assert "Lower `lr=1e+30`" in marked.reason
    assert well.state == OK


def test_figures_that_are_no_numbers_are_a_divergence(monkeypatch):
    monkeypatch.setattr(Drift, "measure", lambda self: math.nan)
    [cell] = tried(make_bench())
    assert (cell.state, cell.reason) == (DIVERGED, "drift of the edited model: not finite")


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY, "CUDA out of memory"),
        (MemoryError(), OUT_OF_MEMORY, "MemoryError"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            OUT_OF_MEMORY,
            "DefaultCPUAllocator",
        ),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), OUT_OF_MEMORY, "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("shapes differ"), FAILED, "RuntimeError: shapes differ"),
        (PlaceError("it is tied"), FAILED, "it is tied"),
    ],
)
@pytest.mark.parametrize("where", ["run_", "__enter__"])
def test_an_error_marks_its_cells_alone(monkeypatch, error, state, reason, where):
    bench = make_bench()
    owner = EditTraining if where == "run_" else EditSession
    original, calls = getattr(owner, where), []

    def fails_first(self, *args):
        calls.append(self)
        if len(calls) == 1:
            raise error
        return original(self, *args)

    monkeypatch.setattr(owner, where, fails_first)
    first = tried(bench, rates=[1e-2, 2e-2])
    # An error of the session is one of all its rates.
    assert [one.state for one in first] == [state, OK if where == "run_" else state]
    assert first[0].reason.startswith(reason)
    [after] = tried(bench)
    assert after.state == OK


def test_each_cell_is_announced_before_it_is_tried():
    bench, told = make_bench(), []
    for outcome in bench.cells(location_of(bench.model, 1, "up"), [1e-3, 1e-2], told.append):
        assert told[-1] == outcome.cell


def _without(requests, *keys):
    return [{k: v for k, v in request.items() if k not in keys} for request in requests]


def test_the_choice_sees_nothing_of_the_evaluation_s_prompts():
    requests = toy_requests(6)
    other = [
        request
        | {
            "rephrase_prompt": "Something else altogether, which ends in",
            "locality": {"neighborhood": {"prompt": "Green is a", "ground_truth": "colour"}},
            "portability": {"one_hop": {"prompt": "Round is the", "ground_truth": "ball"}},
        }
        for request in requests
    ]
    bare = _without(requests, "rephrase_prompt", "locality", "portability")
    [first], [second], [third] = (tried(make_bench(requests=r)) for r in (requests, other, bare))
    seen = [{name: one.figures[name] for name in SEEN} for one in (first, second, third)]
    assert seen[0] == seen[1] == seen[2]
    assert first.figures["locality_acc"] != second.figures["locality_acc"]  # these did change
    assert "generalization" not in third.figures
    assert first.figures["score"] == score(*(first.figures[name] for name in SEEN[:3]))


def test_a_place_without_trainable_parameters_is_marked():
    bench = make_bench()
    nowhere = Location(2, "down", ("model.layers.{}.mlp.nothing.weight",))
    [cell] = bench.cells(nowhere, [1e-2], lambda cell: None)
    assert cell.state == FAILED
    assert "matches nothing in layer 2" in cell.reason


def test_capability_is_a_figure_of_the_edited_model():
    bench = make_bench()
    name = DOWN_PROJECTION["llama"].format(2)
    parameter = dict(bench.model.named_parameters())[name]
    original = parameter.detach().clone()
    bench.capability = lambda: float(not torch.equal(parameter, original))
    [cell] = tried(bench)
    assert cell.figures["capability"] == 1.0
    assert torch.equal(parameter, original)
