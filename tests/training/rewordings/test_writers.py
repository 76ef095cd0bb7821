"""Local writers, and what is checked before any weights are loaded."""

import gc
import weakref

import pytest
import torch
from helpers.toys import toy_chat_tokenizer, toy_hparams, toy_model, toy_tokenizer

from locft_easyedit.data.forms import ChatTemplate
from locft_easyedit.easyedit.editor import LocFTBFMethods
from locft_easyedit.errors import LocFTError, RewordingsError
from locft_easyedit.training.rewordings import writers
from locft_easyedit.training.rewordings.instruction import N_ASKED, Prompt
from locft_easyedit.training.rewordings.writers import (
    LocalWriter,
    check_writer,
    opened_writer,
    writer_name,
)

PROMPTS = [Prompt("Who wrote Emma?", "Emma"), Prompt("The capital of the south of Peru is", None)]


@pytest.fixture(scope="module")
def chatting():
    return toy_model("llama", max_position_embeddings=4096), toy_chat_tokenizer()


@pytest.fixture
def saved(tmp_path, chatting):
    """The folder of a model with a chat template."""
    for part in chatting:
        part.save_pretrained(tmp_path / "Writer-1B")
    return tmp_path / "Writer-1B"


def local(chatting):
    return LocalWriter(*chatting, ChatTemplate(chatting[1]), seed=0)


def test_what_a_model_is_asked_and_what_is_read(chatting, monkeypatch):
    model, tokenizer = chatting
    asked = []

    def generate(input_ids, attention_mask, **options):
        asked.extend(
            tokenizer.decode(row[real.bool()])
            for row, real in zip(input_ids, attention_mask, strict=True)
        )
        said = tokenizer(["one way\nanother", "a third way</s>"], padding=True)["input_ids"]
        return torch.cat([input_ids, torch.tensor(said)], 1)

    monkeypatch.setattr(model, "generate", generate)
    both = [Prompt("Who wrote Emma?", "Emma"), Prompt("Who wrote Ilse?", "Ilse")]
    found = list(local(chatting).answers(both))
    assert [text.strip() for text, _ in found] == ["one way\nanother", "a third way"]
    assert [complete for _, complete in found] == [False, True]
    for text, prompt in zip(asked, both, strict=True):
        assert text.endswith(f"\n\n{prompt.text}</s>\n<s>assistant\n")
        assert text.count("<s>user") == 2  # an example before


def test_the_same_is_written_again_and_nothing_else_changes(chatting):
    model, _ = chatting
    model.train()
    state, settings = torch.get_rng_state(), model.generation_config
    first = list(local(chatting).answers(PROMPTS))
    assert list(local(chatting).answers(PROMPTS)) == first
    assert len(first) == len(PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is settings
    assert model.training
    model.eval()


def test_a_prompt_without_room_in_the_context_gets_none(chatting):
    long = Prompt("Who wrote Emma? " * 2000, "Emma")
    [nothing] = local(chatting).answers([long])
    assert nothing == ("", True)
    short = toy_model("llama"), chatting[1]  # 256 tokens, fewer than the example has
    assert list(local(short).answers(PROMPTS)) == [("", True)] * 2
    assert N_ASKED > 0


def test_another_model_is_loaded_and_goes(saved, chatting):
    hparams = toy_hparams(augment_model=str(saved))
    with opened_writer(hparams, *chatting) as writer:
        assert writer._model is not chatting[0]
        assert len(list(writer.answers(PROMPTS))) == 2
        gone = weakref.ref(writer._model)
        del writer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
    ids=lambda error: type(error).__name__,
)
def test_no_room_beside_the_model(error, saved, chatting, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(writers, "load_causal_lm", full)
    hparams = toy_hparams(augment_model=str(saved))
    with (
        pytest.raises(RewordingsError, match="cpu has no room for it beside the model"),
        opened_writer(hparams, *chatting),
    ):
        pass


def test_names_are_those_of_folders(saved, chatting):
    model = toy_model("llama")
    model.name_or_path = str(saved)
    for value in (str(saved), f"{saved}/", "edited"):
        assert writer_name(toy_hparams(augment_model=value), model) == "Writer-1B"
    nameless = toy_model("llama")
    assert writer_name(toy_hparams(augment_model="edited"), nameless) == "LlamaForCausalLM"
    assert writer_name(toy_hparams(augment_model="endpoint:a/b"), model) == "endpoint:a/b"


def test_nothing_to_check():
    check_writer(toy_hparams())


def test_who_can_write(saved, chatting, served):
    check_writer(toy_hparams(augment_model="endpoint:writer"))
    check_writer(toy_hparams(augment_model=str(saved)))
    check_writer(toy_hparams(augment_model="edited", model_name=str(saved)))
    check_writer(toy_hparams(augment_model="edited"), chatting[1])
    check_writer(toy_hparams(augment_model="edited", model_name=chatting))


def refused(changes, tokenizer=None):
    with pytest.raises(LocFTError) as raised:
        check_writer(toy_hparams(**changes), tokenizer)
    return str(raised.value)


def test_who_cannot(tmp_path, saved, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    toy_tokenizer().save_pretrained(tmp_path / "mute")
    toy_model("llama").save_pretrained(tmp_path / "mute")
    told = "is asked in its chat template. The tokenizer has no chat template. Name the folder"
    mute = str(tmp_path / "mute")
    assert told in refused({"augment_model": mute})
    assert told in refused({"augment_model": "edited", "model_name": mute})
    assert told in refused({"augment_model": "edited"}, toy_tokenizer())
    assert "`augment_model='edted'` is no folder. Give `edited`" in refused(
        {"augment_model": "edted"}
    )
    assert "needs the environment variable OPENAI_BASE_URL" in refused(
        {"augment_model": "endpoint:x"}
    )
    assert "is a folder. Give the path of a file" in refused(
        {"augment_model": str(saved), "augment_cache": str(tmp_path)}
    )


def test_it_is_checked_before_the_model_is_loaded(toy_folder, monkeypatch, capsys):
    from locft_easyedit.__main__ import main

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def loaded(*args, **kwargs):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("locft_easyedit.cli.edit.load_model", loaded)
    monkeypatch.setattr("locft_easyedit.easyedit.editor.load_model", loaded)
    command = ["edit", "--config-name", "toy.yaml", "data=edits.json"]
    assert main([*command, "augment_model=endpoint:x"]) != 0
    assert "OPENAI_BASE_URL" in capsys.readouterr().err
    with pytest.raises(RewordingsError, match="OPENAI_BASE_URL"):
        LocFTBFMethods(toy_hparams(model_name="toy", augment_model="endpoint:x"))
