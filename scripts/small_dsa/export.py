"""The trained model as a Hugging Face directory that SGLang loads as DeepseekV32ForCausalLM, and back."""

import json
from pathlib import Path

import torch

from small_dsa.architecture import INDEX_HEAD_DIM, LATENT_DIM, NORM_EPS, ROPE_DIM, ModelShape, SmallDsa
from small_dsa.vocabulary import SPECIAL, save_tokenizer
from tiny_model import model_config

WEIGHTS = "model.safetensors"


def hf_config(shape: ModelShape) -> dict:
    """config.json: DeepSeek-V3.2's with every layer dense (no expert layer), tied embeddings, RoPE as it is."""
    return model_config(shape.num_layers, shape.num_heads, shape.index_heads) | {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "moe_intermediate_size": shape.intermediate_size,
        "q_lora_rank": shape.q_lora_rank,
        "kv_lora_rank": LATENT_DIM,
        "qk_nope_head_dim": shape.nope_dim,
        "qk_rope_head_dim": ROPE_DIM,
        "v_head_dim": shape.value_dim,
        "index_head_dim": INDEX_HEAD_DIM,
        "index_topk": shape.index_top_k,
        "num_nextn_predict_layers": 0,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": NORM_EPS,
        "bos_token_id": SPECIAL.index("<bos>"),
        "eos_token_id": SPECIAL.index("<eos>"),
        "pad_token_id": SPECIAL.index("<pad>"),
        "tie_word_embeddings": True,
    }


def export_model(model: SmallDsa, out: Path) -> None:
    """config.json, bf16 weights (the indexer's key norm in float32, as SGLang keeps it) and the tokenizer."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.state_dict().items():
        dtype = torch.float32 if ".indexer.k_norm." in name else torch.bfloat16
        tensors[f"model.{name}"] = parameter.detach().to("cpu", dtype).contiguous()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(hf_config(model.shape), indent=1) + "\n")
    save_tokenizer(out)


def load_exported(path: Path) -> SmallDsa:
    """The model of a directory that `export_model` wrote. ValueError for another architecture."""
    from safetensors.torch import load_file

    config = json.loads((path / "config.json").read_text())
    shape = ModelShape(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        q_lora_rank=config["q_lora_rank"],
        nope_dim=config["qk_nope_head_dim"],
        value_dim=config["v_head_dim"],
        index_heads=config["index_n_heads"],
        index_top_k=config["index_topk"],
        rope_theta=config["rope_theta"],
    )
    if config != hf_config(shape):
        raise ValueError(f"{path}/config.json is not one that export_model wrote")
    model = SmallDsa(shape)
    weights = {name.removeprefix("model."): tensor.float() for name, tensor in load_file(path / WEIGHTS).items()}
    model.load_state_dict(weights)
    return model
