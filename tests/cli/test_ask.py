"""`locft ask`, as a user runs it, on toy models in folders."""

import io

import pytest
from helpers.toys import made_delta, toy_chat_tokenizer, toy_model, toy_tokenizer

from locft_easyedit.__main__ import main
from locft_easyedit.delta.delta import Delta
from locft_easyedit.evaluation.asking import answers_to
from locft_easyedit.utils.tables import one_line

PROMPT = "The capital of Norway is"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A toy before and after an edit, and the edit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    model = toy_model()
    model.save_pretrained("base")
    made_delta(model=model, scale=3).save("edit.safetensors")
    model.save_pretrained("edited")
    for name in ("base", "edited"):
        toy_chat_tokenizer().save_pretrained(name)
    return tmp_path


def ask(capsys, *arguments, status=0):
    assert main(["ask", *arguments, "device=cpu"]) == status
    return capsys.readouterr()


def cells(printed, form):
    [line] = [line for line in printed.split("\n") if line.startswith(f"│ {form} ")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def expected(model, tokenizer, n=8):
    return {form: one_line(a) for form, a in answers_to(model, tokenizer, PROMPT, n).items()}


def reference(model, ids, n, ends):
    """Returns the naive greedy continuation, without a cache."""
    import torch

    ids = list(ids)
    for k in range(n):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            return ids[-k - 1 : -1], True
    return ids[-n:], False


def test_answers_are_greedy_ones_in_both_forms():
    model, tokenizer = toy_model(), toy_chat_tokenizer()
    found = answers_to(model, tokenizer, PROMPT, 8)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    asked = {
        "plain": tokenizer(PROMPT)["input_ids"],
        "chat": tokenizer(chat, add_special_tokens=False)["input_ids"],
    }
    assert found.keys() == asked.keys()
    for form, ids in asked.items():
        written, ended = reference(model, ids, 8, {tokenizer.eos_token_id})
        text = tokenizer.decode(written, skip_special_tokens=True).lstrip()
        if form == "plain" and "\n" in text:
            text, ended = text.partition("\n")[0], True
        assert found[form] == text.strip() + "..." * (not ended)


def test_before_and_after_an_edit(folder, capsys):
    printed = ask(capsys, "base", "delta=edit.safetensors", f"prompt={PROMPT}", "tokens=8").out
    tokenizer = toy_chat_tokenizer()
    before = expected(toy_model(), tokenizer)
    model = toy_model()
    Delta.load("edit.safetensors").apply_(model)
    after = expected(model, tokenizer)
    assert before != after
    for form in ("plain", "chat"):
        assert cells(printed, form) == [before[form], after[form]]
    assert PROMPT in printed

    # The same of a model that has the edit already, and of two models.
    again = ask(capsys, "edited", "delta=edit.safetensors", f"prompt={PROMPT}", "tokens=8").out
    assert "it is taken out for the answers before" in again
    pair = ask(capsys, "edited", "original=base", f"prompt={PROMPT}", "tokens=8").out
    for form in ("plain", "chat"):
        assert cells(again, form) == cells(pair, form) == cells(printed, form)


def test_prompts_are_read_until_an_empty_line(folder, capsys, monkeypatch):
    lines = "The river is\n" + "a " * 300 + "\nShe is\n\nHe is\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    told = ask(capsys, "base", "tokens=2")
    assert [text in told.out for text in ("The river is", "She is", "He is")] == [True, True, False]
    assert "answer" in told.out
    assert "301 tokens, and an answer up to 2" in told.err


def test_without_a_chat_template_the_plain_form_is_asked(folder, capsys):
    toy_tokenizer().save_pretrained("base")
    (folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
    printed = ask(capsys, "base", f"prompt={PROMPT}", "tokens=2").out
    assert "│ chat" not in printed
    assert "no chat template" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "delta=none"], "`none` cannot be read"),
        (["base", "delta=edit.safetensors", "original=base"], "Leave `original` out"),
        (["base", "tokens=0"], "`tokens=0` must be 1 or more"),
        (["nowhere/x", "promt=a"], "Did you mean `prompt`?"),
        (["./nowhere", "prompt=a"], "does not exist"),
        (["base", "delta=edit.safetensors", "dtype=bfloat16", "prompt=a"], "float32"),
    ],
    ids=str,
)
def test_mistakes(folder, capsys, arguments, message):
    told = ask(capsys, *arguments, status=2)
    assert message in told.err
    assert told.out == ""
