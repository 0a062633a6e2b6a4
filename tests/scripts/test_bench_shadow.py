"""The cost of shadow sampling: what is compared, and runs that prove nothing."""

import json

import pytest

import bench_shadow


class Prefiller:
    """A server whose clock advances as it answers; `sampled` forwards a prompt are shadowed."""

    def __init__(self, clock: list[float], rate: float, seconds: float, sampled: int = 1, runs: int = 1) -> None:
        self.clock, self.seconds, self.sampled, self.runs = clock, seconds, sampled, runs
        self.settings = {"shadow_rate": rate, "shadow_rows": 32, "active_heads": 8}
        self.mode = "hisa"
        self.calls: list[str] = []
        self.prompts: list[tuple[int, ...]] = []

    def flush(self) -> None:
        self.calls.append("flush")

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        assert tokens == 1
        self.calls.append("generate")
        self.prompts.append(tuple(ids[:4]))
        self.clock[0] += self.seconds if self.calls.count("flush") > 1 else 100.0  # the first turn is slow
        return [7]

    def status(self) -> dict:
        done = len(self.prompts)
        shadow = {"forwards": {"prefill/sampled": done * self.sampled, "prefill/short": done}}
        return {
            "settings": self.settings,
            "modes": {"prefill": self.mode},
            "device_runs": {"prefill/hisa": done * self.runs},
            **({"shadow": shadow} if self.settings["shadow_rate"] else {}),
        }


@pytest.fixture
def servers(monkeypatch):
    clock = [0.0]
    known = {"http://off": Prefiller(clock, 0.0, 1.0), "http://on": Prefiller(clock, 0.01, 1.01)}
    monkeypatch.setattr(bench_shadow, "Client", known.__getitem__)
    monkeypatch.setattr(bench_shadow.time, "perf_counter", lambda: clock[0])
    return known


def run(tmp_path, *flags: str) -> int:
    command = ["--off", "http://off", "--on", "http://on", "--out", str(tmp_path / "out.json")]
    return bench_shadow.main([*command, "--context", "64", "--prompts", "3", "--concurrency", "1", *flags])


def test_the_cost_of_all_measurements(servers, tmp_path, capsys):
    assert run(tmp_path, "--repeats", "4") == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["cost"] == pytest.approx(1 - 1 / 1.01) and record["failures"] == []
    assert record["seconds"]["off"] == pytest.approx([3.0] * 4), "the slow first turn is not counted"
    assert record["device_runs"] == {"off": 12, "on": 12}
    assert record["shadow_forwards"] == {"prefill/sampled": 12, "prefill/short": 12}
    assert "cost in all 0.99 %; 12 forwards sampled" in capsys.readouterr().out


def test_both_get_the_same_fresh_prompts(servers, tmp_path):
    run(tmp_path, "--repeats", "2")
    off, on = servers["http://off"], servers["http://on"]
    assert off.prompts == on.prompts and len(set(off.prompts)) == 9
    assert on.calls == ["flush", "generate", "generate", "generate"] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampled": 0}, "no forward was sampled"),
        ({"runs": 0}, "--on: hisa did not run on the device"),
        ({"seconds": 1.02}, "it costs 1.96 % of the throughput, more than 1.50 %"),
    ],
)
def test_runs_that_fail(servers, tmp_path, capsys, change, said):
    for name, value in change.items():
        setattr(servers["http://on"], name, value)
    assert run(tmp_path) == 1
    assert said in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["failures"]) == 1


@pytest.mark.parametrize(
    ("url", "change", "said"),
    [
        ("http://off", {"shadow_rate": 0.5}, "shadow_rate is 0.5 at --off and 0.01 at --on"),
        ("http://on", {"shadow_rate": 0.0}, "shadow_rate is 0.0 at --off and 0.0 at --on"),
        ("http://on", {"active_heads": 4}, "differ in active_heads too"),
    ],
)
def test_servers_that_cannot_be_compared(servers, tmp_path, capsys, url, change, said):
    servers[url].settings |= change
    assert run(tmp_path) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("modes", "said"), [(("native", "native"), "is native"), (("hisa", "misa"), "prefill mode too")]
)
def test_modes_that_cannot_be_compared(servers, tmp_path, capsys, modes, said):
    servers["http://off"].mode, servers["http://on"].mode = modes
    assert run(tmp_path) == 2
    assert said in capsys.readouterr().err


def test_shadow_settings_may_differ(servers, tmp_path):
    servers["http://on"].settings["shadow_rows"] = 64
    assert run(tmp_path) == 0
