"""Where settings come from, in which order, and what a wrong one is told."""

import dataclasses
import json

import pytest

from indexer_kernels import IndexerParams
from sglang_ext.settings import SERVE_MODES, Settings, load_settings

FIELDS = [field.name for field in dataclasses.fields(Settings)]


@pytest.mark.parametrize(
    ("config", "environ", "name", "want"),
    [
        (None, {}, "mode", "auto"),
        ({}, {}, "active_heads", 8),
        ({"sglang_ext": None}, {}, "mode", "auto"),
        ({"use_misa": True}, {}, "mode", "misa"),
        ({"use_misa": True, "sglang_ext": {"mode": "hisa"}}, {}, "mode", "hisa"),
        ({"use_misa": True, "sglang_ext": {"mode": "hisa"}}, {"SGLANG_EXT_MODE": "native"}, "mode", "native"),
        ({"use_misa": True}, {"SGLANG_EXT_MODE": "native"}, "mode", "native"),
        ({"use_misa": True, "misa_topk_heads": 4}, {}, "active_heads", 4),
        ({"use_misa": True, "misa_topk_heads": 4, "sglang_ext": {"active_heads": 16}}, {}, "active_heads", 16),
        ({"sglang_ext": {"active_heads": 16}}, {"SGLANG_EXT_ACTIVE_HEADS": "4"}, "active_heads", 4),
        ({"sglang_ext": {"active_heads": 16}}, {"SGLANG_EXT_GROUP": "2"}, "active_heads", 16),
        (None, {"EXT_MODE": "hisa", "SGLANG_MODE": "hisa", "MODE": "hisa"}, "mode", "auto"),
    ],
)
def test_precedence(config, environ, name, want):
    assert getattr(load_settings(config, environ), name) == want


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"use_misa": True}, {"mode": "misa"}),
        (
            {"use_misa": True, "misa_topk_heads": 4, "misa_k_block_size": 512},
            {"mode": "misa", "active_heads": 4, "route_block": 512},
        ),
        ({"use_misa": True, "misa_stage1_topk": 4096}, {"mode": "misa_rerank", "candidates": 4096}),
        ({"use_misa": True, "misa_stage1_topk": None}, {"mode": "misa"}),
        (
            {"use_hisa": True, "hisa_k_block_size": 64, "hisa_block_topk": 128},
            {"mode": "hisa", "block_size": 64, "top_blocks": 128},
        ),
        ({"use_hisa": True, "misa_stage1_topk": 4096}, {"mode": "hisa"}),
        ({"use_misa": True, "hisa_block_topk": 128}, {"mode": "misa"}),
        ({"misa_stage1_topk": 4096, "hisa_block_topk": 128}, {}),
        ({"use_misa": False, "use_hisa": False, "misa_topk_heads": 4}, {}),
        ({"use_misa": False, "use_hisa": True}, {"mode": "hisa"}),
        ({"hidden_size": 7168, "index_topk": 2048}, {}),
    ],
)
def test_papers_fields(config, want):
    assert load_settings(config, {}) == Settings(**want)


def test_both_paper_switches_are_refused():
    with pytest.raises(ValueError, match="use_misa and use_hisa are both set"):
        load_settings({"use_misa": True, "use_hisa": True}, {})


@pytest.mark.parametrize(
    ("config", "environ", "shown", "hint"),
    [
        (None, {"SGLANG_EXT_MOED": "hisa"}, "SGLANG_EXT_MOED", "did you mean mode?"),
        (None, {"SGLANG_EXT_ACTIVE_HEAD": "4"}, "SGLANG_EXT_ACTIVE_HEAD", "did you mean active_heads?"),
        ({"sglang_ext": {"candidate": 4096}}, {}, "candidate", "did you mean candidates?"),
        ({"sglang_ext": {"qqqqqq": 1}}, {}, "qqqqqq", None),
        (None, {"SGLANG_EXT_": "x"}, "SGLANG_EXT_", None),
    ],
)
def test_unknown_name(config, environ, shown, hint):
    with pytest.raises(ValueError) as error:
        load_settings(config, environ)
    message = str(error.value)
    assert f"unknown setting {shown}" in message
    assert all(name in message for name in FIELDS)
    assert hint in message if hint else "did you mean" not in message


@pytest.mark.parametrize("value", ["misa", 1, ["mode"]])
def test_own_field_must_be_an_object(value):
    with pytest.raises(ValueError, match="sglang_ext=.*must be an object"):
        load_settings({"sglang_ext": value}, {})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *[(name, "fastest", SERVE_MODES) for name in ("mode", "prefill_mode", "decode_mode")],
        ("mode", "", SERVE_MODES),
        ("mode", None, SERVE_MODES),
        ("backend", "cuda", ("auto", "reference", "gpu")),
        ("candidate_unit", "row", ("('token', 'page')",)),
        ("candidate_unit", "auto", ("('token', 'page')",)),
        ("strict", "maybe", ("true or false",)),
        ("strict", 2, ("true or false",)),
        ("runtime_switch", "", ("true or false",)),
        ("trace_rows", 0, ("at least 1",)),
        ("shadow_rows", 0, ("at least 1",)),
        ("guard_min_samples", 0, ("at least 1",)),
        *[(name, value, ("from 0 to 1",)) for name in ("shadow_rate", "guard_overlap") for value in (-0.1, 1.1, "nan")],
        *[("shadow_rate", value, ("a number",)) for value in ("1%", "", True, None, [0.1])],
        ("guard_overlap", 0.9, ("shadow_rate",)),
        ("active_heads", "eight", ("integer",)),
        ("active_heads", "", ("integer",)),
        ("active_heads", 4.5, ("integer",)),
        ("active_heads", True, ("integer",)),
        ("active_heads", None, ("integer",)),
        ("active_heads", [4], ("integer",)),
        ("active_heads", 0, ("at least 1",)),
        ("native_tail_rows", -1, ("negative",)),
        ("prefill_min_tokens", "-5", ("negative",)),
        ("candidates", 1024, ("at least", "2048")),
        ("top_blocks", 2, ("at least", "2048")),
    ],
)
def test_wrong_value(name, value, words):
    with pytest.raises(ValueError) as error:
        load_settings({"sglang_ext": {name: value}}, {})
    for word in (name, *words):
        assert word in str(error.value)


def test_wrong_value_of_the_environment_is_refused_too():
    with pytest.raises(ValueError, match="mode='fastest' must be one of native, misa"):
        load_settings(None, {"SGLANG_EXT_MODE": "fastest"})


@pytest.mark.parametrize("text", ["1", "true", "True", " YES ", "on", True, 1])
def test_true(text):
    assert load_settings({"sglang_ext": {"strict": text}}, {}).strict is True


@pytest.mark.parametrize("text", ["0", "false", "FALSE", "no", " off", False, 0])
def test_false(text):
    base = {"sglang_ext": {"strict": True, "runtime_switch": text}}
    settings = load_settings(base, {})
    assert settings.runtime_switch is False and settings.strict is True


@pytest.mark.parametrize("value", [16, "16", " 16 ", 16.0])
def test_integer(value):
    heads = load_settings({"sglang_ext": {"active_heads": value}}, {}).active_heads
    assert heads == 16 and type(heads) is int


@pytest.mark.parametrize("value", [0.25, "0.25", " 2.5e-1 "])
def test_number(value):
    assert load_settings({"sglang_ext": {"shadow_rate": value}}, {}).shadow_rate == 0.25
    assert load_settings({"sglang_ext": {"shadow_rate": 1}}, {"SGLANG_EXT_GUARD_OVERLAP": "0.9"}).guard_overlap == 0.9


@pytest.mark.parametrize("value", ["Hisa", " hisa\n", "HISA"])
def test_words_ignore_case_and_space(value):
    assert load_settings(None, {"SGLANG_EXT_MODE": value}).mode == "hisa"


@pytest.mark.parametrize("value", [None, "", "none", "None", " NONE "])
def test_phase_modes_can_be_unset(value):
    settings = load_settings({"sglang_ext": {"mode": "hisa", "prefill_mode": value, "decode_mode": value}}, {})
    assert settings.prefill_mode is None and settings.decode_mode is None
    assert (settings.phase_mode("prefill"), settings.phase_mode("decode")) == ("hisa", "auto")


@pytest.mark.parametrize(
    ("value", "want"),
    [(None, None), ("", None), (" None ", None), (" Some/Folder/X ", "Some/Folder/X")],
)
def test_a_folder_keeps_its_capitals(value, want):
    assert load_settings({"sglang_ext": {"trace_dir": value}}, {}).trace_dir == want


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("0-2,60", (0, 1, 2, 60)),
        ("60, 0-2", (0, 1, 2, 60)),
        ("3", (3,)),
        (3, (3,)),
        ("3,3,2-4", (2, 3, 4)),
        ("5-5", (5,)),
        ("", ()),
        (" , ", ()),
        ([60, 0], (0, 60)),
        (["0-1", 7], (0, 1, 7)),
        ([], ()),
    ],
)
def test_layers(value, want):
    assert load_settings({"sglang_ext": {"native_layers": value}}, {}).native_layers == want


@pytest.mark.parametrize("value", ["a", "2-0", "0-", "-1", "0-b", "1.5", "0--2", [-1], [1.5], None, True, {"a": 1}])
def test_bad_layers(value):
    with pytest.raises(ValueError, match="native_layers=.*0-2,60"):
        load_settings({"sglang_ext": {"native_layers": value}}, {})


def test_negative_layer_built_directly():
    with pytest.raises(ValueError, match="native_layers"):
        Settings(native_layers=(-1,))


def test_params_hold_the_kernels_share():
    own = {"active_heads": 4, "route_block": 512, "candidates": 4096, "candidate_unit": "page", "block_size": 64}
    own |= {"route_statistic": "max", "top_blocks": 99, "group": 2, "local_tokens": 7}
    assert Settings(mode="hisa", **own).params(1024) == IndexerParams(top_k=1024, **own)
    assert {field.name for field in dataclasses.fields(IndexerParams)} == {"top_k", *own}


def test_params_of_a_model_the_budget_is_too_small_for():
    settings = Settings(candidates=2048)
    assert settings.params(2048).candidates == 2048
    with pytest.raises(ValueError, match="candidates=2048 must be at least top_k=4096"):
        settings.params(4096)


@pytest.mark.parametrize(
    ("settings", "prefill", "decode"),
    [
        (Settings(), "auto", "auto"),
        (Settings(mode="hisa"), "hisa", "auto"),
        (Settings(mode="misa_rerank"), "misa_rerank", "auto"),
        (Settings(mode="native"), "native", "native"),
        (Settings(mode="native", prefill_mode="misa"), "misa", "native"),
        (Settings(mode="native", decode_mode="auto"), "native", "auto"),
        (Settings(prefill_mode="native"), "native", "auto"),
        (Settings(mode="misa_rerank", decode_mode="hisa"), "misa_rerank", "hisa"),
        (Settings(mode="hisa", decode_mode="native"), "hisa", "native"),
        (Settings(mode="hisa", prefill_mode="misa"), "misa", "auto"),
        (Settings(prefill_mode="misa", decode_mode="group_rerank"), "misa", "group_rerank"),
    ],
)
def test_phase_mode(settings, prefill, decode):
    assert (settings.phase_mode("prefill"), settings.phase_mode("decode")) == (prefill, decode)


def test_as_dict_loads_back():
    settings = Settings(
        mode="hisa", decode_mode="native", native_layers=(0, 3), strict=True, candidates=4096, trace_dir="A"
    )
    assert load_settings({"sglang_ext": json.loads(json.dumps(settings.as_dict()))}, {}) == settings


def test_every_setting_is_explained():
    assert all(field.metadata["help"] for field in dataclasses.fields(Settings))
