"""Facts taken out in closed form: what goes is as in the base, and what stays is as it was."""

import copy

import numpy as np
import pytest
import torch
from helpers.ledgers import SEQUENCES, STARTS, facts, new_ledger, trainer_of, wide_model
from helpers.toys import toy_requests
from torch import nn
from transformers.pytorch_utils import Conv1D

from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.ledger import changes
from locft_easyedit.ledger.removal import least_squares, moments, remove_
from locft_easyedit.ledger.trainer import Trainer
from locft_easyedit.training.preserve.filters import Filters
from locft_easyedit.training.preserve.input_moments import keys_of

OUT, IN = 6, 40


def moment(x):
    return x.T @ x


@pytest.fixture
def case():
    """A change, and inputs that go and stay, ten of each, in general position."""
    torch.manual_seed(3)
    goes, stays = torch.randn(2, 10, IN, dtype=torch.float64)
    return torch.randn(OUT, IN), goes, stays


def left_of(change, goes, stays, s=None):
    """Returns what is left of a change."""
    return change.double() + least_squares(change, moment(stays), moment(goes), s)


def size(change, x):
    return (x @ change.T.double()).norm()


def test_what_goes_is_gone_and_what_stays_stays(case):
    change, goes, stays = case
    left = left_of(*case)
    assert size(left, goes) < 0.05 * size(change, goes)
    assert size(left - change, stays) < 0.05 * size(change, stays)
    # Directions in which nothing goes are left alone.
    beside = torch.eye(IN, dtype=torch.float64)
    beside -= torch.linalg.pinv(torch.cat([goes, stays])) @ torch.cat([goes, stays])
    assert size(left - change, beside) < 1e-4 * size(change, beside)


def test_a_filter_holds_here_as_well(case):
    change, goes, _ = case
    kept = torch.linalg.qr(torch.randn(IN, 4, dtype=torch.float64)).Q
    s = (torch.eye(IN, dtype=torch.float64) - kept @ kept.T).float()
    left = left_of(*case, s)
    assert size(left - change, kept.T) < 1e-4 * size(change, kept.T)
    assert size(left, goes) < 0.05 * size(change, goes)


def test_what_cannot_be_told_apart_is_shared(case):
    change, goes, _ = case
    left = left_of(change, goes, goes)
    ratio = size(left, goes) / size(change, goes)
    assert 0.4 < ratio < 0.6


def test_outputs_that_were_not_changed_are_not(case):
    change, goes, stays = case
    change[2:] = 0
    assert (left_of(change, goes, stays)[2:] == 0).all()


@pytest.mark.parametrize("cut", ["layer", "mlp", "matrix"])
@pytest.mark.parametrize("layer", [2, 3], ids=["inside", "last"])
def test_moments_of_what_enters_a_matrix(tmp_path, cut, layer):
    """Those of recorded states are those of whole passes."""
    model = wide_model()
    trainer = trainer_of(model, tmp_path, prefix_cut=cut, layers=[layer])
    more = TokenizedTexts.from_lists(SEQUENCES, STARTS)
    [name] = trainer.place.parameters
    module = name.rpartition(".")[0]
    with trainer.ready():
        numbered, runner = trainer.facts.numbered([facts(2)], more)
        texts = len(numbered.texts) - len(more) + np.arange(len(more))
        found = runner.input_moments(texts, {name: model.get_submodule(module)}, 5.0, 2)[name]
        alone = runner.narrowed  # the last layer has only what is scored
    documents = [sequence[:-1] for sequence in SEQUENCES]
    keys = keys_of(model, documents, [module], description="", progress=False)[module].double()
    weights = torch.cat([
        torch.tensor([5.0 if i >= start - 1 else float(not alone or layer != 3)
                      for i in range(len(document))])
        for document, start in zip(documents, STARTS, strict=True)
    ])  # fmt: skip
    expected = (keys * weights.double().unsqueeze(1)).T @ keys
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_a_module_that_gets_some_of_the_tokens_is_not_measured(tmp_path):
    model = wide_model()
    trainer = trainer_of(model, tmp_path)
    [name] = trainer.place.parameters
    module = model.get_submodule(name.rpartition(".")[0])
    with trainer.ready():
        numbered, runner = trainer.facts.numbered([facts(2)])
        texts = np.arange(len(numbered.texts))
        assert runner.input_moments(texts, {name: module}, 5.0, 2) is not None
        before, module.forward = module.forward, lambda x: x
        expert = nn.Linear(module.in_features, 2)
        module.forward = lambda x: (expert(x[:, :1]), before(x))[1]
        assert runner.input_moments(texts, {"expert": expert}, 5.0, 2) is None
        module.forward = before
        unused = copy.deepcopy(module)
        assert runner.input_moments(texts, {"unused": unused}, 5.0, 2) is None


def test_places_that_are_no_matrices_have_none(tmp_path):
    model = wide_model()
    trainer = trainer_of(model, tmp_path)
    norm = "model.layers.2.input_layernorm.weight"
    trainer.place.parameters[norm] = model.get_parameter(norm)
    with trainer.ready():
        numbered, runner = trainer.facts.numbered([facts(2)])
        assert moments(trainer, runner, np.arange(len(numbered.texts))) is None


def test_inputs_that_are_no_finite_numbers_have_none(tmp_path):
    model = wide_model()
    trainer = trainer_of(model, tmp_path)
    with trainer.ready():
        _, runner = trainer.facts.numbered([facts(2)])
        assert moments(trainer, runner, np.array([0])) is not None
        model.model.layers[2].mlp.up_proj.weight.data[:] = torch.inf
        _, runner = trainer.facts.numbered([facts(1)])
        assert moments(trainer, runner, np.array([0])) is None


def test_a_matrix_that_is_stored_the_other_way_round(tmp_path):
    """Of the same numbers, what is left is the same."""
    found = {}
    for kind in (nn.Linear, Conv1D):
        model = wide_model()
        trainer = trainer_of(model, tmp_path / kind.__name__, prefix_cut="layer")
        [name] = trainer.place.parameters
        if kind is Conv1D:
            linear = model.get_submodule(name.rpartition(".")[0])
            turned = Conv1D(linear.out_features, linear.in_features)
            turned.weight.data.copy_(linear.weight.data.T)
            model.model.layers[2].mlp.down_proj = turned
            trainer = trainer_of(model, tmp_path / "turned", prefix_cut="layer")
        parameter = trainer.place.parameters[name]
        base = {name: parameter.detach().clone()}
        torch.manual_seed(1)
        change = torch.randn(64, 512) / 50
        parameter.data.add_(change.T if kind is Conv1D else change)
        with trainer.ready():
            _, runner = trainer.facts.numbered([facts(2)])
            goes, stays = (moments(trainer, runner, np.array([i])) for i in (0, 1))
            remove_(trainer, base, goes, stays)
        left = parameter.detach() - base[name]
        found[kind] = left.T if kind is Conv1D else left
        assert 0.1 < (found[kind] - change).norm() / change.norm() < 0.9
    assert torch.allclose(found[nn.Linear], found[Conv1D], atol=1e-4)


def test_training_that_spares_others_moves_them_less(tmp_path):
    """What stays is damped, beside what was damped before, and all is as before afterwards."""
    model = wide_model()
    trainer = trainer_of(model, tmp_path)
    [name] = trainer.place.parameters
    torch.manual_seed(1)
    before = Filters(
        {name: torch.randn(512, 512) / 20}, {"of": "text"}, outputs={name: torch.eye(64)}
    )
    trainer.moments = moments_before = {name: torch.ones(64, 512)}
    with trainer.ready():
        _, runner = trainer.facts.numbered([facts(2)])
        stays = moments(trainer, runner, np.array([0]))
        for filters in (None, before):
            trainer.filters = filters
            with trainer.sparing(stays):
                s = trainer.filters.of[name].double()
                assert trainer.filters.damps
                assert trainer.filters.outputs == ({} if filters is None else before.outputs)
                assert trainer.moments is None
            assert trainer.filters is filters
            assert trainer.moments is moments_before
            # Of what S lets through, what stays takes a smaller part than it would without.
            own = torch.eye(512) if filters is None else filters.of[name]
            k = stays[name].double()
            assert share(s, k) < 0.5 * share(own.double(), k)


def share(s, k):
    """The part of what a filter lets through that lies along a moment."""
    return float(((s @ k) * s).sum() / s.square().sum())


@pytest.mark.parametrize(("left", "tuning", "spares"), [
    (0, "full", 0), (1, "full", 1), (1, "lora", 0),
])  # fmt: skip
def test_others_are_spared_where_something_is_trained(tmp_path, monkeypatch, left, tuning, spares):
    ledger = new_ledger(tmp_path, tuning=tuning)
    ledger.add(toy_requests(3))
    sparing, entered = Trainer.sparing, []
    monkeypatch.setattr(Trainer, "sparing", lambda *args: entered.append(1) or sparing(*args))
    if left:
        monkeypatch.setattr(changes, "MOST_LEFT", -1)
    assert ledger.retract([2]).not_out == []
    assert len(entered) == spares
