"""Layers with settings of their own, in the stage: what each runs, and what the counters say of it."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from indexer_kernels import select_ragged
from sglang_ext.layer_settings import LayerSettings
from sglang_ext.runner import OutputForm
from sglang_ext.settings import Settings, load_settings
from sglang_ext.stage import Stage
from tests.support.compare import assert_same_selection
from tests.support.inputs import Batch
from tests.support.stage_calls import Asked, Attention, calls, decode, log_lines, prefill, stage_batch

TOP_K = 64
# Small enough to prune contexts of a few hundred tokens; what a real file may not ask for, tests may.
PLAIN = {"backend": "reference", "route_block": 64, "active_heads": 2}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return stage_batch()


def settings(layers: dict[str, dict[str, Any]], **deployment: Any) -> Settings:
    return load_settings({"sglang_ext": {**PLAIN, "mode": "misa", **deployment, "layers": layers}}, {})


def stage_of(own: Settings, layers: int = 4) -> Stage:
    """A stage that knows layers 0 to layers - 1."""
    stage = Stage(own, {})
    stage._layers.update(range(layers))
    return stage


def forward_layers(stage: Stage, batch: Batch, layers: int = 4, attention: object = None, **changes: Any) -> list[Any]:
    """One prefill through all layers: each layer's decision, and its selection where it does not run native."""
    attention = attention or Attention()
    seen = []
    for layer in range(layers):
        forward = prefill(stage, batch, attention, layer_id=layer, **changes)
        out = torch.full((13, TOP_K), -1, dtype=torch.int32)
        if taken := stage.takes(forward, layer):
            tensors = (batch.q, batch.weights, batch.k_pages, batch.page_table)
            stage.run(forward, layer, *tensors, OutputForm("position"), out)
        seen.append((forward, out if taken else None))
    return seen


def test_every_layer_runs_its_own_mode_and_parameters(batch):
    own = settings({"1": {"active_heads": 4}, "2": {"mode": "native"}, "3": {"mode": "misa", "route_block": 128}})
    stage = stage_of(own)
    outs = [out for _, out in forward_layers(stage, batch)]
    want = {}
    for layer, (heads, block) in {0: (2, 64), 1: (4, 64), 3: (2, 128)}.items():
        params = Settings(mode="misa", backend="reference", active_heads=heads, route_block=block).params(TOP_K)
        want[layer] = select_ragged("misa", *batch.ragged, params, backend="reference")
        assert_same_selection(outs[layer], [set(row) - {-1} for row in want[layer].tolist()], batch.lengths, TOP_K)
    assert outs[2] is None
    distinct = {tuple(map(tuple, one.sort(dim=1).values.tolist())) for one in want.values()}
    assert len(distinct) == 3, "the layers' settings must matter here"
    assert calls(stage) == {("prefill", "misa", "configured"): (3, 39), ("prefill", "native", "native_layer"): (1, 13)}


def test_layers_of_different_modes_share_rows_and_are_asked_once_each(batch):
    own = settings({"1": {"mode": "hisa"}, "3": {"mode": "hisa"}})
    stage, asked, attention = stage_of(own), Asked(), Attention()
    forwards = [forward for forward, _ in forward_layers(stage, batch, attention=attention, unsupported=asked)]
    assert [forward.decision.mode for forward in forwards] == ["misa", "hisa", "misa", "hisa"]
    assert forwards[0] is forwards[2] and forwards[1] is forwards[3] and asked.times == 2
    assert forwards[0].parts[0][1] is forwards[1].parts[0][1]
    assert [mode for mode, _ in forwards[1].parts] == ["hisa"]
    assert calls(stage) == {("prefill", "misa", "configured"): (2, 26), ("prefill", "hisa", "configured"): (2, 26)}
    ran = {(one["mode"], one["forwards"]) for one in stage.counters.snapshot()["forwards"]}
    assert ran == {("misa", 1), ("hisa", 1)}, "once for the layers that share their settings"


def test_native_tail_rows_stay_native_in_every_layer(batch):
    stage = stage_of(settings({"1": {"mode": "hisa"}}, native_tail_rows=4))
    stage.note_prompts([300, 40, 70], [9, 3, 1], [302, 40, 1 << 40])
    (first, _), (second, _) = forward_layers(stage, batch, layers=2)
    assert [mode for mode, _ in first.parts] == ["misa", "native"]
    assert [mode for mode, _ in second.parts] == ["hisa", "native"]
    assert all(a is b for (_, a), (_, b) in zip(first.parts, second.parts))


@pytest.mark.parametrize("native_first", [True, False])
def test_a_layer_plans_rows_where_the_first_needed_none(batch, native_first):
    layers = {"0": {"mode": "native"}} if native_first else {"1": {"mode": "native"}}
    forwards = [forward for forward, _ in forward_layers(stage_of(settings(layers)), batch, layers=3)]
    assert [bool(forward.parts) for forward in forwards] == [not native_first, native_first, True]


def test_decode_has_plans_of_its_own():
    own = {"1": {"decode_mode": "hisa"}, "2": {"decode_mode": "native"}}
    stage, attention = stage_of(settings(own, decode_mode="misa")), Attention()
    same = {
        "attention": attention,
        "lengths": torch.tensor([130, 7], dtype=torch.int32),
        "page_table": torch.zeros((2, 3), dtype=torch.int32),
    }
    forwards = [decode(stage, **same, layer_id=layer) for layer in range(4)]
    assert [forward.decision for forward in forwards] == [
        ("misa", "configured"),
        ("hisa", "configured"),
        ("native", "native_layer"),
        ("misa", "configured"),
    ]
    assert all(decode(stage, **same, layer_id=layer) is forwards[layer] for layer in range(4))
    assert decode(stage, **same | {"lengths": same["lengths"].clone()}, layer_id=1) is not forwards[1]


def test_under_auto_a_layers_mode_waits_as_auto_waits(batch):
    layers = {"1": {"mode": "hisa"}, "2": {"mode": "hisa", "prefill_min_tokens": 400}, "3": {"mode": "native"}}
    own = settings(layers, mode="auto", prefill_min_tokens=300, prefill_min_rows=13)
    decisions = [forward.decision for forward, _ in forward_layers(stage_of(own), batch)]
    assert decisions == [
        ("misa_rerank", "auto_selected"),
        ("hisa", "auto_selected"),
        ("native", "below_break_even"),
        ("native", "native_layer"),
    ]
    few = settings(layers, mode="auto", prefill_min_tokens=300, prefill_min_rows=14)
    assert [forward.decision.reason for forward, _ in forward_layers(stage_of(few), batch)][:2] == ["few_rows"] * 2


def test_native_everywhere_is_not_the_layers_doing(batch):
    """As where SGLANG_EXT_MODE=native turns a tuned server off."""
    stage = stage_of(settings({"1": {"mode": "native"}, "2": {"active_heads": 4}}, mode="native"))
    forward_layers(stage, batch, layers=3)
    assert calls(stage) == {("prefill", "native", "configured_native"): (3, 39)}


def test_native_layers_of_the_deployment_still_count(batch):
    stage = stage_of(settings({"1": {"mode": "hisa"}}, native_layers="1"))
    forward_layers(stage, batch, layers=2)
    assert calls(stage)[("prefill", "native", "native_layer")] == (1, 13)
    assert stage._layer_settings.first(stage.settings, 1, stage._layers) == 1
    assert stage._layer_settings.first(stage.settings, 1, stage._layers, returned=()) == -1


def test_a_switched_mode_runs_in_all_layers_and_auto_brings_theirs_back(batch):
    own = settings({"1": {"mode": "hisa"}}, mode="auto", prefill_min_tokens=1, prefill_min_rows=1, runtime_switch=True)
    stage = stage_of(own)
    numbers = stage.status()["mode_numbers"]

    def modes() -> list[str]:
        return [forward.decision.mode for forward, _ in forward_layers(stage, batch, layers=2)]

    assert modes() == ["misa_rerank", "hisa"]
    for mode, want in (("misa", ["misa", "misa"]), ("native", ["native", "native"]), ("auto", ["misa_rerank", "hisa"])):
        stage.switch_prefill(numbers[mode])
        assert modes() == want
    assert stage.settings.layers == own.layers


def test_an_unsupported_forward_is_native_in_all_layers(batch):
    stage = stage_of(settings({"1": {"mode": "hisa"}}))
    reasons = [f.decision for f, _ in forward_layers(stage, batch, layers=2, unsupported=Asked("hisparse"))]
    assert reasons == [("native", "hisparse")] * 2


def test_the_first_layer_of_those_that_share_settings():
    own, table = settings({"1": {"mode": "hisa"}, "2": {"mode": "hisa"}, "5": {"active_heads": 4}}), LayerSettings()
    layers = {0, 1, 2, 3, 5}
    assert [table.first(own, layer, layers) for layer in sorted(layers)] == [0, 1, 1, 0, 5]
    assert [one.number for one in table.all(own)] == [0, 1, 2]
    assert table.of(own, 2) is table.of(own, 1)
    assert table.of(Settings(), 1).number == 0, "other settings, another table"


def test_stored_statistics_are_wanted_for_the_layers_that_read_them():
    stage = stage_of(settings({"1": {"decode_mode": "hisa"}, "2": {"decode_mode": "hisa", "block_size": 96}}))
    assert stage.wants_statistics()
    assert [stage.statistics_obstacle(None, layer) for layer in range(3)] == [None, "no_statistics", "block_size"]
    assert not stage_of(settings({"1": {"prefill_mode": "hisa"}})).wants_statistics()
    with pytest.raises(RuntimeError, match="strict.*decode mode 'hisa'.*no_statistics"):
        stage_of(settings({"1": {"decode_mode": "hisa"}}, strict=True)).refuse_statistics("no_statistics")


# Start


def start(stage: Stage, config: dict[str, Any], device: str = "cpu", **model: Any) -> None:
    shape = {"num_heads": 64, "head_dim": 128, "top_k": 2048} | model
    stage.start(config, 0, **shape, device=torch.device(device))


@pytest.fixture
def tuned(tmp_path) -> Callable[..., dict[str, str]]:
    """Variables that name a file of this content."""

    def make(**content: Any) -> dict[str, str]:
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps({"format": 1, **content}))
        return {"SGLANG_EXT_SETTINGS_FILE": str(path)}

    return make


def test_start_checks_the_model(tuned, caplog):
    environ = tuned(tuned_on={"num_layers": 61, "heads": 64}, layers={"3": {"mode": "hisa"}})
    stage = Stage(load_settings(None, environ), environ)
    with caplog.at_level("INFO", "sglang_ext"):
        start(stage, {"num_hidden_layers": 61})
    assert any("tuned on {'num_layers': 61" in line for line in log_lines(caplog, 20))
    for config, heads in (({"num_hidden_layers": 78}, 64), ({"num_hidden_layers": 61}, 32)):
        with pytest.raises(ValueError, match="settings file .*tuned_on"):
            start(Stage(load_settings(None, environ), environ), config, num_heads=heads)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"native_layers": "0-2,61"}, "native_layers: the model has no layer 61, its layers are 0 to 60"),
        ({"layers": {"3": {"mode": "hisa"}, "70": {"mode": "hisa"}}}, "layers: the model has no layer 70"),
    ],
)
def test_start_refuses_layers_that_the_model_lacks(own, said):
    """It would leave them out, and the layer that was meant would run something else."""
    config = {"num_hidden_layers": 61, "sglang_ext": own}
    with pytest.raises(ValueError, match=said):
        start(Stage(Settings(), {}), config)
    start(Stage(Settings(), {}), config | {"num_hidden_layers": 78})
    start(Stage(Settings(), {}), {"sglang_ext": own})  # a config that does not say how many it has


def test_start_compiles_what_any_layer_runs(tuned, monkeypatch):
    environ = tuned(
        mode="misa",
        decode_mode="native",
        layers={"1": {"mode": "hisa"}, "2": {"active_heads": 4}, "3": {"active_heads": 4, "decode_mode": "hisa"}},
    )
    stage, compiled = Stage(load_settings(None, environ), environ), []
    monkeypatch.setattr("sglang_ext.stage.Counters.prepare_device", lambda _self, device: None)
    monkeypatch.setattr("sglang_ext.support.gpu_refusal", lambda mode, q, params: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **kw: empty(*a, **kw))
    monkeypatch.setattr(
        stage.support,
        "compile",
        lambda wanted, heads: compiled.extend((mode, params.active_heads) for mode, params in wanted),
    )
    start(stage, {}, device="cuda")
    assert compiled == [("misa", 8), ("hisa", 8), ("misa", 4), ("hisa", 4)]


def test_a_layers_mode_that_cannot_run_ends_a_strict_server(tuned, monkeypatch):
    environ = tuned(strict=True, mode="misa", decode_mode="native", layers={"1": {"mode": "group_rerank", "group": 8}})
    stage = Stage(load_settings(None, environ), environ)
    monkeypatch.setattr("sglang_ext.stage.Counters.prepare_device", lambda _self, device: None)
    refuse = {"group_rerank": "group=8, kernels are built for (2, 4)"}
    monkeypatch.setattr("sglang_ext.support.gpu_refusal", lambda mode, q, params: refuse.get(mode))
    monkeypatch.setattr("sglang_ext.support.Support.compile", lambda *args: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **kw: empty(*a, **kw))
    with pytest.raises(RuntimeError, match=r"strict.*'group_rerank': group=8"):
        start(stage, {}, device="cuda")
