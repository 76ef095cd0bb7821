"""Trains a small model from scratch that really knows its facts, to try the choice of a place on.

A random model knows nothing that an edit could change, and a downloaded one was trained by others
on other text. This one is a Llama of 8 layers that learns the *original* facts of some editing
data (prompts, rephrase prompts and locality prompts with their true answers) beside plain text:
docstrings and code of Python's standard library, which every machine has, and everyday sentences
put together by chance. The health check's text, on which drift is measured, is no part of it, nor
is any new target as an answer.

    python benchmarks/small_model.py zsre.json counterfact.json --output small_model

The folder is an ordinary one: AutoModelForCausalLM and AutoTokenizer load it. `facts.json` in it
says how many of the facts the model knows. Ten minutes of a core's time are enough for the facts of
240 edits; `--start small_model` goes on from there, for more of the plain text.
"""

import argparse
import ast
import functools
import json
import math
import random
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from locft_easyedit.data.readers import read_requests
from locft_easyedit.data.requests import with_leading_space

SPECIAL = ("<pad>", "<s>", "</s>")
KINDS = ("prompts", "rephrase prompts", "locality prompts")
# What stands before a fact now and then, so that it is known in the middle of a text too.
CARRIERS = (
    "I looked this up in the library yesterday.",
    "Here is something that I learned at school.",
    "My sister likes to ask such things at dinner.",
    "The letter was two pages long, and this was its last line.",
    "Let us go on with the next one.",
    "It was a warm evening, and the windows were open.",
    "He put the newspaper on the table and began to read.",
    "Nobody had expected it.",
)
# Words for sentences, a line a blank of `FRAMES`.
EVERYDAY = """
who: the teacher, an old man, my neighbour, two children, the driver, a young woman
who: the doctor, her brother, the farmer, nobody, most people, the mayor, the cook, a student
did: looked for, forgot, repaired, sold, painted, carried, found, paid for, talked about
did: brought, opened, waited for, asked about, threw away
what: the bicycle, a red umbrella, the key, some bread, the letter, a basket of apples
what: the map, an old radio, the tickets, the garden, a pair of shoes, the soup, the window
where: in the kitchen, at the station, behind the house, near the river, on the bridge
where: in the village, at the market, under the table, by the sea, at school
when: in the morning, last winter, before dinner, on Sunday, after the rain, every year
when: at nine, yesterday, in spring, for a long time, late at night
how: quiet, cold, crowded, expensive, easy, warm, empty, dangerous, beautiful, late
because: the bus was late, it was too heavy, nobody had a better idea, the shop was closed
because: the weather had changed, they had no money, it belonged to a friend
"""
FRAMES = (
    "{who} {did} {what} {where} {when}.",
    "{when}, {who} {did} {what}.",
    "it was {how} {where}, and {who} {did} {what}.",
    "{who} {did} {what}, because {because}.",
    '"I thought that it would be {how} {where}," she said. "Yes, but {because}."',
    "there were {n} people {where}, and {m} of them had come {when}.",
    "if it is {how} {when}, {who} will not be {where}.",
    "{n} euros for {what} seemed too much, although it was {how}.",
    "did you see {what} {where}? No, {because}.",
)
CARRIED = 0.4  # share of the facts with a carrier in an epoch
LONGEST_PLAIN = 120  # tokens of a piece of plain text
PLAIN_EPOCHS = 8  # passes over the facts in which the plain text is seen once
ANSWER_WEIGHT = 3  # of an answer's tokens in the loss; the others weigh 1
WARM_STEPS = 40


def main():
    options = arguments()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    facts = original_facts(options.data, options.n)
    plain = plain_text(options.plain_kib * 1024)
    if options.start is None:
        tokenizer = trained_tokenizer(facts, plain, options.vocabulary)
        model = new_model(options, len(tokenizer))
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.start)
        model = AutoModelForCausalLM.from_pretrained(options.start)
    n_facts = ", ".join(f"{len(facts[kind])} {kind}" for kind in KINDS)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{n_facts}; {sum(map(len, plain)) // 1024} KiB of plain text; "
        f"{n_parameters / 1e6:.2f}M parameters",
        flush=True,
    )
    figures = train(model, tokenizer, facts, plain, options)
    folder = Path(options.output)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"data": [Path(path).name for path in options.data], "n": options.n,
             "seed": options.seed, "start": options.start and Path(options.start).name,
             **figures}  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    print(json.dumps(about))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="+", help="files with edits; their old answers are learned")
    parser.add_argument("--n", type=int, default=120, help="edits of each file, from its beginning")
    parser.add_argument("--output", default="small_model")
    parser.add_argument("--start", help="goes on with the model in this folder, and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=12.0, help="ends then at the latest")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the facts at most")
    parser.add_argument(
        "--known", type=float, default=0.99, help="a new model ends where it knows so much"
    )
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--plain-kib", type=int, default=600, help="ordinary text, in KiB")
    parser.add_argument("--lr", type=float, default=2e-3)
    return parser.parse_args()


def original_facts(paths, n):
    """The facts before any edit, by kind: pairs of a prompt and its true answer, each once."""
    facts = {kind: {} for kind in KINDS}
    for path in paths:
        for request in read_requests(path, n):
            truth = request["ground_truth"]
            facts["prompts"].setdefault(request["prompt"], truth)
            if "rephrase_prompt" in request:
                facts["rephrase prompts"].setdefault(request["rephrase_prompt"], truth)
            for entry in request["locality"].values():
                for prompt, answer in zip(entry["prompt"], entry["ground_truth"], strict=True):
                    facts["locality prompts"].setdefault(prompt, answer)
    return {kind: [(p, str(a)) for p, a in pairs.items() if a] for kind, pairs in facts.items()}


def plain_text(n_characters):
    """About so many characters of plain text: two thirds docstrings, code, everyday sentences."""
    docstrings, code = stdlib_texts()
    everyday = [everyday_paragraph() for _ in range(n_characters // 800)]
    chosen = [
        *some_of(docstrings, 0.66 * n_characters),
        *some_of(code, 0.14 * n_characters),
        *some_of(everyday, 0.2 * n_characters),
    ]
    random.shuffle(chosen)
    return chosen


@functools.cache
def stdlib_texts():
    """Paragraphs of the docstrings of Python's standard library, and pieces of its code."""
    docstrings, code = [], []
    sources = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(sources.glob("*.py")) + sorted(sources.glob("*/[a-z]*.py")):
        if "site-packages" in path.parts or "test" in path.parent.name:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        code += [part for part in source.split("\n\n") if 80 < len(part) < 500 and "#" not in part]
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            for paragraph in (text or "").split("\n\n"):
                words = " ".join(paragraph.split())
                letters = sum(c.isalpha() or c == " " for c in words)
                if len(words) > 80 and letters > 0.9 * len(words):
                    docstrings.append(words)
    return docstrings, code


def some_of(texts, n_characters):
    """Distinct texts by chance, about so many characters together."""
    texts = list(dict.fromkeys(texts))
    random.shuffle(texts)
    ends = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(ends, n_characters)) + 1]


def everyday_paragraph():
    """A few sentences about nothing in particular."""
    return " ".join(everyday_sentence() for _ in range(random.randint(2, 5)))


def everyday_sentence():
    choices = {}
    for line in EVERYDAY.strip().split("\n"):
        name, listed = line.split(": ")
        choices.setdefault(name, []).extend(listed.split(", "))
    words = {name: random.choice(choices[name]) for name in choices}
    words |= {"n": random.randint(2, 60), "m": random.randint(2, 60)}
    sentence = random.choice(FRAMES).format(**words)
    return sentence[:1].upper() + sentence[1:]


def trained_tokenizer(facts, plain, n_tokens):
    """A byte-level BPE tokenizer of the texts, which puts a BOS before each."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    known = [
        prompt + with_leading_space(answer) for kind in KINDS for prompt, answer in facts[kind]
    ]
    backend.train_from_iterator([*known, *plain, *CARRIERS], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def new_model(options, n_tokens):
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=options.hidden,
        intermediate_size=8 * options.hidden // 3 // 16 * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def train(model, tokenizer, facts, plain, options):
    """Trains until the facts are known or the time is up; returns what the model knows then."""
    began = time.perf_counter()
    eos = tokenizer.eos_token_id
    *train_plain, held_out = np.array_split(
        [i for text in plain for i in [*tokenizer(text)["input_ids"], eos]], 20
    )
    pieces = [list(piece) for part in train_plain
              for piece in np.array_split(part, len(part) // LONGEST_PLAIN + 1)]  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, weight_decay=0.1, betas=(0.9, 0.98)
    )
    n_pieces = max(1, len(pieces) // PLAIN_EPOCHS)  # plain text of an epoch
    figures = {}
    step = 0
    for epoch in range(1, options.epochs + 1):
        random.shuffle(pieces)
        documents = fact_documents(tokenizer, facts) + [(p, len(p)) for p in pieces[:n_pieces]]
        random.shuffle(documents)
        losses = []
        for rows in batches(documents):
            passed = (time.perf_counter() - began) / (60 * options.minutes)
            done = min(1.0, max((epoch - 1) / options.epochs, passed))
            share = min(1.0, (step + 1) / WARM_STEPS) * (0.05 + 0.95 * math.cos(math.pi / 2 * done))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * share
            loss = loss_of(model, *rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            step += 1
        late = time.perf_counter() - began > 60 * options.minutes
        if epoch % 4 == 0 or epoch == 1 or late or epoch == options.epochs:
            figures = {
                "epochs": epoch,
                "seconds": round(time.perf_counter() - began, 1),
                "known": {kind: known(model, tokenizer, facts[kind]) for kind in KINDS},
                "perplexity of held-out plain text": perplexity(model, held_out),
            }
            print(f"loss {np.mean(losses):.3f} {json.dumps(figures)}", flush=True)
            enough = min(figures["known"].values()) >= options.known
            if late or (enough and options.start is None):
                break
    return figures


def fact_documents(tokenizer, facts):
    """Every fact once, some with a carrier before them: ids, and where the answer begins."""
    prompts, texts = [], []
    for kind in KINDS:
        for prompt, answer in facts[kind]:
            carrier = random.choice(CARRIERS) + " " if random.random() < CARRIED else ""
            prompts.append(carrier + prompt)
            texts.append(prompts[-1] + with_leading_space(answer))
    starts = map(len, tokenizer(prompts)["input_ids"])
    full = tokenizer(texts)["input_ids"]
    return [
        ([*ids, tokenizer.eos_token_id], start) for ids, start in zip(full, starts, strict=True)
    ]


def batches(documents, row=256, rows=2):
    """Yields ids, positions and weights, [rows, row]: documents one after the other in each row.

    transformers keeps documents apart where positions begin again at 0; so does the padding.
    """
    filled = [([], [], [])]
    for ids, start in documents:
        if len(filled[-1][0]) + len(ids) > row:
            if len(filled) == rows:
                yield padded(filled, row)
                filled = []
            filled.append(([], [], []))
        for column, values in zip(
            filled[-1],
            (
                ids,
                range(len(ids)),
                [i and (ANSWER_WEIGHT if i >= start else 1) for i in range(len(ids))],
            ),
            strict=True,
        ):
            column.extend(values)
    yield padded(filled, row)


def padded(filled, row):
    return tuple(
        torch.tensor([values + [0] * (row - len(values)) for values in column])
        for column in zip(*filled, strict=True)
    )


def loss_of(model, ids, positions, weights):
    """The weighted mean of the tokens' cross-entropy."""
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    weights = weights[:, 1:].flatten().float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def known(model, tokenizer, pairs, at_once=64):
    """The share of answers, with the EOS after them, that the model itself would give."""
    right = 0
    eos = tokenizer.eos_token_id
    for start in range(0, len(pairs), at_once):
        chunk = pairs[start : start + at_once]
        prompts = tokenizer([p for p, _ in chunk])["input_ids"]
        full = tokenizer([p + with_leading_space(a) for p, a in chunk])["input_ids"]
        full = [[*ids, eos] for ids in full]
        longest = max(map(len, full))
        padded = torch.tensor([ids + [eos] * (longest - len(ids)) for ids in full])
        best = model(input_ids=padded).logits.argmax(-1)
        for prompt, ids, answer in zip(prompts, full, best.tolist(), strict=True):
            right += answer[len(prompt) - 1 : len(ids) - 1] == ids[len(prompt) :]
    return round(right / max(1, len(pairs)), 4)


@torch.no_grad()
def perplexity(model, ids, row=256):
    rows = torch.tensor(ids[: len(ids) // row * row]).view(-1, row)[:16]
    positions = torch.arange(row).expand_as(rows)
    weights = torch.ones_like(rows)
    return round(math.exp(loss_of(model, rows, positions, weights)), 2) if len(rows) else None


if __name__ == "__main__":
    sys.exit(main())
