"""Decode rates: what is asked, which tokens count, and servers that do not decode as they are named."""

import contextlib
import http.client
import json
import urllib.request
from collections.abc import Iterator

import pytest

import bench_decode_rate
import openai_client
from tests.scripts.bench_server import BenchServer


class Decoder:
    """A server that steps its counter as it answers. room: prompts that its cache holds; waves: of a batch, or how
    many times its steps it takes; short: by how many tokens its answers are.
    """

    def __init__(self, mode: str, counts: bool = True, room: int = 99, waves: float = 1, short: int = 0) -> None:
        self.mode, self.counts, self.url = mode, counts, f"http://{mode}"
        self.room, self.waves, self.cached = room, waves, set[int]()
        self.short = short
        self.runs, self.runs_as = 0, "native" if mode == "auto" else mode
        self.asked: list[tuple[int, int]] = []

    def stream(self, path: str, body: dict) -> Iterator[dict]:
        assert path == "/generate" and body["sampling_params"]["stream_interval"] == bench_decode_rate.EVERY
        ids, tokens = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        self.asked.append((len(ids), tokens))
        if ids[0] == bench_decode_rate.prompts_of(1, 1)[0][0] and self.counts:  # once per batch
            self.runs += round(self.waves * (tokens - 1))
        cached = len(ids) - 1 if ids[0] in self.cached else 0
        if len(self.cached) < self.room:
            self.cached.add(ids[0])
        for came in dict.fromkeys(
            [1, *range(1 + bench_decode_rate.EVERY, tokens - self.short, 16), tokens - self.short]
        ):
            yield {"meta_info": {"completion_tokens": came, "cached_tokens": cached}}

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
    known |= {"http://g": Decoder("hisa", short=1), "http://h": Decoder("hisa", waves=1.4)}
    monkeypatch.setattr(bench_decode_rate, "Client", known.__getitem__)
    answers_of = bench_decode_rate.answers_of
    rounds = iter(range(1000))

    def on_a_clock(server, prompts, tokens, cached=True):
        """Request i starts after 3 i seconds, and all of them the later the more rounds there were. Then it takes a
        second a token, native two; in a server's first round ten times that.
        """
        answers = answers_of(server, prompts, tokens, cached)
        second = 2 if server.mode == "native" else 1
        first = server.asked.count((len(prompts[0]), tokens)) == len(prompts)
        start = 20 * next(rounds)
        pace = second * (10 if first and tokens > 1 else 1)
        return [[(start + 3 * i + pace * n, n) for _, n in one] for i, one in enumerate(answers)]

    monkeypatch.setattr(bench_decode_rate, "answers_of", on_a_clock)
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


def test_a_start_that_takes_long_does_not_count(decoders, monkeypatch, tmp_path, capsys):
    options = ["--tokens", "80", "--repeats", "2", "--url", "native=http://a", "hisa=http://b"]
    assert run(monkeypatch, tmp_path, *options) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["tokens_per_s"] == {"native": [1.5, 1.5], "hisa": [3.0, 3.0]}, (
        "the first round took ten times as long"
    )
    assert record["medians"] == {"native": 1.5, "hisa": 3.0} and record["scatter"] == {"native": 0.0, "hisa": 0.0}
    assert decoders["http://b"].asked == [(80, 1)] * 3 + [(80, 80)] * 9
    said = capsys.readouterr().out
    assert "hisa: 3 tokens/s, 1000.00 ms a step, scatter 0 %, 2.00x native\n" in said


def test_only_tokens_count_that_come_while_all_are_answered():
    """Between the second's second chunk and the first's last."""
    first = [(0.0, 1), (1.6, 17), (10.0, 101)]
    second = [(3.0, 1), (4.6, 17), (13.0, 101)]
    assert bench_decode_rate.rate_of([first, second]) == pytest.approx(20.0)
    faster = [(3.0, 1), (4.0, 21), (5.0, 61), (10.0, 121)]
    assert bench_decode_rate.rate_of([first, faster]) == pytest.approx((60 + 100) / 6)


def test_a_prefill_that_holds_up_the_others_does_not_count():
    """Both decode a token a second from 10 s on; before, the first waited for the second's prefill."""
    steady = [(26.0, 17), (42.0, 33), (58.0, 49), (74.0, 65)]
    assert bench_decode_rate.rate_of([[(0.0, 1), *steady], [(10.0, 1), *steady]]) == pytest.approx(2.0)


@pytest.mark.parametrize(("start", "came"), [(4.0, 44), (11.0, 0)])
def test_requests_that_were_hardly_answered_at_once(start, came):
    answers = [[(at, 1), (at + 1.6, 17), (at + 10, 101)] for at in (0.0, start)]
    with pytest.raises(RuntimeError, match=rf"^{came} tokens of an answer .* fewer than 50: ask for more --tokens"):
        bench_decode_rate.rate_of(answers)


def test_an_answer_in_one_chunk_tells_nothing():
    with pytest.raises(RuntimeError, match="^0 tokens of an answer came"):
        bench_decode_rate.rate_of([[(5.0, 64)], [(0.0, 1), (1.0, 17), (9.0, 64)]])


def test_a_stream_is_read_as_it_comes_and_its_errors_are_said():
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}}
    with BenchServer(pause_s=0) as server:
        client = openai_client.Client(server.url)
        came = [chunk["meta_info"]["completion_tokens"] for chunk in client.stream("/generate", body)]
        assert came == [1, 2, 3]
        server.fail_after = 1
        with pytest.raises(ConnectionError, match="/generate answered 500 .*out of order"):
            list(client.stream("/generate", body))
    with pytest.raises(ConnectionError, match="/generate failed: "):
        list(client.stream("/generate", body))


@pytest.mark.parametrize("broken", [http.client.IncompleteRead(b""), ConnectionResetError(104, "reset by peer")])
def test_a_stream_that_breaks_off(monkeypatch, broken):
    @contextlib.contextmanager
    def urlopen(*_: object, **__: object) -> Iterator[Iterator[bytes]]:
        def lines() -> Iterator[bytes]:
            yield b'data: {"meta_info": {"completion_tokens": 1}}\n'
            raise broken

        yield lines()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    stream = openai_client.Client("http://h").stream("/generate", {})
    assert next(stream)["meta_info"]["completion_tokens"] == 1
    with pytest.raises(ConnectionError, match=f"http://h/generate failed: {type(broken).__name__}"):
        next(stream)


def test_a_difference_within_the_scatter_says_so():
    rates = {"native": [90.0, 100.0, 130.0], "hisa": [120.0, 140.0, 160.0], "auto": [200.0, 210.0, 220.0]}
    lines = [bench_decode_rate.summary(name, rates, 4) for name in rates]
    assert lines[0] == "native: 100 tokens/s, 40.00 ms a step, scatter 40 %"
    assert lines[1].endswith("scatter 29 %, 1.40x native, within the scatter")
    assert lines[2].endswith("scatter 10 %, 2.10x native")


def test_answers_that_are_cut_off_fail(decoders, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, "--tokens", "80", "--url", "hisa=http://g") == 1
    assert "answers of [0, 0, 0] tokens where 1 were asked" in capsys.readouterr().err


def test_prompts_differ_from_their_first_tokens_on():
    prompts = bench_decode_rate.prompts_of(32, 8)
    assert len({tuple(ids[:2]) for ids in prompts}) == 32 and prompts == bench_decode_rate.prompts_of(32, 8)
    assert all(len(set(ids)) > 4 for ids in prompts), "keys that are all alike leave nothing to choose"


def test_a_mode_that_did_not_run_fails(decoders, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, "--tokens", "64", "--url", "native=http://a", "hisa=http://c") == 1
    assert "hisa: 0 runs on the device for" in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_auto_may_decode_natively(decoders, monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "--tokens", "64", "--url", "native=http://a", "auto=http://d") == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["forwards"]["auto"] == {"native (below_break_even)": 5}


def test_a_start_as_late_as_the_window_allows_is_no_split_batch(decoders, monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "--tokens", "80", "--url", "hisa=http://h") == 0


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
