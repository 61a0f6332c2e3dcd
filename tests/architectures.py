"""Tiny random models of every kind that transformers calls a causal language model, built from its own defaults.

`build` makes all sizes small wherever a configuration names them. Windows are shorter than the rows that are tried, so
that what lies outside of one shows.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, END = 264, 256

SMALL = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input n_tokens n_words",
    32: "hidden_size d_model n_embd dim emb_dim word_embed_proj_dim embedding_size d_embed hidden_size_per_layer_input",
    48: "intermediate_size d_inner ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner moe_intermediate_size "
    "shared_expert_intermediate_size dim_feedforward dim_ff d_ff intermediate_size_mlp feed_forward_size "
    "ffn_hidden_size moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size",
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads n_kv_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts rotary_dim",
    8: "head_dim kv_channels dim_head qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim",
    16: "q_lora_rank kv_lora_rank",
    6: "sliding_window sliding_window_size attention_window_size window_size",
    1: "n_group topk_group",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions "
    "max_source_positions",
    0.3: "initializer_range init_std",
}
SIZES = {name: value for value, names in SMALL.items() for name in names.split()}


def small(kind, over=None):
    """The default configuration of this class with everything small that it names; `over` has the last word."""
    default = kind().to_dict()
    given = {k: v for k, v in SIZES.items() if default.get(k) is not None and not isinstance(default[k], (dict, list))}
    ids = {"pad_token_id": 0, "eos_token_id": END, "bos_token_id": 1}
    given |= {k: v for k, v in ids.items() if default.get(k) is not None}
    kinds = default.get("layer_types")
    if isinstance(kinds, list) and kinds:
        distinct = list(dict.fromkeys(kinds))
        given["layer_types"] = (distinct * 2)[: max(2, len(distinct))]
        count = next(n for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if n in default)
        given[count] = len(given["layer_types"])
    if "kv_lora_rank" in default:  # keys and values of all heads come out of one narrow product
        given |= {"num_key_value_heads": 4} | ({"qk_head_dim": 16} if "qk_head_dim" in default else {})
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if isinstance(part, type) and issubclass(part, PretrainedConfig) and part is not AutoConfig:
            given[name] = small(part).to_dict()
    return kind(**given | (over or {}))


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HEADS = {"head_dim": 8, "num_key_value_heads": 2}
OVER = {
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "ministral": HEADS,
    "nemotron": HEADS,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "num_buckets": 4},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "kimi_linear": {"num_experts": 4, "num_experts_per_token": 2},
    "rembert": {"is_decoder": True, "output_embedding_size": 32},
    "qwen4_exp_text": {
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 2},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"]},
    "cwm": {"bos_token_id": 1},
}
OVER |= {name: {"is_decoder": True} for name in ("bert", "roberta", "electra", "camembert", "megatron-bert")}


# Not built: they are made of several models, cannot be made small, want a library that is not here, or transformers
# cannot make them of their own defaults.
UNBUILT = {
    *("blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "fuyu", "gemma3", "gemma3n"),
    *("gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "got_ocr2", "moshi", "moss_transcribe_diarize"),
    *("musicgen", "musicgen_melody", "phi4_multimodal", "qwen4_exp"),
}


def build(name, seed=0):
    """A model of this type (a name in transformers' causal language models) in evaluation mode."""
    torch.manual_seed(seed)
    config = small(CONFIG_MAPPING[name], OVER.get(name))
    return AutoModelForCausalLM.from_config(config).eval()
