"""Models of random weights and edits of random words in ZsRE's lengths; nothing is downloaded."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

HEAD_SCALE = 10.0  # see `random_model`


def random_model(words, hidden, inner, layers):
    """A llama of random weights in float32; `hidden` is its width, in 64s."""
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        # As far between the two best logits as in a trained model: near ties are run again.
        model.lm_head.weight *= HEAD_SCALE
    return model


def word_tokenizer(n_words):
    """A tokenizer with a token a word: w3, w4. and so on. The even ones end an answer.

    Random models do not come to an end by themselves.
    """
    special = ("<pad>", "<s>", "</s>")
    vocabulary = {word: i for i, word in enumerate(special)}
    vocabulary |= {f"w{i}" + "." * (i % 2 == 0): i for i in range(len(special), n_words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def random_requests(n, n_words):
    """Requests in ZsRE's lengths, one in a hundred a repetition of an earlier one."""
    random = np.random.default_rng(0)

    def words(count):
        return " ".join(f"w{2 * i + 1}" for i in random.integers(1, n_words // 2, count))

    def length():  # 11.3 tokens on average, 4 to 30
        return int(np.clip(random.normal(11.3, 3.2), 4, 30))

    requests = []
    for i in range(n):
        if i % 100 == 99:
            requests.append(dict(requests[int(random.integers(i))]))
            continue
        requests.append({
            "prompt": words(length()),
            "target_new": words(1 + random.poisson(2.3)),
            "ground_truth": words(1 + random.poisson(1.0)),
            "subject": words(2),
            "rephrase_prompt": words(length()),
            "locality": {"neighborhood": {"prompt": [words(length())],
                                          "ground_truth": [words(1 + random.poisson(1.0))]}},
            "portability": {},
        })  # fmt: skip
    return requests
