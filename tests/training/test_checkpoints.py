"""Checkpoints: an interrupted training goes on, bit for bit, and only where it belongs."""

import dataclasses
import json
import logging
import os
import shutil
import signal

import pytest
import torch
from helpers.toys import REPOSITORY, toy_hparams, toy_model, toy_requests, toy_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from locft_easyedit.api import edit_model
from locft_easyedit.errors import CheckpointError, EditInterrupted, NonFiniteLossError, OutputError
from locft_easyedit.modeling import sampling
from locft_easyedit.modeling.sampling import seeded
from locft_easyedit.training import checkpoint_file
from locft_easyedit.training import checkpoints as checkpoint
from locft_easyedit.training.checkpoint_file import read_checkpoint
from locft_easyedit.training.checkpoints import Checkpoints
from locft_easyedit.training.preserve import sampled_text as sampled
from locft_easyedit.training.progress import Progress
from locft_easyedit.training.session import EditSession
from locft_easyedit.training.step import TrainingStep
from locft_easyedit.training.trained_weights import TrainedWeights
from locft_easyedit.utils import files

N = 14
KEPT_PROMPTS = str(REPOSITORY / "tests" / "helpers" / "kept_prompts.json")
SETTINGS = {"batch_size": 4, "num_steps": 3, "lr": 5e-3, "batch_loss_threshold": 5.9}


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C as on a terminal: a shell starts what runs in the background without it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other):
    assert all(torch.equal(one[name], other[name]) for name in other)


def edit(folder, *, kind="llama", dtype=torch.float32, n=N, **changes):
    model = toy_model(kind).to(dtype)
    minutes = changes.pop("checkpoint_minutes", 0)
    hparams = toy_hparams(
        **SETTINGS | changes,
        checkpoint_dir=None if folder is None else str(folder),
        checkpoint_minutes=minutes,
    )
    return model, edit_model(model, toy_tokenizer(), toy_requests(n), hparams, progress=False)


@pytest.fixture
def every_checkpoint(tmp_path, monkeypatch):
    """Runs an edit and returns it with copies of all checkpoints that it made, in order."""

    def run(**changes):
        copies = []
        write = Checkpoints._write

        def written(self, *args):
            done = write(self, *args)
            copies.append(tmp_path / f"copy-{len(copies)}")
            shutil.copytree(self.path.parent, copies[-1])
            return done

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "_write", written)
            model, result = edit(tmp_path / "run", **changes)
        return model, result, copies

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "gpt2", "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj.weight"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"micro_batch_size": 3},
        {"packing": False, "frozen_prefix": False},
        {"layers": [1, 2], "tuning": "lora", "lora_rank": 2},
        {"pipeline": "depth_first", "batch_loss_threshold": 5.9, "lr": 5e-3},
        {"loss_average": "token", "lr_schedule": "cosine"},
        {
            "kind": "mixtral",
            "rewrite_module_tmp": [f"model.layers.{{}}.mlp.experts.down_proj[{i}]" for i in (0, 3)],
        },
        {"forms": ["question_answer", "context"], "preserve": [KEPT_PROMPTS]},
    ],
    ids=str,
)
def test_a_training_goes_on_from_each_checkpoint_with_the_same_bits(changes, every_checkpoint):
    plain, expected = edit(None, **changes)
    model, result, copies = every_checkpoint(**changes)
    assert_same(weights(model), weights(plain))  # making checkpoints changes nothing
    assert len(copies) == len(result.step_losses) + 1
    for copy in copies:
        model, resumed = edit(copy, **changes)
        assert_same(weights(model), weights(plain))
        assert_same(resumed.new, expected.new)
        assert_same(resumed.original, expected.original)
        assert resumed.losses == expected.losses
        assert resumed.step_losses == expected.step_losses
        assert resumed.n_updates == expected.n_updates
        assert resumed.converged == expected.converged
        assert resumed.summary().keys() == expected.summary().keys()


def test_resuming_does_not_train_again_what_was_trained(every_checkpoint, monkeypatch):
    _, result, copies = every_checkpoint()
    steps = []
    take_ = TrainingStep.take_
    monkeypatch.setattr(
        TrainingStep, "take_", lambda self, *args: steps.append(1) or take_(self, *args)
    )
    for done, copy in enumerate(copies, start=1):
        steps.clear()
        edit(copy)
        assert len(steps) == max(0, len(result.step_losses) - done)


def test_a_finished_training_computes_no_prefix(tmp_path, monkeypatch):
    _, result = edit(tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr("locft_easyedit.training.edit_runner.prepare_runner", never)
    _, again = edit(tmp_path)
    assert_same(again.new, result.new)
    assert (again.packed, again.frozen_prefix) == (result.packed, result.frozen_prefix)
    assert 0 < again.timings["train"] <= result.timings["train"]


def interrupt_at(monkeypatch, number, step_number, times=1):
    take_ = TrainingStep.take_
    steps = []

    def step(self, *args):
        outcome = take_(self, *args)
        steps.append(1)
        if len(steps) == step_number:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return outcome

    monkeypatch.setattr(TrainingStep, "take_", step)
    return steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(number, tmp_path, monkeypatch):
    expected, _ = edit(None)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    model = toy_model("llama")
    before, modules = weights(model), [name for name, _ in model.named_modules()]
    hparams = toy_hparams(**SETTINGS, checkpoint_dir=str(tmp_path))  # the next one in 5 minutes
    with monkeypatch.context() as patch:
        steps = interrupt_at(patch, number, 6)
        with pytest.raises(EditInterrupted, match="epoch 2, after 2 of its mini-batches") as caught:
            edit_model(model, toy_tokenizer(), toy_requests(N), hparams, progress=False)
    assert len(steps) == 6
    assert caught.value.number == number
    assert "the same edit goes on there" in str(caught.value)
    assert_same(weights(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed, _ = edit(tmp_path)
    assert_same(weights(resumed), weights(expected))


def test_a_depth_first_training_says_where_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    changes = {"pipeline": "depth_first", "batch_loss_threshold": 0.0}
    expected, result = edit(None, **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, signal.SIGINT, 2 + SETTINGS["num_steps"])
        with pytest.raises(EditInterrupted, match="in mini-batch 2, after 2 of its steps"):
            edit(tmp_path, checkpoint_minutes=5, **changes)
    resumed, _ = edit(tmp_path, checkpoint_minutes=5, **changes)
    assert "training goes on in mini-batch 2, after 2 of its steps" in caplog.text
    assert_same(weights(resumed), weights(expected))
    # As of epochs: a loss after each step, the mean over all edits.
    assert len(result.losses) == result.summary()["epochs"] == SETTINGS["num_steps"]


def test_a_signal_after_the_last_step_is_not_lost(tmp_path, monkeypatch):
    expected, _ = edit(None)
    finite = TrainedWeights.finite

    def finite_and_interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return finite(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainedWeights, "finite", finite_and_interrupted)
        with pytest.raises(EditInterrupted, match="Interrupted after training"):
            edit(tmp_path, checkpoint_minutes=5)
    assert read_checkpoint(tmp_path / checkpoint.FILE_NAME).progress.finished
    model, _ = edit(tmp_path)
    assert_same(weights(model), weights(expected))


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, signal.SIGINT, 2, times=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        edit(tmp_path, checkpoint_minutes=5)
    assert not isinstance(caught.value, EditInterrupted)
    assert not (tmp_path / checkpoint.FILE_NAME).exists()


def test_without_checkpoints_ctrl_c_acts_at_once(monkeypatch):
    steps = interrupt_at(monkeypatch, signal.SIGINT, 2)
    with pytest.raises(KeyboardInterrupt) as caught:
        edit(None)
    assert not isinstance(caught.value, EditInterrupted)
    assert len(steps) <= 2


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A folder with the checkpoint of a training that was interrupted after six steps."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, signal.SIGINT, 6)
        with pytest.raises(EditInterrupted, match="goes on there"):
            edit(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 1e-3}, r"`lr=0\.005` there; now 0\.001"),
        ({"seed": 1}, "`seed=42` there; now 1"),
        ({"batch_size": 5}, "`batch_size=4` there; now 5"),
        ({"num_steps": 9}, "`num_steps=3` there; now 9"),
        ({"layers": [1]}, r"`layers=\[2\]` there; now \[1\]"),
        ({"n": 13}, "edits are others .14 edits; now 13"),
        ({"tuning": "lora"}, "`tuning='full'` there; now 'lora'"),
        ({"forms": ["context"]}, r"`forms=\[\]` there; now \['context'\]"),
        ({"preserve": [KEPT_PROMPTS]}, r"`preserve=\[\]` there; now \["),
        ({"kind": "qwen2"}, "configuration is another"),
        ({"dtype": torch.bfloat16}, "precision is another .float32; now bfloat16"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_training_is_refused_and_named(changes, named, unfinished):
    content = (unfinished / checkpoint.FILE_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=named):
        edit(unfinished, **changes)
    assert (unfinished / checkpoint.FILE_NAME).read_bytes() == content


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("model.layers.2.mlp.down_proj.weight", "weights to be trained is another"),
        ("model.layers.0.mlp.up_proj.weight", "lower layers is another"),
        ("model.embed_tokens.weight", "lower layers is another"),
        ("model.layers.3.mlp.up_proj.weight", "upper layers is another"),
    ],
)
def test_another_model_of_the_same_shape_is_refused(name, named, unfinished):
    model = toy_model("llama")
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)
    before = weights(model)
    hparams = toy_hparams(**SETTINGS, checkpoint_dir=str(unfinished))
    with pytest.raises(CheckpointError, match=named):
        edit_model(model, toy_tokenizer(), toy_requests(N), hparams, progress=False)
    assert_same(weights(model), before)


def test_all_differences_are_named_at_once(unfinished):
    with pytest.raises(CheckpointError, match="Go on with that") as caught:
        edit(unfinished, lr=1e-3, seed=1, n=3)
    assert [line[:8] for line in str(caught.value).split("\n")[1:]] == [
        "  - the ",
        "  - `lr=",
        "  - `see",
    ]


@pytest.mark.parametrize(
    "changes", [{"checkpoint_minutes": 3}, {"prefix_host_gib": 1.0}, {"max_length": 9}], ids=str
)
def test_what_has_no_effect_may_change(changes, unfinished):
    expected, _ = edit(None)
    model, _ = edit(unfinished, **changes)
    assert_same(weights(model), weights(expected))


def test_the_checkpoint_of_a_finished_training_gives_way(tmp_path):
    edit(tmp_path)
    expected, _ = edit(None, lr=1e-3)
    model, _ = edit(tmp_path, lr=1e-3)
    assert_same(weights(model), weights(expected))


def test_another_version_or_device_is_a_warning(unfinished, monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with caplog.at_level(logging.WARNING):
        edit(unfinished)
    [warning] = [r.message for r in caplog.records if "torch was" in r.message]
    assert "is 2.99.0" in warning


def test_each_edit_alone_and_a_part_of_the_edits_leave_the_checkpoint_alone(tmp_path):
    hparams = toy_hparams(**SETTINGS, checkpoint_dir=str(tmp_path), checkpoint_minutes=0)
    session = EditSession(
        toy_model("llama"), toy_tokenizer(), toy_requests(4), hparams, progress=False
    )
    with session:
        session.train_([1])
    assert not (tmp_path / checkpoint.FILE_NAME).exists()


def test_a_second_training_of_a_session_is_not_taken_for_the_first(tmp_path):
    """It begins at other weights than those that the checkpoint is of."""
    hparams = toy_hparams(**SETTINGS, checkpoint_dir=str(tmp_path), checkpoint_minutes=0)
    model = toy_model("llama")
    with EditSession(model, toy_tokenizer(), toy_requests(N), hparams, progress=False) as session:
        first = session.train_()
        second = session.train_()
    assert second.n_updates != first.n_updates or second.losses != first.losses
    expected, _ = edit(None)
    model, _ = edit(tmp_path)
    assert_same(weights(model), weights(expected))


def test_divergence_leaves_no_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError, match="Lower `lr"):
        edit(tmp_path, lr=1e38)
    assert not (tmp_path / checkpoint.FILE_NAME).exists()


def test_halved_micro_batches_stay_halved(tmp_path, monkeypatch):
    gradients_ = TrainingStep._summed_

    def at_most_two(self, parts, n_edits):
        if max(part.n_texts for part in parts) > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return gradients_(self, parts, n_edits)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "_summed_", at_most_two)
        expected, _ = edit(None)
        interrupt_at(patch, signal.SIGINT, 5)
        with pytest.raises(EditInterrupted, match="epoch 2"):
            edit(tmp_path)
    assert read_checkpoint(tmp_path / checkpoint.FILE_NAME).progress.micro_batch_size == 2
    model, _ = edit(tmp_path)  # with room for all again
    assert_same(weights(model), weights(expected))


def test_the_prefix_ends_where_it_did(unfinished):
    """Another cut, which free memory may suggest, would move the last bits."""
    path = unfinished / checkpoint.FILE_NAME
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["locft_checkpoint"])
    assert content["notes"] == {"cut": "matrix", "packed": True, "preserved": None}
    content["notes"]["cut"] = "layer"
    save_file(load_file(path), path, metadata={"locft_checkpoint": json.dumps(content)})
    hparams = toy_hparams(**SETTINGS, checkpoint_dir=str(unfinished))
    session = EditSession(
        toy_model("llama"), toy_tokenizer(), toy_requests(N), hparams, progress=False
    )
    with session:
        assert session._runner.prefix.cut.kind == "layer"


def test_what_was_made_with_other_sampled_text_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "_DOCUMENTS", 32)  # one batch is text enough
    kept, folder = tmp_path / "kept", tmp_path / "run"
    settings = {"preserve": ["sampled"], "preserve_dir": str(kept), "lr": 1e-3}
    with monkeypatch.context() as patch:
        interrupt_at(patch, signal.SIGINT, 5)
        with pytest.raises(EditInterrupted):
            edit(folder, **settings)
    shutil.rmtree(kept)
    with monkeypatch.context() as patch:  # as another device would sample it
        patch.setattr(sampling, "seeded", lambda model, seed: seeded(model, seed + 1))
        with pytest.raises(CheckpointError, match="made with other text in `preserve`"):
            edit(folder, **settings)
    shutil.rmtree(kept)
    model, _ = edit(folder, **settings)
    whole, _ = edit(None, **settings)
    assert_same(weights(model), weights(whole))


def test_two_trainings_do_not_share_a_folder(tmp_path):
    hparams = toy_hparams(**SETTINGS, checkpoint_dir=str(tmp_path))
    parts = toy_tokenizer(), toy_requests(N), hparams
    with (
        EditSession(toy_model("llama"), *parts, progress=False),
        pytest.raises(OutputError, match="in use: another run"),
    ):
        edit(tmp_path)
    edit(tmp_path)  # free again


@pytest.mark.parametrize("fails", ["save_file", "fsync", "replace"])
def test_a_checkpoint_that_cannot_be_written_is_a_warning(fails, tmp_path, monkeypatch, caplog):
    expected, _ = edit(None)
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    owner = checkpoint_file if fails == "save_file" else files.os
    original = getattr(owner, fails)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(owner, fails, full)
        model, _ = edit(tmp_path)
    assert_same(weights(model), weights(expected))
    assert "No space left on device" in caplog.text
    assert "training goes on" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", checkpoint.FILE_NAME]
    kept = read_checkpoint(tmp_path / checkpoint.FILE_NAME).progress
    assert 0 < len(kept.step_losses) <= 2  # the last that could be written
    model, _ = edit(tmp_path)
    assert_same(weights(model), weights(expected))


def test_a_folder_that_cannot_be_made_shows_before_anything_is_trained(tmp_path):
    (tmp_path / "file").write_text("")
    model = toy_model("llama")
    before = weights(model)
    hparams = toy_hparams(**SETTINGS, checkpoint_dir=str(tmp_path / "file" / "folder"))
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        edit_model(model, toy_tokenizer(), toy_requests(N), hparams, progress=False)
    assert_same(weights(model), before)


def test_a_disk_without_room_is_told_at_the_beginning(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with caplog.at_level(logging.WARNING):
        edit(tmp_path)
    [warning] = [r.message for r in caplog.records if "a checkpoint takes" in r.message]
    assert "choose another `checkpoint_dir`" in warning


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".checkpoint.safetensors.1234.tmp").write_bytes(b"half")
    (tmp_path / ".model.1234.tmp").mkdir()
    (tmp_path / ".model.1234.tmp" / "config.json").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"mine")
    edit(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", checkpoint.FILE_NAME, "mine.tmp"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"", "is no checkpoint"),
        (lambda b: b[:1000], "is no checkpoint"),
        (lambda b: b[:-1], "is no checkpoint"),
        (lambda b: b"\x80\x04pickle" + b, "is no checkpoint"),
        (lambda b: b[:-40] + bytes([b[-40] ^ 1]) + b[-39:], "is damaged"),
    ],
    ids=["empty", "cut", "shorter", "pickle", "bit"],
)
def test_damage_is_told(damage, message, unfinished):
    path = unfinished / checkpoint.FILE_NAME
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        edit(unfinished)


def changed(unfinished, change):
    """Writes the checkpoint again with its JSON text changed."""
    path = unfinished / checkpoint.FILE_NAME
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["locft_checkpoint"])
    change(content)
    save_file(load_file(path), path, metadata={"locft_checkpoint": json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=1), "has format 1; this version reads 2"),
        (lambda c: c.pop("identity"), "KeyError"),
        (lambda c: c.update(identity=[1]), "damaged"),
        (lambda c: c["progress"].update(epoch="1"), "epoch is '1'"),
        (lambda c: c["progress"].update(epoch=-1), "epoch is -1"),
        (lambda c: c["progress"].update(epoch=2), "2 epochs, but 1 losses"),
        (lambda c: c["progress"].update(step=3), "do not fit"),
        (lambda c: c["progress"].update(micro_batch_size=0), "micro_batch_size is 0"),
        (lambda c: c["notes"].update(cut="embedding"), "its notes are"),
        (lambda c: c["notes"].update(preserved=1), "its notes are"),
        (lambda c: c["crc32"].pop("losses"), "tensors are missing"),
    ],
)
def test_a_changed_text_is_told(change, message, unfinished):
    changed(unfinished, change)
    with pytest.raises(CheckpointError, match=message):
        edit(unfinished)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_byte_may_change(data, unfinished):
    """Either the change has no effect on what is read, or it is told."""
    path = unfinished / checkpoint.FILE_NAME
    whole = path.read_bytes()
    expected = read_checkpoint(path)
    where = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[where] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        found = read_checkpoint(path)
    except CheckpointError:
        pass
    else:
        assert_same(found.tensors, expected.tensors)
        assert found.progress.step_losses == expected.progress.step_losses
    finally:
        path.write_bytes(whole)


def test_progress_is_kept_whole(unfinished):
    """A field that is added must be kept as well."""
    kept = {*checkpoint_file._SERIES, *checkpoint_file._COUNTS, "shuffling", "repairs"}
    fields = {f.name for f in dataclasses.fields(Progress)}
    # The one is empty when a checkpoint is made; the hyper-parameters that are kept say the other.
    assert kept == fields - {"unsettled", "depth_first"}
