"""The small model on disk: what SGLang reads of its configuration, and the same model read back."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers (it comes with SGLang) is not installed")
pytest.importorskip("safetensors", reason="safetensors (it comes with SGLang) is not installed")

from safetensors.torch import load_file

from small_dsa.architecture import ModelShape, SmallDsa
from small_dsa.export import WEIGHTS, export_model, load_exported
from small_dsa.passes import dense_pass

SHAPE = ModelShape(80, 2, 32, 48, num_heads=3, q_lora_rank=16, nope_dim=8, value_dim=12, index_heads=5)
_LAYER_TENSORS = """
input_layernorm.weight mlp.down_proj.weight mlp.gate_proj.weight mlp.up_proj.weight post_attention_layernorm.weight
self_attn.indexer.k_norm.bias self_attn.indexer.k_norm.weight self_attn.indexer.weights_proj.weight
self_attn.indexer.wk.weight self_attn.indexer.wq_b.weight self_attn.kv_a_layernorm.weight
self_attn.kv_a_proj_with_mqa.weight self_attn.kv_b_proj.weight self_attn.o_proj.weight self_attn.q_a_layernorm.weight
self_attn.q_a_proj.weight self_attn.q_b_proj.weight
"""
LAYER_TENSORS = _LAYER_TENSORS.split()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, its folder); norms and biases as after training, not 1 and 0."""
    torch.manual_seed(5)
    model = SmallDsa(SHAPE)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    out = tmp_path_factory.mktemp("exported")
    export_model(model, out)
    return model, out


@torch.no_grad()
def test_read_back_it_computes_the_same(exported):
    model, out = exported
    loaded = load_exported(out)
    assert loaded.shape == SHAPE
    tokens = torch.randint(SHAPE.vocab_size, (2, 40))
    first, second = dense_pass(model, tokens), dense_pass(loaded, tokens)
    assert (first - second).norm() < 0.02 * first.norm()
    rounded = SmallDsa(SHAPE)
    kept = {name: t if ".k_norm." in name else t.bfloat16().float() for name, t in model.state_dict().items()}
    rounded.load_state_dict(kept)
    assert torch.equal(dense_pass(rounded, tokens), second)
    assert all(torch.equal(kept[name], tensor) for name, tensor in loaded.state_dict().items())


def test_tensors_have_the_names_and_types_that_sglang_loads(exported):
    _, out = exported
    tensors = load_file(out / WEIGHTS)
    layers = [f"model.layers.{n}.{name}" for n in range(SHAPE.num_layers) for name in LAYER_TENSORS]
    assert sorted(tensors) == sorted([*layers, "model.embed_tokens.weight", "model.norm.weight"])
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if ".k_norm." in name else torch.bfloat16)


def test_configuration_has_what_sglang_reads(exported):
    _, out = exported
    config = json.loads((out / "config.json").read_text())
    wanted = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "index_topk": 2048,
        "index_head_dim": 128,
        "tie_word_embeddings": True,
        "vocab_size": 80,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "index_n_heads": 5,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    assert {name: config.get(name) for name in wanted} == wanted
    tensors = load_file(out / WEIGHTS)
    assert "lm_head.weight" not in tensors  # tied
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])


@pytest.mark.parametrize(
    "field,value",
    [
        ("kv_lora_rank", 256),
        ("tie_word_embeddings", False),
        ("rope_scaling", {"type": "yarn", "factor": 40}),
        ("first_k_dense_replace", 1),
        ("rms_norm_eps", 1e-5),
        ("unknown", 1),
    ],
)
def test_a_changed_configuration_is_refused(exported, tmp_path, field, value):
    _, out = exported
    config = json.loads((out / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).symlink_to(out / WEIGHTS)
    with pytest.raises(ValueError, match=r"config\.json is not one that export_model wrote"):
        load_exported(tmp_path)


def test_weights_of_another_shape_are_refused(exported, tmp_path):
    _, out = exported
    config = json.loads((out / "config.json").read_text()) | {"q_lora_rank": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).symlink_to(out / WEIGHTS)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_exported(tmp_path)


def test_sglang_reads_the_configuration(exported):
    pytest.importorskip("sglang", reason="the sglang extra is not installed")
    from sglang.srt.utils.hf_transformers import get_config

    _, out = exported
    config = get_config(str(out), trust_remote_code=False)
    assert config.architectures == ["DeepseekV32ForCausalLM"]
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.index_topk) == (512, 64, 2048)
    assert (config.index_n_heads, config.index_head_dim, config.q_lora_rank) == (5, 128, 16)
    assert config.tie_word_embeddings is True
    # As SGLang asks for it: newer transformers keep RoPE in a field of its own.
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert rope["rope_theta"] == SHAPE.rope_theta and rope.get("rope_type", "default") == "default"
