"""A ledger whose frozen layers stay on disk, against one of the same model, resident."""

import shutil

import pytest
import torch
from helpers.ledgers import (
    answers,
    ledger_hparams,
    matrix,
    on_disk,
    wide_model,
)
from helpers.toys import toy_requests, toy_tokenizer

from locft_easyedit.errors import LedgerError, PlaceError
from locft_easyedit.ledger.ledger import Ledger
from locft_easyedit.modeling.device_map import left_on_disk
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.prefix.streaming import FrozenStream, samples_on_disk
from locft_easyedit.utils.hashing import sample_digest

TOKENIZER = toy_tokenizer()
REQUESTS = toy_requests(9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a wide toy, saved in many parts."""
    return on_disk(tmp_path_factory.mktemp("base") / "toy")


def begun(folder, base, stream, **changes):
    hparams = ledger_hparams(model_name=base, device="cpu", stream_frozen=stream, **changes)
    return Ledger.init(folder, hparams, progress=False)


def life(folder, base, stream, **changes):
    """Returns a ledger in which facts have come, were replaced and have gone."""
    ledger = begun(folder, base, stream, **changes)
    assert left_on_disk(ledger.model) == stream
    ledger.add(REQUESTS[:3])
    ledger.add([REQUESTS[3], REQUESTS[1] | {"target_new": "Vienna"}])
    ledger.retract([1])
    return ledger


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix_cut": "layer", "forms": ["question_answer"], "num_steps": 20},
        {"dtype": "bfloat16", "prefix_cut": "mlp", "prefix_disk_gib": 0.0},
        {"layers": [1, 3], "packing": False, "tuning": "lora", "lora_rank": 8, "lr": 2e-2},
    ],
    ids=["plain", "forms", "half", "lora"],
)
def test_a_resident_ledgers_matrices(tmp_path, base, changes):
    resident, streamed = (life(tmp_path / str(s), base, s, **changes) for s in (False, True))
    for one, other in zip(resident.log.events[1:], streamed.log.events[1:], strict=True):
        assert one.said["state"] == other.said["state"]
        assert one.said["moments"] == other.said["moments"]
        assert one.said["how"] == other.said["how"]
        assert (one.said["trained"], one.said["facts"]) == (
            other.said["trained"],
            other.said["facts"],
        )
    found = streamed.verify(replay=True)
    assert (found.n_facts, found.problems, found.lost) == (3, [], resident.verify().lost)
    for ledger in (resident, streamed):
        ledger.retract([3], exact=True)
    [one, other] = (ledger.log.events[-1].said["state"] for ledger in (resident, streamed))
    assert one == other
    # The model runs by itself again, its hooks reading what is on disk.
    assert left_on_disk(streamed.model)
    ids = torch.tensor([TOKENIZER(REQUESTS[2]["prompt"])["input_ids"]])
    with torch.no_grad():
        logits = [ledger.model(input_ids=ids).logits for ledger in (resident, streamed)]
    assert torch.equal(*logits)


@pytest.fixture
def passes(monkeypatch):
    """Grows by the number of prefixes of each pass over the frozen layers."""
    run, found = FrozenStream.run, []

    def counted(self):
        jobs = [prefix for prefix, _ in self._jobs if not prefix.complete]
        if jobs:
            found.append(len(jobs))
        run(self)

    monkeypatch.setattr(FrozenStream, "run", counted)
    return found


def test_one_pass_for_all_that_is_new(tmp_path, base, passes):
    ledger = life(tmp_path / "ledger", base, True)
    added, retracted = passes[:2], passes[2:]
    assert added == [1, 1]
    # A pass for each token of the base's answer, and one for the texts that return.
    assert set(retracted) == {1}
    assert 2 <= len(retracted) <= 33
    passes.clear()
    again = Ledger.open(ledger.path, progress=False)
    assert torch.equal(matrix(again.model), matrix(ledger.model))
    again.add(REQUESTS[4:6])
    assert passes == [1]  # what was recorded before is read from its files
    for path in ledger.path.glob("prefix-*"):
        path.unlink()
    passes.clear()
    Ledger.open(ledger.path, progress=False).retract([5], exact=True)
    assert passes == [3]


def test_it_is_bound_to_what_is_on_disk(tmp_path, base):
    streamed = begun(tmp_path / "ledger", base, True)
    whole = wide_model()
    expected = {name: sample_digest(p) for name, p in whole.named_parameters()}
    found = samples_on_disk(streamed.model)
    assert found == {name: expected[name] for name in found}
    assert "model.layers.1.mlp.down_proj.weight" in found
    assert streamed.log.events[0].said["parameters"] == expected
    streamed.add(REQUESTS[:2])
    # So it can go on with the model in memory, and is refused another model on disk.
    resident = Ledger.open(streamed.path, whole, TOKENIZER, progress=False)
    resident.add(REQUESTS[2:4])
    assert all(answers(resident.model, TOKENIZER, REQUESTS[:4]))
    whole = wide_model()
    with torch.no_grad():
        whole.model.layers[0].mlp.down_proj.weight.mul_(2)
    other = on_disk(tmp_path / "other", whole)
    with pytest.raises(LedgerError, match=r"1 of \d+ parameters are others: `model.layers.0.mlp"):
        _ = Ledger.open(streamed.path, model_name=other, progress=False).model


def test_what_is_preserved_needs_the_whole_model(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The bridge was built in 1932.\n" * 40)
    folder = tmp_path / "ledger"
    preserve = {"preserve": ["text.txt"]}
    with pytest.raises(LedgerError, match=r"`stream_frozen=True` with `preserve`.*whole model"):
        begun(folder, "nowhere", True, **preserve)  # before a model is looked for
    # Nor where the layers are on disk for want of memory.
    pair = load_model(ledger_hparams(model_name=base, device="cpu", stream_frozen=True))
    with pytest.raises(LedgerError, match=r"frozen layers are on disk.*whole model"):
        Ledger.init(folder, ledger_hparams(**preserve), *pair, progress=False)
    assert not folder.exists()


def test_a_place_that_is_on_disk_is_refused(tmp_path, base):
    pair = load_model(ledger_hparams(model_name=base, device="cpu", stream_frozen=True))
    with pytest.raises(PlaceError, match="not loaded"):
        Ledger.init(tmp_path / "ledger", ledger_hparams(layers=[1]), *pair, progress=False)


def test_states_that_cannot_be_recorded_leave_all_as_it_was(tmp_path, base, monkeypatch):
    ledger = begun(tmp_path / "ledger", base, True)
    ledger.add(REQUESTS[:3])
    undisturbed = shutil.copytree(ledger.path, tmp_path / "undisturbed")
    before = matrix(ledger.model)
    with monkeypatch.context() as patch:
        patch.setattr(FrozenStream, "_stage", lambda *_: raise_(OSError("read error")))
        with pytest.raises(OSError, match="read error"):
            ledger.add(REQUESTS[3:5])
    assert torch.equal(matrix(ledger.model), before)
    # Others take the numbers of those that failed.
    ledger.add(REQUESTS[5:7])
    expected = Ledger.open(undisturbed, progress=False)
    expected.add(REQUESTS[5:7])
    assert torch.equal(matrix(ledger.model), matrix(expected.model))


def raise_(error):
    raise error
