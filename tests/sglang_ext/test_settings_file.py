"""The settings file: what it may hold, what it yields to, and what is said of a damaged one or another model's."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_ext.settings import SERVE_MODES, Settings, load_settings
from sglang_ext.settings_file import read_settings_file


@pytest.fixture
def write(tmp_path: Path):
    """write(content) -> path of a file of this format; text is written as it is."""

    def make(content: Any, name: str = "Tuned.json") -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps({"format": 1, **content}) if isinstance(content, dict) else content)
        return str(path)

    return make


def load(path: str, config: dict[str, Any] | None = None, **environ: str) -> Settings:
    variables = {f"SGLANG_EXT_{name.upper()}": value for name, value in environ.items()}
    return load_settings(config, {"SGLANG_EXT_SETTINGS_FILE": path, **variables})


def layer_of(path: str, layer: int = 3, **environ: str) -> Settings:
    return load(path, **environ).of_layer(layer)


# Order


def test_defaults_model_config_file_environment(write):
    path = write({"active_heads": 16, "candidates": 8192, "mode": "misa"})
    settings = load(path, {"sglang_ext": {"active_heads": 4, "group": 2}, "use_hisa": True}, candidates="4096")
    assert (settings.mode, settings.active_heads, settings.group, settings.candidates) == ("misa", 16, 2, 4096)
    assert settings.settings_file == path, "a path keeps its capitals"


def test_the_model_config_can_name_the_file(write):
    path, other = write({"group": 2}), write({"group": 4, "mode": "hisa"}, "other.json")
    own = {"sglang_ext": {"settings_file": path, "group": 8}}
    assert load_settings(own, {}).group == 2
    assert load_settings(own, {"SGLANG_EXT_SETTINGS_FILE": other}).mode == "hisa"
    assert load_settings(own, {"SGLANG_EXT_SETTINGS_FILE": ""}).group == 8, "none at all"


def test_as_dict_loads_back(write):
    path = write({"mode": "misa", "layers": {"3": {"mode": "hisa", "top_blocks": 48}, "10": {"decode_mode": "native"}}})
    settings = load(path)
    assert load_settings({"sglang_ext": json.loads(json.dumps(settings.as_dict()))}, {}) == settings


# Single layers


def test_a_layer_has_its_own_values_and_the_deployments(write):
    path = write({"candidates": 8192, "layers": {"3": {"active_heads": 16}, "4": {"why": "a note"}}})
    assert (layer_of(path).active_heads, layer_of(path).candidates) == (16, 8192)
    settings = load(path)
    assert settings.of_layer(2) is settings and settings.of_layer(4) is settings


@pytest.mark.parametrize(
    ("deployment", "layer", "want"),
    [
        # under auto a layer's mode is what auto chooses, and waits as auto waits
        ({}, {"mode": "hisa"}, ("auto", "hisa", "auto")),
        ({}, {"prefill_mode": "hisa"}, ("auto", "hisa", "auto")),
        ({}, {"decode_mode": "hisa"}, ("auto", "misa_rerank", "hisa")),
        ({}, {"mode": "hisa", "decode_mode": "native"}, ("auto", "hisa", "native")),
        ({}, {"mode": "hisa", "decode_mode": "misa_rerank"}, ("auto", "hisa", "misa_rerank")),
        ({}, {"mode": "native", "decode_mode": "hisa"}, ("native", "misa_rerank", "hisa")),
        ({}, {"mode": "native"}, ("native", "misa_rerank", "native")),
        ({"decode_mode": "hisa"}, {"mode": "misa"}, ("auto", "misa", "auto")),
        ({"decode_mode": "hisa"}, {"mode": "native"}, ("native", "misa_rerank", "native")),
        ({"decode_mode": "hisa"}, {"prefill_mode": "misa"}, ("auto", "misa", "hisa")),
        ({"mode": "native"}, {"mode": "hisa"}, ("hisa", "misa_rerank", "auto")),
        ({"mode": "misa"}, {"mode": "hisa"}, ("hisa", "misa_rerank", "auto")),
        ({"prefill_mode": "misa"}, {"mode": "hisa"}, ("hisa", "misa_rerank", "auto")),
        ({"mode": "misa"}, {"mode": "auto"}, ("auto", "misa_rerank", "auto")),
        ({"mode": "misa"}, {"prefill_mode": "none", "active_heads": 4}, ("misa", "misa_rerank", "auto")),
    ],
)
def test_mode_of_a_layer(write, deployment, layer, want):
    own = layer_of(write({**deployment, "layers": {"3": layer}}))
    assert (own.phase_mode("prefill"), own.auto_prefill_mode, own.phase_mode("decode")) == want


@pytest.mark.parametrize(
    ("environ", "prefill", "decode", "heads"),
    [
        ({}, "hisa", "misa", 4),
        ({"mode": "native"}, "native", "native", 4),
        ({"mode": "misa_rerank"}, "misa_rerank", "auto", 4),
        ({"mode": "misa_rerank", "decode_mode": "hisa"}, "misa_rerank", "hisa", 4),
        ({"mode": "auto"}, "hisa", "misa", 4),  # leaves it to the layers
        ({"prefill_mode": "native"}, "native", "misa", 4),
        ({"prefill_mode": "auto"}, "hisa", "misa", 4),
        ({"decode_mode": "native"}, "hisa", "native", 4),
        ({"active_heads": "16"}, "hisa", "misa", 16),
    ],
    ids=str,
)
def test_the_environment_wins_over_the_files_layers(write, environ, prefill, decode, heads):
    path = write({"layers": {"3": {"prefill_mode": "hisa", "decode_mode": "misa", "active_heads": 4}}})
    own = layer_of(path, **environ)
    chosen = own.auto_prefill_mode if own.phase_mode("prefill") == "auto" else own.phase_mode("prefill")
    assert (chosen, own.phase_mode("decode"), own.active_heads) == (prefill, decode, heads)


@pytest.mark.parametrize(
    ("mode", "prefill", "decode"),
    [("native", "native", "native"), ("misa", "misa", "auto"), ("auto", "hisa", "misa"), (None, "hisa", "misa")],
)
def test_a_later_mode_replaces_both_phases_modes(write, mode, prefill, decode):
    environ = {} if mode is None else {"mode": mode}
    settings = load(write({"prefill_mode": "hisa", "decode_mode": "misa"}), **environ)
    assert (settings.phase_mode("prefill"), settings.phase_mode("decode")) == (prefill, decode)
    both = load(write({"prefill_mode": "hisa"}), **{"mode": "native", "decode_mode": "misa"})
    assert (both.phase_mode("prefill"), both.phase_mode("decode")) == ("native", "misa")


def test_layers_of_two_sources_come_together(write):
    path = write({"layers": {"3": {"active_heads": 4}, "5": {"mode": "native"}}})
    config = {"sglang_ext": {"layers": {"3": {"active_heads": 16, "group": 2}, "7": {"group": 2}}}}
    settings = load(path, config, layers='{"5": {"mode": "hisa"}}')
    assert settings.as_dict()["layers"] == {
        "3": {"active_heads": 4, "group": 2},
        "5": {"prefill_mode": "hisa", "decode_mode": "auto"},
        "7": {"group": 2},
    }


def test_a_switched_mode_is_for_all_layers_and_auto_is_the_files(write):
    settings = load(write({"layers": {"3": {"prefill_mode": "hisa", "decode_mode": "hisa"}}}))
    assert settings.switched("misa").of_layer(3).phase_mode("prefill") == "misa"
    assert settings.switched("misa").of_layer(3).phase_mode("decode") == "hisa"
    assert settings.switched("auto").of_layer(3).auto_prefill_mode == "hisa"


# What is wrong with a file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ('{"format": 1, "mode": "mi', "is not JSON, it may be cut off"),
        ("", "is not JSON"),
        (b"\xff\xfe\x00damaged", "is no text in UTF-8"),
        ("[1]", "must be a JSON object, not list"),
        ("{}", "format=None must be 1"),
        ('{"format": "1"}', "format='1' must be 1"),
        ('{"format": true}', "format=True must be 1"),
        ({"format": 2}, "format=2 must be 1"),
        ({"tuned_on": []}, "tuned_on=[] must be an object"),
        ({"tuned_on": {"heads": "64"}}, "tuned_on.heads='64' must be an integer"),
        ({"settings_file": "x"}, "settings_file cannot be set in a settings file"),
        ({"runtime_switch": True}, "runtime_switch cannot be set in a settings file"),
        ({"moed": "hisa"}, "unknown setting moed (did you mean mode?)"),
        ({"mode": "fast"}, "mode='fast' must be one of native, misa"),
        ({"auto_prefill_mode": "native"}, "auto_prefill_mode='native' must be one of misa,"),
        ({"active_heads": "many"}, "active_heads='many' must be an integer"),
        ({"top_blocks": 2}, "top_blocks=2"),
        ({"layers": [1]}, "layers=[1] must be an object"),
        ({"layers": "{}"}, "layers='{}' must be an object"),
        ({"layers": {"first": {}}}, "layers.first: 'first' must be the number of a layer"),
        ({"layers": {"-1": {}}}, "layers.-1: '-1' must be the number of a layer"),
        ({"layers": {"3": {}, "03": {}}}, "layers.03 is there twice"),
        ({"layers": {"3": "hisa"}}, "layers.3='hisa' must be an object"),
        ({"layers": {"3": {"strict": True}}}, "layers.3.strict is not a setting of single layers; those are mode,"),
        ({"layers": {"3": {"mode": "fast"}}}, "layers.3.mode='fast' must be one of native, misa"),
        ({"layers": {"3": {"decode_mode": "fast"}}}, "layers.3.decode_mode='fast' must be one of"),
        ({"layers": {"3": {"active_heads": 4.5}}}, "layers.3.active_heads=4.5 must be an integer"),
        ({"layers": {"3": {"candidates": 100}}}, "layers.3: candidates=100 must be at least top_k"),
        ({"block_size": 64, "layers": {"3": {"top_blocks": 16}}}, "layers.3: top_blocks=16"),
    ],
    ids=str,
)
def test_a_wrong_file_is_named_with_field_and_value(write, tmp_path, content, said):
    path = str(tmp_path / "gone.json") if content is None else write(content)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).startswith(f"settings file {path}") and said in str(error.value)
    assert str(error.value).count(path) == 1


def test_a_wrong_variable_is_not_blamed_on_the_file(write):
    path = write({"mode": "hisa"})
    with pytest.raises(ValueError, match="^mode='fast' must be one of"):
        load(path, mode="fast")
    with pytest.raises(ValueError, match="^unknown setting SGLANG_EXT_MOED"):
        load(path, moed="fast")
    with pytest.raises(ValueError, match="^top_blocks=64 of block_size=8 .*together with settings file"):
        load(write({"top_blocks": 64}), block_size="8")


def test_every_mode_may_be_a_layers(write):
    for mode in SERVE_MODES:
        load(write({"layers": {"0": {"mode": mode}}}))


# The served model


FACTS = {"num_layers": 61, "heads": 64, "top_k": 2048}


def test_the_model_it_was_tuned_on(write):
    file = read_settings_file(write({"tuned_on": FACTS, "layers": {"60": {"mode": "native"}}}))
    file.check_model(61, 64, 2048)
    file.check_model(None, 64, 2048)


@pytest.mark.parametrize(("name", "served"), [("num_layers", 78), ("heads", 32), ("top_k", 1024)])
def test_another_model_is_refused(write, name, served):
    path = write({"tuned_on": FACTS})
    with pytest.raises(ValueError) as error:
        read_settings_file(path).check_model(*(FACTS | {name: served}).values())
    words = (f"settings file {path}", f"tuned_on.{name}={FACTS[name]}", f"served model has {served}")
    assert all(word in str(error.value) for word in words)


def test_a_layer_that_the_model_lacks(write):
    file = read_settings_file(write({"layers": {"61": {"mode": "native"}}}))
    file.check_model(62, 64, 2048)
    with pytest.raises(ValueError, match=r"layers\.61 is not there: the served model has layers 0 to 60"):
        file.check_model(61, 64, 2048)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"format": 1, "layers": {"3": {"mode": "native"}, "3": {"active_heads": 16}}}', "3"),
        ('{"format": 1, "mode": "hisa", "mode": "misa"}', "mode"),
        ('{"format": 1, "layers": {"3": {"top_blocks": 48, "top_blocks": 64}}}', "top_blocks"),
    ],
)
def test_a_name_that_is_there_twice(write, text, name):
    """JSON allows it and Python keeps the last: what was written first would silently not hold."""
    path = write(text)
    with pytest.raises(ValueError, match=f"settings file .*{name!r} is there twice"):
        load(path)
