"""Decode rates: what is asked, what is subtracted, and servers that do not decode as they are named."""

import json

import pytest

import bench_decode_rate


class Decoder:
    """A server that steps its counter as it answers. room: prompts that its cache holds; waves: of a batch."""

    def __init__(self, mode: str, counts: bool = True, room: int = 99, waves: int = 1) -> None:
        self.mode, self.counts, self.url = mode, counts, f"http://{mode}"
        self.room, self.waves, self.cached = room, waves, set[int]()
        self.runs, self.runs_as = 0, "native" if mode == "auto" else mode
        self.asked: list[tuple[int, int]] = []

    def call(self, path: str, body: dict) -> dict:
        ids, tokens = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        self.asked.append((len(ids), tokens))
        if ids[0] == bench_decode_rate.prompts_of(1, 1)[0][0] and self.counts:  # once per batch
            self.runs += self.waves * (tokens - 1)
        cached = len(ids) - 1 if ids[0] in self.cached else 0
        if len(self.cached) < self.room:
            self.cached.add(ids[0])
        return {"output_ids": [1] * tokens, "meta_info": {"cached_tokens": cached}}

    def status(self) -> dict:
        forwards = [
            {"phase": "prefill", "mode": "native", "reason": "configured_native", "forwards": 9},
            {"phase": "decode", "mode": self.runs_as, "reason": "below_break_even", "forwards": 5},
        ]
        ran = {} if self.mode == "auto" else {f"decode/{self.mode}": self.runs}
        return {"modes": {"decode": self.mode}, "device_runs": ran, "forwards": forwards}


@pytest.fixture
def decoders(monkeypatch):
    known = {"http://a": Decoder("native"), "http://b": Decoder("hisa"), "http://c": Decoder("hisa", counts=False)}
    known |= {"http://d": Decoder("auto"), "http://e": Decoder("hisa", room=2), "http://f": Decoder("hisa", waves=2)}
    monkeypatch.setattr(bench_decode_rate, "Client", known.__getitem__)
    asked = bench_decode_rate.seconds_of

    def seconds_of(server, prompts, tokens, cached=True):
        """A start of 20 s and a second a token; native takes two."""
        asked(server, prompts, tokens, cached)
        return 20.0 + tokens * (2 if server.mode == "native" else 1)

    monkeypatch.setattr(bench_decode_rate, "seconds_of", seconds_of)
    return known


def run(monkeypatch, tmp_path, *arguments: str) -> int:
    command = [
        "bench_decode_rate.py",
        "--out",
        str(tmp_path / "out.json"),
        "--batch",
        "3",
        "--context",
        "80",
        *arguments,
    ]
    monkeypatch.setattr("sys.argv", command)
    return bench_decode_rate.main()


def test_the_start_is_subtracted(decoders, monkeypatch, tmp_path, capsys):
    options = ["--tokens", "80", "--repeats", "1", "--url", "native=http://a", "hisa=http://b"]
    assert run(monkeypatch, tmp_path, *options) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["medians"] == {"native": 1.5, "hisa": 3.0}, "60 tokens of 3 requests in 120 and in 60 s"
    assert sorted(decoders["http://b"].asked) == [(80, 1)] * 3 + [(80, 20)] * 3 + [(80, 80)] * 3
    assert "hisa: 3 tokens/s, 1000.00 ms a step, 2.00x native" in capsys.readouterr().out


def test_prompts_differ_from_their_first_tokens_on():
    prompts = bench_decode_rate.prompts_of(32, 8)
    assert len({tuple(ids[:2]) for ids in prompts}) == 32 and prompts == bench_decode_rate.prompts_of(32, 8)
    assert all(len(set(ids)) > 4 for ids in prompts), "keys that are all alike leave nothing to choose"


def test_a_mode_that_did_not_run_fails(decoders, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, "--tokens", "8", "--url", "native=http://a", "hisa=http://c") == 1
    assert "hisa: 0 runs on the device for" in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_auto_may_decode_natively(decoders, monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "--tokens", "8", "--url", "native=http://a", "auto=http://d") == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["forwards"]["auto"] == {"native (below_break_even)": 5}


@pytest.mark.parametrize(
    ("url", "said"),
    [("hisa=http://e", "80 tokens of a prompt were not in the prefix cache"), ("hisa=http://f", "not decoded at once")],
)
def test_a_batch_that_did_not_fit_fails(decoders, monkeypatch, tmp_path, capsys, url, said):
    assert run(monkeypatch, tmp_path, "--tokens", "80", "--url", url) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("urls", [["hisa=http://a"], ["http://a"], ["native=http://a", "native=http://a"]])
def test_servers_must_decode_as_they_are_named(urls, decoders, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, "--url", *urls) == 1
    assert "--url" in capsys.readouterr().err


def test_prepare_asks_for_one_token(decoders, monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "--prepare", "--url", "hisa=http://b") == 0
    assert decoders["http://b"].asked == [(80, 1)] * 3 and not (tmp_path / "out.json").exists()
