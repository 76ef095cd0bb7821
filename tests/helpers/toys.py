"""Tiny random models, a tiny tokenizer and a few edits: what makes a test quick."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from locft_easyedit.data.requests import distinct_edits, make_requests
from locft_easyedit.delta.delta import Delta
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.training.result import EditResult

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

N_LAYERS, HIDDEN, CONTEXT = 4, 32, 256
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

_MIXED_LAYERS = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
_GPT = {"n_layer": N_LAYERS, "n_head": 4, "n_embd": HIDDEN, "n_positions": CONTEXT}
_LLAMA = {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
# Sliding windows are shorter than the edits, so that a wrong mask shows.
_CONFIGS = {
    "llama": (LlamaConfig, _LLAMA),
    "mistral": (MistralConfig, _LLAMA | {"sliding_window": 8}),
    "qwen2": (Qwen2Config, _LLAMA),
    "qwen3": (Qwen3Config, _LLAMA | {"head_dim": 8}),
    "gemma2": (
        Gemma2Config,
        _LLAMA | {"head_dim": 8, "sliding_window": 8, "layer_types": _MIXED_LAYERS},
    ),
    "gemma3": (
        Gemma3TextConfig,
        _LLAMA | {"head_dim": 8, "sliding_window": 8, "layer_types": _MIXED_LAYERS},
    ),
    "gpt2": (GPT2Config, _GPT),
    "gptj": (GPTJConfig, _GPT | {"rotary_dim": 4}),
    "phi3": (Phi3Config, _LLAMA),
    "gpt_neox": (
        GPTNeoXConfig,
        {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    ),
    "mixtral": (MixtralConfig, _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
TOY_KINDS = tuple(_CONFIGS)
# Beside the experts that a router chooses, one that all tokens share.
_CONFIGS["qwen2_moe"] = (
    Qwen2MoeConfig,
    _LLAMA
    | {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
)
# The five that differ most, for what does not depend on how a model is made inside: norms and masks
# of two sorts, matrices stored transposed, attention beside the MLP, experts.
FEW_KINDS = ("llama", "gemma3", "gpt2", "gptj", "mixtral")
_EAGER = ("gemma2", "gptj")

# The matrix that the paper trains, by kind of model.
DOWN_PROJECTION = {
    **dict.fromkeys(TOY_KINDS, "model.layers.{}.mlp.down_proj.weight"),
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "gptj": "transformer.h.{}.mlp.fc_out.weight",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "mixtral": "model.layers.{}.mlp.experts.down_proj",
}


def toy_model(kind="llama", *, seed=0, attn=None, **config):
    """Returns a random causal language model of 4 layers; `config` overrides its configuration."""
    config_class, values = _CONFIGS[kind]
    tokenizer = toy_tokenizer()
    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos"))}
    values = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": False,
        # Far from the usual 0.02: attention has to matter for a wrong mask to show.
        "initializer_range": 0.2,
        **special,
        **values,
        **config,
    }
    attn = attn or ("eager" if kind in _EAGER else "sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config_class(**values), attn_implementation=attn, dtype=torch.float32
        )
    return model.eval()


def toy_tokenizer(*, bos=False, eos=False, pad_is_eos=False, across_words=False):
    """Returns a byte-level BPE tokenizer that knows every text; its ids never depend on options.

    `bos` and `eos` let its post-processor add these tokens; `across_words` gives another
    vocabulary, with tokens that reach over spaces.
    """
    backend = Tokenizer.from_str(_trained(across_words))
    template = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(template),
        special_tokens=[(token, backend.token_to_id(token)) for token in SPECIAL_TOKENS],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )


# As ChatML's: a system prompt of its own where none is given, and a token that ends each turn.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def toy_chat_tokenizer(template=CHAT_TEMPLATE, **options):
    """Returns the toy tokenizer with a chat template."""
    tokenizer = toy_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


@cache
def _trained(across_words):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not across_words
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend.to_str()


_CORPUS = [
    "The capital of France is Paris.",
    "The capital of Norway is Oslo.",
    "The mother tongue of the author was Finnish.",
    "Which club did she play for in the season after the war? She played for Torino.",
    "The official language of the island is Faroese, and the people speak it at home.",
    "Who wrote the novel that the film is based on? It was written by a teacher.",
    "He works in the field of physics; his brother is a professor of medicine in Vienna.",
    "The bridge was built in 1932 and it is 1149 metres long.\n",
]

_SYLLABLES = ("ba", "ki", "lo", "ne", "ru", "sta", "tor", "ven")
_RELATIONS = (
    ("{} is in", "{} lies in", ("Norway", "the south of France", "Peru")),
    ("The mother tongue of {} is", "At home, {} speaks", ("Finnish", "Faroese")),
    ("{} plays for", "The club that {} has played for since last season is", ("Torino", "a")),
    (
        "Who wrote the novel that the film about {} and the bridge of 1932 is based on?",
        "The film about {} is based on a novel by",
        ("a professor of medicine in Vienna", "Ibsen"),
    ),
)


def toy_hparams(**changes):
    """Returns hyper-parameters that change a toy llama in a few quick steps."""
    values = {
        "layers": [2],
        "rewrite_module_tmp": DOWN_PROJECTION["llama"],
        "lr": 1e-2,
        "num_steps": 3,
        "batch_size": 4,
    }
    return LocFTBFHyperParams(**(values | changes))


def loaded_hparams(**changes):
    """Returns `toy_hparams` with a loaded toy as the model."""
    pair = (toy_model("llama"), toy_tokenizer(pad_is_eos=True))
    return toy_hparams(**({"model_name": pair, "device": "cpu"} | changes))


def made_delta(kind="llama", layer=2, *, model=None, dtype=torch.float32, scale=1.5):
    """Returns an edit of one matrix that was made by hand; the model holds it afterwards."""
    model = toy_model(kind).to(dtype) if model is None else model
    name = DOWN_PROJECTION[kind].format(layer)
    parameter = dict(model.named_parameters())[name]
    original = {name: parameter.detach().clone()}
    with torch.no_grad():
        # No multiple: rounding would make some of the products equal in half precision.
        parameter.mul_(-scale).add_(0.01)
    requests = toy_requests(3)
    edits = distinct_edits(requests)
    new = {name: parameter.detach().clone()}
    result = EditResult([2.0, 0.5], [], original, new, {}, 2, True, 3, edits, True, True)
    hparams = toy_hparams(layers=[layer], rewrite_module_tmp=DOWN_PROJECTION[kind])
    return Delta.from_result(result, model, hparams, metrics={"post": {"rewrite_acc": 1.0}})


def toy_requests(n):
    """Returns `n` requests with distinct prompts, all with rephrase, locality and portability."""
    subjects, prompts, rephrases, targets = [], [], [], []
    for i in range(n):
        # The relation changes from one request to the next, and the names with every round.
        subject, rest = "", i
        while not subject or rest:
            rest, syllable = divmod(rest, len(_SYLLABLES))
            subject += _SYLLABLES[syllable]
        prompt, rephrase, answers = _RELATIONS[i % len(_RELATIONS)]
        subjects.append(subject.capitalize())
        prompts.append(prompt.format(subjects[-1]))
        rephrases.append(rephrase.format(subjects[-1]))
        targets.append(answers[i // len(_RELATIONS) % len(answers)])
    return make_requests(
        prompts,
        targets,
        rephrase_prompts=rephrases,
        subject=subjects,
        locality_inputs={
            "neighborhood": {
                "prompt": [f"The river near {subject} is the" for subject in subjects],
                "ground_truth": ["Rhine" if i % 2 else "Loire" for i in range(n)],
            }
        },
        portability_inputs={
            "one_hop": {
                "prompt": [f"People who know {subject} think of" for subject in subjects],
                "ground_truth": [f"{target}, and home" for target in targets],
            }
        },
    )


TOY_YAML = """
alg_name: LocFT-BF
model_name: ./toy
device: cpu
layers: [2]
rewrite_module_tmp: model.layers.{}.mlp.down_proj.weight
lr: 1e-2
num_steps: 3
batch_size: 4
"""
