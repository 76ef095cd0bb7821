"""Generated answers: greedy, cut at the first stop, and the model left as it was."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.toys import CONTEXT, FEW_KINDS, toy_model, toy_requests, toy_tokenizer
from torch import nn
from transformers import GenerationConfig

from locft_easyedit.evaluation.decoding import can_batch_cache
from locft_easyedit.evaluation.fluency import batched_fluency, fluency_of
from locft_easyedit.evaluation.generated import Generated, finish_generated_
from locft_easyedit.evaluation.greedy_decoder import GreedyDecoder
from locft_easyedit.evaluation.predictions import EvalConfig

PROMPTS = [request["prompt"] for request in toy_requests(12)]


def scripted(*scripts, tokenizer, **config):
    """Returns a model that goes on as the scripts (lists of ids) do, whatever came before.

    Its layers add nothing, and its output looks up what follows the last token.
    """
    model = toy_model("llama", **config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = model.get_input_embeddings().weight
        table = torch.zeros_like(model.lm_head.weight)
        for script in scripts:
            assert len(set(script[:-1])) == len(script) - 1
            for token, following in pairwise(script):
                table[following] += nn.functional.normalize(embeddings[token], dim=0)
        model.lm_head.weight.copy_(table)
    return model


class Calls:
    """Counts forward passes, but for those that measure whether texts may share a cache."""

    def __init__(self, model):
        assert can_batch_cache(model, [1, 2, 3])
        self.n = 0
        model.register_forward_hook(self.count)

    def count(self, *_):
        self.n += 1


@torch.no_grad()
def naive_greedy(model, tokenizer, prompt, max_new_tokens):
    """One prompt, one token at a time, without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    n_prompt = len(ids)
    while len(ids) < n_prompt + max_new_tokens:
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    text = tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)
    return text.split(".")[0].split("\n")[0].strip()


def generate_answers(
    model, tokenizer, prompts, *, batch_size=64, max_new_tokens=32, packed=None, draft="no such one"
):
    """The answers to prompts of which another answer is expected."""
    how, drafts = EvalConfig(batch_size, packed=packed), [draft] * len(prompts)
    decoder = GreedyDecoder(model, tokenizer, prompts, drafts, how, max_new_tokens=max_new_tokens)
    return decoder.answers("")


# Answers


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_answers_are_the_naive_ones_for_every_batch_size(kind):
    model, tokenizer = toy_model(kind), toy_tokenizer(bos=True)
    expected = [naive_greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(expected)) > 6
    for batch_size in (1, 3, 7):
        answers = generate_answers(
            model, tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=8
        )
        assert answers == expected


@pytest.mark.parametrize("options", [{"pad_is_eos": True}, {"padding_side": "right"}], ids=str)
def test_pad_token_and_side_change_nothing(options):
    model, tokenizer = toy_model(), toy_tokenizer()
    expected = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    other = toy_tokenizer(pad_is_eos="pad_is_eos" in options)
    other.padding_side = options.get("padding_side", "left")
    assert generate_answers(model, other, PROMPTS, max_new_tokens=8) == expected


def test_no_prompts():
    assert generate_answers(toy_model(), toy_tokenizer(), []) == []


@pytest.mark.parametrize(
    ("continuation", "answer", "n_tokens"),
    [
        (" Oslo. The capital", "Oslo", 3),
        (" Oslo\nThe capital", "Oslo", 3),
        (" Oslo</s> The capital", "Oslo", 3),
        (" the capital of Oslo</s>", "the capital of Oslo", 6),
        (". The capital", "", 1),
        ("</s> The capital", "", 1),
        (" the capital of Oslo and Vienna", "the capital of Oslo", 5),  # the limit
    ],
)
def test_answer_ends_at_the_first_stop(continuation, answer, n_tokens):
    tokenizer = toy_tokenizer()
    script = tokenizer("It is" + continuation)["input_ids"]
    model = scripted(script, tokenizer=tokenizer)
    calls = Calls(model)
    limit = 5 if "Vienna" in continuation else 20
    # After each token of this draft the script has a token: none is close to another.
    options = {"max_new_tokens": limit, "packed": True, "draft": "is"}
    assert generate_answers(model, tokenizer, ["It is"], **options) == [answer]
    assert calls.n == n_tokens  # nothing is generated beyond the stop


def test_stop_within_a_token():
    tokenizer = toy_tokenizer(across_words=True)
    script = tokenizer("B Oslo.")["input_ids"]
    assert tokenizer.decode(script[-1:]) == "lo."
    model = scripted([*script, *tokenizer("C")["input_ids"]], tokenizer=tokenizer)
    calls = Calls(model)
    prompt = tokenizer.decode(script[:-3])
    assert generate_answers(model, tokenizer, [prompt], packed=True, draft="is") == ["Oslo"]
    assert calls.n == 3


def test_sequences_of_a_batch_stop_apart():
    tokenizer = toy_tokenizer()
    texts = ["A Oslo.", "B the capital of France\n", "C Peru</s>"]
    model = scripted(*(tokenizer(text)["input_ids"] for text in texts), tokenizer=tokenizer)
    answers = generate_answers(model, tokenizer, ["C", "A", "The B"], batch_size=3)
    assert answers == ["Peru", "Oslo", "the capital of France"]


def test_end_tokens_of_the_model_count_too():
    tokenizer = toy_tokenizer()
    script = tokenizer("It is Oslo! Vienna")["input_ids"]
    model = scripted(script, tokenizer=tokenizer)
    mark = tokenizer("!")["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *mark]
    assert generate_answers(model, tokenizer, ["It is"]) == ["Oslo"]


def test_vocabulary_larger_than_the_tokenizers():
    tokenizer = toy_tokenizer()
    script = [*tokenizer("It is Oslo")["input_ids"], 500, *tokenizer(".")["input_ids"]]
    model = scripted(script, tokenizer=tokenizer, vocab_size=512)
    assert generate_answers(model, tokenizer, ["It is"]) == ["Oslo"]


# The model's own settings

OWN_SETTINGS = [
    {"do_sample": True, "temperature": 5.0},
    {"repetition_penalty": 5.0},
    {"num_beams": 4},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 15},
    {"max_length": 3},
    {"max_new_tokens": 1},
    {"suppress_tokens": list(range(200))},
]


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=lambda own: next(iter(own)))
def test_own_generation_settings_are_ignored_and_restored(own):
    model, tokenizer = toy_model(), toy_tokenizer()
    expected = generate_answers(model, tokenizer, PROMPTS[:5], max_new_tokens=8)
    settings = GenerationConfig(eos_token_id=2, pad_token_id=0, **own)
    before = settings.to_dict()
    model.generation_config = settings
    for _ in range(2):  # sampling would differ from run to run
        assert generate_answers(model, tokenizer, PROMPTS[:5], max_new_tokens=8) == expected
    assert model.generation_config is settings
    assert settings.to_dict() == before


def test_state_is_restored_after_a_failure():
    model, tokenizer = toy_model().train(), toy_tokenizer()
    own = model.generation_config

    def fail(*_):
        raise RuntimeError("on purpose")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        generate_answers(model, tokenizer, ["It is"])
    assert model.generation_config is own
    assert model.training


@pytest.mark.parametrize("mode", ["training", "evaluation", "mixed"])
def test_training_mode_is_off_during_and_restored_after(mode):
    model, tokenizer = toy_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), toy_tokenizer()
    expected = generate_answers(model, tokenizer, PROMPTS[:4], max_new_tokens=8)
    model.train(mode != "evaluation")
    if mode == "mixed":
        model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    assert generate_answers(model, tokenizer, PROMPTS[:4], max_new_tokens=8) == expected
    assert [module.training for module in model.modules()] == before


def test_random_state_is_left_alone():
    state = torch.get_rng_state()
    generate_answers(toy_model(), toy_tokenizer(), PROMPTS[:2], max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)


# Drafts: answers that are expected


class ManyDrafts:
    """For each prompt a draft that is right, one that goes wrong somewhere, and nonsense."""

    def __init__(self, model, tokenizer, n_tokens):
        right = [naive_greedy(model, tokenizer, prompt, n_tokens) for prompt in PROMPTS]
        self.expected = right
        cut = [" ".join(answer.split()[:1]) + " and so on" for answer in right]
        self.kinds = {"right": right, "half": cut, "wrong": ["no such thing"] * len(PROMPTS)}


@pytest.mark.parametrize("draft", ["right", "half", "wrong"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_drafts_change_nothing(kind, draft):
    model, tokenizer = toy_model(kind), toy_tokenizer()
    drafts = ManyDrafts(model, tokenizer, 8)
    for batch_size in (1, 5):
        how = EvalConfig(batch_size)
        decoder = GreedyDecoder(
            model, tokenizer, PROMPTS, drafts.kinds[draft], how, max_new_tokens=8
        )
        assert decoder.answers("") == drafts.expected
        some = decoder.answers("", np.array([3, 1]))
        assert [some[3], some[1]] == [drafts.expected[3], drafts.expected[1]]
        assert some[0] == ""


def test_a_right_draft_takes_one_forward_pass():
    tokenizer = toy_tokenizer()
    script = tokenizer("It is the capital of Oslo</s>")["input_ids"]
    model = scripted(script, tokenizer=tokenizer)
    decoder = GreedyDecoder(
        model,
        tokenizer,
        ["It is"],
        ["the capital of Oslo"],
        EvalConfig(packed=True),
        max_new_tokens=32,
    )
    calls = Calls(model)
    assert decoder.answers("") == ["the capital of Oslo"]
    assert calls.n == 1


def always(best, model):
    return torch.ones_like(best[:, 0], dtype=torch.bool)


def test_close_choices_are_settled_by_the_prompt_alone(monkeypatch):
    """With everything counted as close, all answers come from passes over one prompt."""
    model, tokenizer = toy_model(), toy_tokenizer()
    drafts = ManyDrafts(model, tokenizer, 6)
    for module in ("greedy_decoder", "predictions"):
        monkeypatch.setattr(f"locft_easyedit.evaluation.{module}.too_close", always)
    alone = []
    original = GreedyDecoder._alone
    monkeypatch.setattr(
        GreedyDecoder, "_alone", lambda self, ids: alone.append(1) or original(self, ids)
    )
    decoder = GreedyDecoder(
        model, tokenizer, PROMPTS, drafts.kinds["half"], EvalConfig(), max_new_tokens=6
    )
    assert decoder.answers("") == drafts.expected
    assert len(alone) > len(PROMPTS)


@pytest.mark.parametrize("factor", [1.0, 20.0])
def test_half_precision_does_not_depend_on_the_batch(factor):
    """Large logits are far apart in bfloat16: rounding decides between more of them."""
    model, tokenizer = toy_model(), toy_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    model.to(torch.bfloat16)
    prompts = [request["prompt"] for request in toy_requests(40)]
    one, many = (
        generate_answers(model, tokenizer, prompts, batch_size=size, max_new_tokens=8)
        for size in (1, 40)
    )
    assert one == many


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_the_cache_goes_by_the_name_that_the_model_knows(kind, recwarn, caplog):
    """After the prompt each token is read once, and transformers has nothing to object to."""
    model, widths = toy_model(kind), []
    assert can_batch_cache(model, [1, 2, 3])
    model.register_forward_pre_hook(
        lambda _, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    tokenizer = toy_tokenizer()
    generate_answers(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert widths.count(1) >= 3
    widths.clear()
    fluency_of(model, tokenizer, toy_requests(1), words=str.split)
    assert set(widths[1:]) == {1}
    assert "deprecated" not in caplog.text
    assert not any("deprecated" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("broken", ["padding", "reorder"])
def test_a_cache_that_texts_cannot_share_is_not_used(broken, caplog, monkeypatch):
    """Some kinds attend to what fills the left side, some cannot let a text leave the batch."""
    model, tokenizer = toy_model(), toy_tokenizer()
    expected = [naive_greedy(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    if broken == "padding":

        def blind(_, args, given):
            return args, given | ({"attention_mask": None} if given.get("use_cache") else {})

        model.register_forward_pre_hook(blind, with_kwargs=True)
    else:

        def refuse(self, order):
            raise AttributeError("this kind has no keys")

        monkeypatch.setattr("transformers.cache_utils.Cache.reorder_cache", refuse)
    for _ in range(2):
        assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert caplog.text.count("answers are generated without a cache") == 1
    for size in (1, 5):
        draws = batched_fluency(model, tokenizer, toy_requests(3), words=str.split, batch_size=size)
        assert draws == batched_fluency(model, tokenizer, toy_requests(3), words=str.split)


class Wrapper(nn.Module):
    """Hands on whatever it is given, as some editing methods do around the model they edit."""

    def __init__(self, model):
        super().__init__()
        self.model, self.dtype, self.config = model, model.dtype, model.config
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, **inputs):
        return self.model(**inputs)


def test_models_within_others():
    from peft import LoraConfig, get_peft_model

    model, tokenizer = toy_model(), toy_tokenizer()
    expected = [naive_greedy(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"])).eval()
    for outer in (Wrapper(model), adapted):
        assert generate_answers(outer, tokenizer, PROMPTS, max_new_tokens=6) == expected


def test_models_without_an_ordinary_cache():
    """Linear attention keeps states of another kind; mamba keeps those alone."""
    from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

    tokenizer = toy_tokenizer()
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    special = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    hybrid = Lfm2Config(
        **size,
        **special,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.3,
    )
    mamba = MambaConfig(**size, **special, state_size=4, initializer_range=0.5)
    for model in (Lfm2ForCausalLM(hybrid).eval(), MambaForCausalLM(mamba).eval()):
        expected = [naive_greedy(model, tokenizer, prompt, 6) for prompt in PROMPTS]
        assert len(set(expected)) > 3
        answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6)
        assert answers == expected
        draws = []
        for read in (model, Wrapper(model)):  # the second is always read from the beginning
            torch.manual_seed(1)
            draws.append(fluency_of(read, tokenizer, toy_requests(1), words=str.split))
        assert draws[0] == draws[1]


# Metrics


def test_generated_metrics():
    tokenizer = toy_tokenizer()
    texts = ["A Oslo.", "B the capital of France\n", "C Peru</s>"]
    model = scripted(*(tokenizer(text)["input_ids"] for text in texts), tokenizer=tokenizer)
    records = [
        {"prompt": "A", "target_new": " oslo", "rephrase_prompt": ["The A", "B", "C"]},
        {"prompt": "B", "target_new": "France"},
        {"prompt": "C", "target_new": "Peru", "rephrase_prompt": "Is C"},
        {"prompt": "A", "target_new": "Peru", "rephrase_prompt": None, "ground_truth": "Oslo"},
        {
            "prompt": "B",
            "target_new": "Lyon",
            "target_aliases": ["Lyon", "a Capital, of France"],
            "ground_truth": "Paris",
            "rephrase_prompt": "A",
        },
    ]
    assert Generated(model, tokenizer, records, EvalConfig(2)).measure("") == [
        {
            "reliability": 1.0,
            "answer": "Oslo",
            "contains_target": 1.0,
            "generalization": pytest.approx(1 / 3),
            "rephrase_answers": ["Oslo", "the capital of France", "Peru"],
        },
        {"reliability": 0.0, "answer": "the capital of France", "contains_target": 1.0},
        {
            "reliability": 1.0,
            "answer": "Peru",
            "contains_target": 1.0,
            "generalization": 1.0,
            "rephrase_answers": ["Peru"],
        },
        {"reliability": 0.0, "answer": "Oslo", "contains_target": 0.0, "old_answer": 1.0},
        {
            "reliability": 1.0,
            "answer": "the capital of France",
            "contains_target": 1.0,
            "old_answer": 0.0,
            "generalization": 0.0,
            "rephrase_answers": ["Oslo"],
        },
    ]


def test_a_target_with_stops_of_its_own_can_be_right():
    """Its answer goes on for as many stops, and no further; the paper's figure stands beside it."""
    tokenizer = toy_tokenizer()
    texts = ["A Oslo.Peru\n", "B the capital of France</s>"]
    model = scripted(*(tokenizer(text)["input_ids"] for text in texts), tokenizer=tokenizer)
    records = [
        {"prompt": "A", "target_new": "Oslo.Peru", "rephrase_prompt": ["The A", "B"]},
        {"prompt": "B", "target_new": "Mr. X", "target_aliases": ["the capital of France"]},
        {"prompt": "A", "target_new": "Oslo"},
        {"prompt": "A", "target_new": "Mr. X", "target_aliases": ["Oslo"]},
    ]
    for before in (None, [{} for _ in records]):
        first, second, third, fourth = Generated(
            model, tokenizer, records, EvalConfig(2), before=before
        ).measure("")
        assert (first["reliability"], first["reliability_at_first_stop"]) == (1.0, 0.0)
        assert (first["generalization"], first["generalization_at_first_stop"]) == (0.5, 0.0)
        for plain in (second, third, fourth):  # an alias is not held to the other's stops
            assert plain["reliability"] == plain["reliability_at_first_stop"] == 1.0
        if before is None:
            assert first["answer"] == "Oslo.Peru"
            assert first["rephrase_answers"] == ["Oslo.Peru", "the capital of France"]
            assert second["answer"] == "the capital of France"
            assert third["answer"] == fourth["answer"] == "Oslo"
    (plain,) = Generated(model, tokenizer, records[2:3], EvalConfig()).measure("")
    assert "reliability_at_first_stop" not in plain


def test_portability_and_locality():
    tokenizer = toy_tokenizer()
    texts = ["A Oslo.", "B the capital of France\n", "C Peru</s>"]
    model = scripted(*(tokenizer(text)["input_ids"] for text in texts), tokenizer=tokenizer)
    record = {
        "prompt": "A",
        "target_new": "Oslo",
        "portability": {
            "one": {"prompt": ["B", "C"], "ground_truth": ["France", "Chile"]},
            "two": {
                "prompt": ["C"],
                "ground_truth": ["Chile"],
                "aliases": [["Chile", "peru"]],
            },
        },
        "locality": {"near": {"prompt": ["C", "A"], "ground_truth": ["x", "y"]}},
    }
    (pre,) = Generated(model, tokenizer, [record], EvalConfig()).measure("")
    assert pre["portability"] == pytest.approx(1 / 3)
    assert pre["portability_answers"] == {"one": ["the capital of France", "Peru"], "two": ["Peru"]}
    assert pre["locality_answers"] == {"near": ["Peru", "Oslo"]}
    post = {"locality_answers": {"near": ["The Peru!", "Lima"]}}
    finish_generated_(pre, post)
    assert post["locality"] == 0.5


def test_answers_near_the_end_of_the_context():
    model, tokenizer = toy_model("gpt2"), toy_tokenizer()
    prompt = "a" * (CONTEXT - 8)
    assert len(tokenizer(prompt)["input_ids"]) <= CONTEXT - 8
    (answer,) = generate_answers(model, tokenizer, [prompt], max_new_tokens=8)
    assert answer == naive_greedy(model, tokenizer, prompt, 8)
