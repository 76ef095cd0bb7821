"""Prefixes on disk: used again where they are the very states, and computed anew elsewhere."""

import json
import logging
import threading

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.api import edit_and_measure, edit_model
from locft_easyedit.data.tokenization import tokenize_edits
from locft_easyedit.errors import MemoryBudgetError, OutputError
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.modeling.places import find_layers
from locft_easyedit.prefix.cut import layer_cut
from locft_easyedit.prefix.fingerprint import prefix_fingerprint
from locft_easyedit.prefix.frozen_prefix import FrozenPrefix
from locft_easyedit.prefix.state_file import StateFile
from locft_easyedit.utils.hashing import checksum

TRAINED = DOWN_PROJECTION["llama"].format(2)


@pytest.fixture
def recordings(monkeypatch):
    """The texts of each prefix of edits that was recorded."""
    recorded = []
    record = FrozenPrefix.record

    def counting(self, layout, *args, **kwargs):
        if self._kept is not None:
            recorded.append(len(layout.texts))
        return record(self, layout, *args, **kwargs)

    monkeypatch.setattr(FrozenPrefix, "record", counting)
    return recorded


def edit(folder, model=None, requests=None, **changes):
    """Edits a toy with a prefix in `folder`; returns the result."""
    h = toy_hparams(prefix_dir=None if folder is None else str(folder), **changes)
    model = toy_model("llama") if model is None else model
    requests = toy_requests(8) if requests is None else requests
    return edit_model(model, toy_tokenizer(), requests, h, progress=False)


def assert_same(a, b):
    assert a.step_losses == b.step_losses
    assert a.new.keys() == b.new.keys()
    assert all(torch.equal(a.new[name], b.new[name]) for name in a.new)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("budget", [None, 0.0])
@pytest.mark.parametrize("kind", ["matrix", "mlp", "layer"])
def test_a_second_run_computes_nothing_and_gives_the_same(kind, budget, recordings, tmp_path):
    """With no host memory at all, every state comes from the disk, by way of the thread."""
    changes = {"prefix_cut": kind, "prefix_host_gib": budget}
    without = edit(None, **changes)
    assert recordings == []
    first = edit(tmp_path, **changes)
    assert recordings == [8]
    [data, seal] = names(tmp_path)
    assert seal == data + ".json"
    written = (tmp_path / data).stat().st_mtime_ns
    second = edit(tmp_path, **changes)
    assert recordings == [8]
    assert (tmp_path / data).stat().st_mtime_ns == written
    assert_same(first, without)
    assert_same(second, without)


def test_states_on_disk_are_read_by_the_thread(tmp_path, monkeypatch):
    readers = set()
    get = StateFile.get

    def reading(self, where):
        readers.add(threading.current_thread().name.split("_")[0])
        return get(self, where)

    monkeypatch.setattr(StateFile, "get", reading)
    edit(tmp_path, prefix_host_gib=0.0)
    assert readers == {"prefetch"}


def test_the_whole_run_reuses_it_as_well(recordings, tmp_path):
    runs = []
    for _ in range(2):
        h = toy_hparams(prefix_dir=str(tmp_path), prefix_host_gib=0.0)
        runs.append(
            edit_and_measure(
                toy_model("llama"),
                toy_tokenizer(),
                toy_requests(6),
                h,
                metrics=PLAIN_METRICS,
                progress=False,
            )
        )
    assert recordings == [6]
    assert_same(runs[0].result, runs[1].result)
    assert json.dumps(list(runs[0].metrics)) == json.dumps(list(runs[1].metrics))
    assert len(names(tmp_path)) == 2  # those of the prompts do not stay


# What is not used again


def another_frozen_weight():
    model = toy_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[3, 5] += 1e-6
    return {"model": model}


def another_embedding():
    model = toy_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, -1].neg_()
    return {"model": model}


def another_request():
    requests = toy_requests(8)
    requests[5]["target_new"] += "s"
    return {"requests": requests}


CHANGES = {
    "frozen weight": another_frozen_weight,
    "embedding": another_embedding,
    "request": another_request,
    "fewer requests": lambda: {"requests": toy_requests(7)},
    "other order": lambda: {"requests": toy_requests(8)[::-1]},
    "layer": lambda: {"layers": [1]},
    "more layers": lambda: {"layers": [1, 2]},
    "cut": lambda: {"prefix_cut": "layer"},
    "precision": lambda: {"model": toy_model("llama").to(torch.bfloat16)},
    "packing": lambda: {"packing": False},
    "configuration": lambda: {"model": toy_model("llama", rms_norm_eps=1e-5)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_same_is_computed_anew(change, recordings, tmp_path):
    edit(tmp_path)
    changed = edit(tmp_path, **CHANGES[change]())
    assert len(recordings) == 2
    assert_same(changed, edit(None, **CHANGES[change]()))
    edit(tmp_path)  # that of the first run is still there
    assert len(recordings) == 2


def test_it_does_not_depend_on_what_is_trained(recordings, tmp_path):
    def changed():
        model = toy_model("llama")
        with torch.no_grad():
            model.get_parameter(TRAINED).mul_(1.5)
            model.model.layers[3].mlp.up_proj.weight.mul_(0.5)  # above it
        return model

    first = edit(tmp_path)
    second = edit(tmp_path, model=changed())
    assert recordings == [8]
    assert second.step_losses != first.step_losses
    assert_same(second, edit(None, model=changed()))


def test_an_edited_model_is_edited_again(recordings, tmp_path):
    model = toy_model("llama")
    first = edit(tmp_path, model=model)
    second = edit(tmp_path, model=model)
    assert recordings == [8]
    assert second.step_losses[0] < first.step_losses[0]


# What is damaged


def flip(data, _seal):
    content = bytearray(data.read_bytes())
    content[-9] ^= 64
    data.write_bytes(content)


DAMAGES = {
    "byte": flip,
    "truncated": lambda data, seal: data.write_bytes(data.read_bytes()[:-1]),
    "header": lambda data, seal: data.write_bytes(b"\0" + data.read_bytes()[1:]),
    "no seal": lambda data, seal: seal.unlink(),
    "seal": lambda data, seal: seal.write_text(seal.read_text()[:-3]),
    "no data": lambda data, seal: data.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("budget", [None, 0.0])
def test_a_damaged_file_is_made_again(damage, budget, recordings, tmp_path, caplog):
    expected = edit(tmp_path, prefix_host_gib=budget)
    before = names(tmp_path)
    data, seal = (tmp_path / name for name in before)
    DAMAGES[damage](data, seal)
    with caplog.at_level(logging.INFO):
        again = edit(tmp_path, prefix_host_gib=budget)
    assert "is not used: " in caplog.text
    assert recordings == [8, 8]
    assert_same(again, expected)
    assert names(tmp_path) == before
    edit(tmp_path, prefix_host_gib=budget)
    assert recordings == [8, 8]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_recording_that_was_interrupted_leaves_no_file(error, tmp_path, monkeypatch):
    put, calls = StateFile.put, []

    def interrupted(self, where, states):
        calls.append(len(where))
        if len(calls) > 1:
            raise error
        put(self, where, states)

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "put", interrupted)
        with pytest.raises(error):
            edit(tmp_path, eval_batch_size=2)
    assert names(tmp_path) == []
    assert_same(edit(tmp_path), edit(None))


def test_a_budget_that_is_too_small_is_told_before_anything_is_made(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(MemoryBudgetError, match=r" 0 GiB on disk.*`prefix_disk_gib`"):
        edit(folder, prefix_disk_gib=1e-9)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = toy_model("llama")
    before = model.get_parameter(TRAINED).clone()
    with pytest.raises(OutputError, match="`prefix_dir`"):
        edit(tmp_path / "file" / "folder", model=model)
    assert torch.equal(model.get_parameter(TRAINED), before)


# The streamed model


def saved(folder, model):
    model.save_pretrained(folder, max_shard_size="50KB")
    toy_tokenizer().save_pretrained(folder)


# mixtral's experts are saved one by one, and put together when they are loaded.
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_streamed_model_uses_its_own_again(kind, tmp_path):
    from locft_easyedit.training.session import EditSession

    saved(tmp_path / "model", toy_model(kind))
    passes, results = [], []
    for _ in range(2):
        h = toy_hparams(
            model_name=str(tmp_path / "model"),
            rewrite_module_tmp=DOWN_PROJECTION[kind],
            device="cpu",
            stream_frozen=True,
            prefix_dir=str(tmp_path / "kept"),
        )
        model, tokenizer = load_model(h)
        with EditSession(model, tokenizer, toy_requests(8), h, progress=False) as session:
            results.append(session.train_())
            passes.append(session.stream.n_passes)
    assert passes == [1, 0]
    assert_same(*results)
    # Another checkpoint of the same name and form.
    other = toy_model(kind, seed=1)
    saved(tmp_path / "model", other)
    model, tokenizer = load_model(h)
    with EditSession(model, tokenizer, toy_requests(8), h, progress=False) as session:
        third = session.train_()
        assert session.stream.n_passes == 1
    assert third.step_losses != results[0].step_losses


# The fingerprint


def fingerprint(model=None, *, kind="layer", trained=(TRAINED,), packed=True, n=4):
    from dataclasses import replace

    model = toy_model("llama") if model is None else model
    texts = tokenize_edits(toy_tokenizer(), _edits(n), append_eos=True, max_positions=None)
    cut = replace(layer_cut(find_layers(model), 2), kind=kind)
    return prefix_fingerprint(model, cut, trained, texts, packed)


def _edits(n):
    from locft_easyedit.data.requests import distinct_edits

    return distinct_edits(toy_requests(n), "train").edits


def test_every_element_that_matters_counts():
    reference = fingerprint()
    assert fingerprint() == reference
    model = toy_model("llama")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        place = int(torch.randint(len(flat), (), generator=generator))
        before = float(flat[place])
        flat[place] = torch.nextafter(flat[place], torch.tensor(9.0))
        above = name == TRAINED or name.startswith("model.layers.3.")
        assert (fingerprint(model) == reference) == above, name
        flat[place] = before
    assert fingerprint(model) == reference


def test_settings_count():
    found = {
        fingerprint(),
        fingerprint(kind="mlp"),
        fingerprint(packed=False),
        fingerprint(n=3),
        fingerprint(trained=()),
        fingerprint(toy_model("llama").to(torch.float16)),
        fingerprint(toy_model("llama", hidden_act="gelu")),
    }
    assert len(found) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_checksum_sees_each_bit_and_place(dtype, monkeypatch):
    monkeypatch.setattr("locft_easyedit.utils.hashing._CHECKSUM_CHUNK", 4)
    tensor = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    bits = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    before = checksum(tensor)
    for place in range(len(bits)):
        for bit in range(8 * dtype.itemsize - 1):
            bits[place] ^= 1 << bit
            assert checksum(tensor) != before
            bits[place] ^= 1 << bit
    assert checksum(tensor) == before
    assert checksum(tensor[torch.tensor([1, 0, 2])]) != before
    assert checksum(tensor.flip(1)) != before


def test_the_checksum_takes_any_part_of_a_tensor():
    whole = torch.arange(9, dtype=torch.bfloat16)
    assert checksum(whole[1:]) == checksum(whole[1:].clone())  # not at a multiple of 4 bytes
    assert checksum(whole[::2]) == checksum(whole[::2].clone())
    assert checksum(torch.tensor(3.0)) != checksum(torch.tensor(4.0))
    assert checksum(torch.zeros(0)) == 0
