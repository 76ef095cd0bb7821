"""Facts taken out in closed form: what goes is as in the base, and what stays is as it was."""

import copy

import numpy as np
import pytest
import torch
from helpers.ledgers import SEQUENCES, STARTS, facts, trainer_of, wide_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.ledger.changes import Changes
from locft_easyedit.ledger.removal import remove_
from locft_easyedit.training.preserve.input_moments import keys_of

OUT, IN = 6, 40


def moment(x):
    return x.T @ x


@pytest.fixture
def case():
    """A matrix, its base, and inputs that go and stay, ten of each, in general position."""
    torch.manual_seed(3)
    base, change = torch.randn(OUT, IN), torch.randn(OUT, IN)
    goes, stays = torch.randn(10, IN, dtype=torch.float64), torch.randn(10, IN, dtype=torch.float64)
    return base, change, goes, stays


def removed(base, change, goes, stays, filters=None, module=None):
    """Returns what is left of the change."""
    module = nn.Linear(IN, OUT, bias=False) if module is None else module
    transposed = isinstance(module, Conv1D)
    new, base = ((m.T if transposed else m).clone() for m in (base + change, base))
    remove_({"w": new}, {"w": base}, {"w": moment(stays)}, {"w": moment(goes)}, filters or {},
            {"w": module})  # fmt: skip
    left = new - base
    return (left.T if transposed else left).double()


def size(change, x):
    return (x @ change.T.double()).norm()


@pytest.mark.parametrize("module", [nn.Linear(IN, OUT), Conv1D(OUT, IN)], ids=["linear", "conv1d"])
def test_what_goes_is_gone_and_what_stays_stays(case, module):
    _, change, goes, stays = case
    left = removed(*case, module=module)
    assert size(left, goes) < 0.05 * size(change, goes)
    assert size(left - change, stays) < 0.05 * size(change, stays)
    # Directions in which nothing goes are left alone.
    beside = torch.eye(IN, dtype=torch.float64)
    beside -= torch.linalg.pinv(torch.cat([goes, stays])) @ torch.cat([goes, stays])
    assert size(left - change, beside) < 1e-4 * size(change, beside)


def test_a_filter_holds_here_as_well(case):
    _, change, goes, _ = case
    kept = torch.linalg.qr(torch.randn(IN, 4, dtype=torch.float64)).Q
    s = (torch.eye(IN, dtype=torch.float64) - kept @ kept.T).float()
    left = removed(*case, filters={"w": s})
    assert size(left - change, kept.T) < 1e-4 * size(change, kept.T)
    assert size(left, goes) < 0.05 * size(change, goes)


def test_what_cannot_be_told_apart_is_shared(case):
    base, change, goes, _ = case
    left = removed(base, change, goes, goes)
    ratio = size(left, goes) / size(change, goes)
    assert 0.4 < ratio < 0.6


def test_a_low_rank_stays_in_the_outputs_of_the_change(case):
    base, change, goes, stays = case
    change[2:] = 0
    assert (removed(base, change, goes, stays)[2:] == 0).all()


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


def test_places_that_are_no_matrices_are_trained_alone(tmp_path):
    model = wide_model()
    trainer = trainer_of(model, tmp_path)
    changes = Changes(trainer, {name: p.clone() for name, p in trainer.place.parameters.items()})
    norm = "model.layers.2.input_layernorm.weight"
    trainer.place.parameters[norm] = model.get_parameter(norm)
    with trainer.ready():
        numbered, runner = trainer.facts.numbered([facts(2)])
        assert changes._moments(runner, np.arange(len(numbered.texts))) is None
