"""A tiny random model of any causal model type of transformers, from its own configuration class.

Nearly all types are made small by one table of sizes, under the names that configurations have for
them; what a type needs besides stands in `OWN`.
"""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

WORDS, N_LAYERS = 400, 4
MOST_PARAMETERS = 30_000_000

# Whatever of it a configuration has becomes so small.
SMALL = {
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), N_LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), N_LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"),
        64,
    ),
    **dict.fromkeys(("encoder_ffn_dim", "d_inner", "shared_intermediate_size"), 64),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "lru_width", "time_step_rank"),
        32,
    ),
    **dict.fromkeys(("expert_ffn_hidden_size", "router_hidden_size", "ple_embed_dim"), 32),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4
    ),
    **dict.fromkeys(("hidden_size_global", "adapter_input_size"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim"), 32),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("d_head", "linear_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("moe_topk", "zero_expert_num"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_expand", "n_shared_experts"), 2),
    **dict.fromkeys(("linear_num_heads", "mamba_n_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads", "n_groups", "mamba_n_groups"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 8),
    **dict.fromkeys(("attention_window_size", "mamba_chunk_size", "index_topk"), 8),
    "mamba_d_head": 16,  # mamba_n_heads of it are mamba_expand times the hidden size
    "mamba_d_ssm": 64,
    "index_n_heads": 16,  # with few, scores are 0 for several keys, and chance chooses among them
    "vocab_size": WORDS,
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# Attention with a latent of low rank has as many heads of keys as of queries, and the part of a
# head that is rotated is what positions see.
LATENT = {"num_key_value_heads": SMALL["num_attention_heads"], "head_dim": 8}

# What the last layers of a type with one list for it are, each in the name of the list.
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")

# Values that a type needs and no rule gives; `None` leaves the type's own.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OWN: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": WORDS},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_top_k": 2},
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 2},
    "dots3_note_text": {"head_dim": 16},  # of what is rotated and what is not
    **{key: {"num_kv_shared_layers": 1} for key in ("gemma3n_text", "gemma4_text")},
    "gpt_neo": {"attention_types": [[["global", "local"], N_LAYERS // 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_hidden_layers": None},  # counts attentions, of which a layer has two
    "mamba2": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "output_gate_type": "sigmoid",
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True},
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
# Types that take more than tokens, so that none can be built and run as a language model alone.
NO_LANGUAGE_MODEL = {
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "drafts from another model's states"
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "predicts codes of sound, not text"),
    "gemma3n": "its image tower needs the package timm (gemma3n_text is its language model)",
}

# Sizes that must fit each other in ways that differ: left out where a model cannot run with them.
FITTING = ("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim")
ATTEMPTS = ((), ("head_dim",), FITTING, (*FITTING, "hidden_size", "num_attention_heads"))


def small_config(model_type, left_out=(), **values):
    """Returns the configuration of a type with every size that it knows made small.

    Args:
        model_type: As in `config.json`.
        left_out: Sizes that stay as they are.
        **values: Go before all others.
    """
    return _small(CONFIG_MAPPING[model_type], left_out, values)


def _small(config_class, left_out, own):
    default = config_class()
    sizes = SMALL | LATENT if _has(default, "kv_lora_rank") else SMALL
    values = {key: sizes[key] for key in sizes if key not in left_out and _has(default, key)}
    if default.to_dict().get("per_layer_config"):
        values["per_layer_config"] = {}
    for key in dict.fromkeys(config_class.attribute_map.get(key, key) for key in KINDS):
        kinds = getattr(default, key, None) if _can_set(config_class, key) else None
        if isinstance(kinds, (list, tuple)) and kinds:
            distinct = list(dict.fromkeys(kinds))
            # The last layers alike those of the whole model, and each kind among them.
            values[key] = [*(distinct * N_LAYERS)[: N_LAYERS - 1], kinds[-1]]
    for key in getattr(config_class, "sub_configs", {}):
        sub = getattr(default, key, None)
        if isinstance(sub, PreTrainedConfig):
            values[key] = _small(type(sub), left_out, {}).to_dict()
    values |= OWN.get(config_class.model_type, {}) | own
    values = {key: value for key, value in values.items() if value is not None}
    while True:
        try:
            return config_class(**values)
        except (TypeError, AttributeError, NotImplementedError, ValueError) as error:
            # A name that is an alias, or is made of others.
            wrong = [key for key in values if f"'{key}'" in str(error) or f"`{key}`" in str(error)]
            if not wrong:
                raise
            del values[wrong[0]]


def _has(config, key):
    try:
        return hasattr(config, key)
    except RuntimeError:  # differs from layer to layer
        return True


def _can_set(config_class, key):
    attribute = getattr(config_class, key, None)
    return not isinstance(attribute, property) or attribute.fset is not None


def tiny_model(model_type, **values):
    """Returns a random model of a type, in float32, which runs.

    Args:
        model_type: As in `config.json`.
        **values: As for `small_config`.

    Raises:
        Exception: Whatever the type's own code raises, for the first of the sizes tried.
    """
    failure = None
    for left_out in ATTEMPTS:
        try:
            return _built(small_config(model_type, left_out, **values))
        except Exception as error:
            failure = failure or error
    raise failure


def _built(config):
    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n > MOST_PARAMETERS:
        raise ValueError(f"{n:,} parameters in its smallest form here")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 12)[None], use_cache=False)
    return model
