"""Write a few-layer model directory with DeepSeek-V3.2's attention and indexer shapes, for servers with dummy weights.

    python scripts/tiny_model.py OUT [--layers 4] [--heads 16] [--indexer-heads 64]

Load it with `--load-format dummy`; the tokenizer is byte-level. Every layer is dense: a V3.2 MoE layer (8 routed and
one shared expert of 2048) costs a token what one MLP of 18432 costs. `--heads 16` is one rank of an 8-way tensor-
parallel deployment (heads and MLP divided by 8, the indexer replicated as SGLang replicates it), `--heads 128` a
data-parallel one. The draft layer for speculative decoding is a mixture of experts in any case, here of 32: 256 of them
would be 22 GB.
"""

import argparse
import json
from pathlib import Path

DRAFT_EXPERTS = 32


def model_config(layers: int, heads: int, indexer_heads: int) -> dict:
    """config.json of DeepSeek-V3.2 with `layers` dense layers and `heads` of its 128 attention heads."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "torch_dtype": "bfloat16",
        "vocab_size": 4096,
        "hidden_size": 7168,
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "intermediate_size": 18432 * heads // 128,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_n_heads": indexer_heads,
        "index_head_dim": 128,
        "index_topk": 2048,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "topk_group": 4,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "ep_size": 1,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def write_model(out: Path, layers: int, heads: int, indexer_heads: int = 64) -> None:
    """config.json and a byte-level tokenizer under `out`. Needs tokenizers and transformers, which SGLang brings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    config = model_config(layers, heads, indexer_heads) | {"n_routed_experts": DRAFT_EXPERTS}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    letters = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters += [f"<x{n}>" for n in range(len(letters), config["vocab_size"])]
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--indexer-heads", type=int, default=64)
    options = parser.parse_args()
    write_model(options.out, options.layers, options.heads, options.indexer_heads)
