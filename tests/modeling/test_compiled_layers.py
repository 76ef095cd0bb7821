"""Layers compiled for training: the same step, the model as before, and the plain way where not."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.locate.study.cell import Cell
from locft_easyedit.locate.trial import Trials
from locft_easyedit.modeling import compiled_layers
from locft_easyedit.modeling.locations import Location
from locft_easyedit.prefix import probes
from locft_easyedit.training.session import EditSession

KINDS = ["llama", "gemma3", "gpt2"]


class Compiled:
    """`torch.compile` with a backend that takes no compiler; counts what ran compiled."""

    def __init__(self, monkeypatch):
        torch._dynamo.reset()
        self.runs, self.fails = 0, None
        self.compile = partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(compiled_layers.torch, "compile", self)

    def __call__(self, forward, **options):
        compiled = self.compile(forward, **options)

        def run(*args, **kwargs):
            self.runs += 1
            return (self.fails or compiled)(*args, **kwargs)

        return run


@pytest.fixture
def compiled(monkeypatch):
    return Compiled(monkeypatch)


def session(kind="llama", *, model=None, compile_layers=True, **changes):
    settings = {
        "layers": [0], "rewrite_module_tmp": DOWN_PROJECTION[kind], "num_steps": 2,
        "compile_layers": compile_layers,
    } | changes  # fmt: skip
    model = toy_model(kind) if model is None else model
    return EditSession(model, toy_tokenizer(), toy_requests(10), toy_hparams(**settings), False)


def layers_of(prepared):
    """The numbers of the layers that are compiled."""
    layers = list(prepared.place.stack.layers)
    return [layers.index(layer) for layer in prepared.shortcuts.compiled.layers]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_the_same(kind, compiled):
    with session(kind, compile_layers=False) as plain:
        assert plain.shortcuts.compiled is None
        expected = plain.train_()
    assert compiled.runs == 0
    with session(kind) as prepared:
        assert layers_of(prepared) == [1, 2]  # not the last, where scored positions run alone
        tried = compiled.runs
        found = prepared.train_()
    assert compiled.runs == tried + 2 * len(found.step_losses)
    np.testing.assert_allclose(found.step_losses, expected.step_losses, rtol=1e-4)
    assert found.n_updates == expected.n_updates > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": "lora"},
        {"alg_name": "LocFT-BF+", "preserve": ["neighbours"]},
        {"prefix_cut": "layer", "micro_batch_size": 3},
        {"frozen_prefix": False, "layers": [1]},
        {"packing": False},
    ],
    ids=str,
)
def test_with_whatever_is_trained(changes, compiled):
    with session(**changes, compile_layers=False) as plain:
        expected = plain.train_()
    with session(**changes) as prepared:
        assert layers_of(prepared) == ([2] if changes.get("layers") == [1] else [1, 2])
        found = prepared.train_()
    np.testing.assert_allclose(found.step_losses, expected.step_losses, rtol=1e-4)


def test_layers_that_hold_a_trained_parameter_or_have_hooks_run_as_they_are(compiled):
    with session(layers=[0, 1]) as prepared:
        assert layers_of(prepared) == [2]
    model = toy_model()
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with session(model=model) as prepared:
        assert layers_of(prepared) == [2]
    hook.remove()
    model.model.layers[2].mlp.forward = model.model.layers[2].mlp.forward  # accelerate's way
    with session(model=model) as prepared:
        assert layers_of(prepared) == [1]


def test_the_model_is_as_before_and_passes_without_gradients_as_ever(compiled):
    model = toy_model()
    with session(model=model) as prepared:
        assert not any("forward" in vars(module) for module in model.modules())
        before = compiled.runs
        runner, every = prepared._runner, np.arange(4)
        with runner.running(), torch.no_grad():
            assert "forward" in vars(model.model.layers[1])
            found = runner.logits(every)[0]
            assert compiled.runs == before
            prepared.shortcuts.compiled._forwards[:] = []  # would fail if it ran
            expected = runner.logits(every)[0]
        assert torch.equal(found, expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_cannot_be_compiled_or_changes_the_step_is_told(monkeypatch, caplog):
    def refusing(forward, **options):
        def run(*args, **kwargs):
            raise RuntimeError("no compiler was found\nand many lines")

        return run

    def missing(forward, **options):
        raise ImportError("no triton")

    def wrong(forward, **options):
        return lambda *args, **kwargs: forward(*args, **kwargs) * 1.01

    for how, why in (
        (refusing, "RuntimeError: no compiler was found"),
        (missing, "ImportError: no triton"),
        (wrong, "they change"),
    ):
        caplog.clear()
        monkeypatch.setattr(compiled_layers.torch, "compile", how)
        with session() as prepared:
            assert prepared.shortcuts.compiled is None
            assert prepared.train_().n_updates > 0
        [told] = [r for r in caplog.records if "compile_layers" in r.getMessage()]
        assert told.levelname == "WARNING"
        assert why in told.getMessage()
        assert "many lines" not in told.getMessage()


def test_where_compilation_fails_later_layers_run_as_they_are(compiled, caplog):
    with session(compile_layers=False) as plain:
        expected = plain.train_()
    with session() as prepared:

        def failing(*args, **kwargs):
            raise torch._dynamo.exc.TorchDynamoException("no space left")

        compiled.fails = failing
        found = prepared.train_()
    assert caplog.text.count("A layer runs as it is, not compiled: TorchDynamoException") == 2
    np.testing.assert_allclose(found.step_losses, expected.step_losses, rtol=1e-4)


def test_trials_of_places_compile_nothing(compiled):
    edits = distinct_edits(toy_requests(4), None).edits
    hparams = toy_hparams(layers=[0], compile_layers=True)
    trials = Trials(toy_model(), toy_tokenizer(), edits, hparams, 4)
    trials.run(Cell(Location(0, "down", (DOWN_PROJECTION["llama"],)), 1e-3), 1)
    assert compiled.runs == 0


def test_where_there_is_no_layer_to_compile_it_is_told(caplog, compiled):
    with session(layers=[2]) as prepared:  # the last one runs scored positions alone
        assert prepared.shortcuts.compiled is None
    assert "No layer is compiled (`compile_layers`): none between the place" in caplog.text
    assert compiled.runs == 0


def test_products_are_not_fused_beside_it(compiled):
    made = session()
    made.fused = True
    with made as prepared:
        assert prepared.shortcuts.compiled is not None
        assert prepared.shortcuts.fused is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_compilation_serves_all_layers_and_rows(dtype):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = toy_model(num_hidden_layers=8).to(dtype)
    losses = []
    for compile_layers in (False, True):
        with session(model=model, compile_layers=compile_layers) as prepared:
            assert (prepared.shortcuts.compiled is not None) is compile_layers
            runner = prepared._runner
            with runner.running(), torch.enable_grad():
                losses.append(
                    torch.cat([runner.edit_losses(np.arange(n)).detach() for n in (3, 8, 10)])
                )
    # One for a single row and one for several, with masks of trees and without; not one a layer.
    assert len(prepared.shortcuts.compiled.layers) == 6
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert probes.relative_error(*losses) < (1e-5 if dtype == torch.float32 else 3e-2)
