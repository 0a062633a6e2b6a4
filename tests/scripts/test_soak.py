"""The soak against a fake server: what traffic it sends, and each thing that must fail it."""

import json
import socket
import time
from typing import Any

import pytest

import openai_client
import soak
import soak_traffic
from tests.scripts.fake_server import FakeServer


class SoakServer(FakeServer):
    """Answers /generate and counts statistics. mismatch_at: the request that finds one; short: tokens it leaves out."""

    def __init__(self, mismatch_at: int | None = None, short: int = 0, check: bool = True, ran: bool = True) -> None:
        super().__init__(lambda prompt: "x")
        self.mismatch_at, self.short, self.check, self.ran = mismatch_at, short, check, ran
        self.checked = self.mismatches = self.decoded = 0
        self.refused: list[str] = []
        self.busy, self.prefill, self.shadow_errors = False, "native", 0
        self.cached, self.retractions, self.ends_early = 3, 1, False
        self.reserved = [1000]  # MiB, one status after the other, the last for ever
        self.kept = 0  # MiB that an answer leaves allocated
        self.bodies: list[dict[str, Any]] = []

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/flush_cache" and self.busy:
            self.calls.append(path)
            return 400, "busy"
        if path != "/generate":
            return super().reply(path, body)
        with self._lock:
            self.bodies.append(body)
            if self.fail_after is not None and len(self.bodies) > self.fail_after:
                return 500, {"error": "out of order"}
            self.checked += 10 * self.check
            self.mismatches += len(self.bodies) == self.mismatch_at
            self.decoded += self.ran
        new = body["sampling_params"]["max_new_tokens"] - self.short
        ended = self.ends_early and not body["sampling_params"]["ignore_eos"] and new > 1
        new -= ended
        if body.get("stream"):
            return 200, (f"data: {token}\n\n" for token in self.slowly(new))
        meta = {
            "cached_tokens": self.cached, "num_retractions": self.retractions,
            "finish_reason": {"type": "stop" if ended else "length"},
        }  # fmt: skip
        return 200, {"output_ids": [7] * new, "meta_info": meta}

    def slowly(self, new: int) -> Any:
        for token in range(new):
            time.sleep(0.002)
            yield token

    def _status(self) -> dict[str, Any]:
        return {
            **super()._status(),
            "modes": {"prefill": self.prefill, "decode": "hisa"},
            "shadow": {"forwards": {"prefill/sampled": 3, "prefill/error": self.shadow_errors * len(self.bodies)}},
            "device_runs": {"decode/hisa": 5 + self.decoded},
            "integrity_checked": 100 + self.checked,
            "integrity_mismatches": 4 + self.mismatches,
            "refused": self.refused,
            "reserved_mib": self.reserved.pop(0) if len(self.reserved) > 1 else self.reserved[0],
            "allocated_mib": 900 + self.kept * len(self.bodies),
        }


@pytest.fixture(autouse=True)
def memory(monkeypatch) -> list[int]:
    """What nvidia-smi says, one after the other, the last for ever."""
    said = [1000]
    monkeypatch.setattr(soak, "used_memory_mib", lambda: said.pop(0) if len(said) > 1 else said[0])
    monkeypatch.setattr(soak, "SAMPLE_EVERY_S", 0.02)
    return said


def run(server: SoakServer, tmp_path: Any, *flags: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "soak.json"
    small = ["--seconds", "0.4", "--concurrency", "4", "--max-tokens", "300", "--max-new-tokens", "20", *flags]
    with server:
        code = soak.main(["--url", server.url, "--out", str(out), *small])
    return code, json.loads(out.read_text())


def test_traffic_of_every_kind(tmp_path, capsys):
    server = SoakServer()
    code, record = run(server, tmp_path)
    assert code == 0 and record["failures"] == []
    totals = record["runs"][0]["totals"]
    assert set(totals["requests"]) == {"fresh", "turn", "cancel"} and sum(totals["requests"].values()) > 20
    assert totals["requests"]["cancel"] == sum(bool(body.get("stream")) for body in server.bodies)
    answered = totals["requests"]["fresh"] + totals["requests"]["turn"]
    assert totals["cached_tokens"] == 3 * answered and totals["retractions"] == answered
    lengths = [len(body["input_ids"]) for body in server.bodies]
    assert max(lengths) == totals["longest_prompt"] <= 300 and min(lengths) < 5 and max(lengths) > 100
    assert all(2 <= token < 4000 for body in server.bodies for token in body["input_ids"])
    endless = {body["sampling_params"]["ignore_eos"] for body in server.bodies}
    assert endless == {True, False}, "SGLang reserves room for all tokens of the one kind only"
    assert record["runs"][0]["run"]["command"] and "nothing broke" in capsys.readouterr().out


@pytest.mark.parametrize(("share", "seen"), [("0", {False}), ("1", {True})])
def test_the_share_of_answers_that_ignore_their_end(tmp_path, share, seen):
    server = SoakServer()
    _, record = run(server, tmp_path, "--endless-share", share)
    assert {body["sampling_params"]["ignore_eos"] for body in server.bodies} == seen
    assert record["runs"][0]["endless_share"] == float(share)


def test_answers_that_may_end_do(tmp_path):
    server = SoakServer()
    server.ends_early = True
    code, record = run(server, tmp_path)
    assert code == 0 and record["runs"][0]["totals"]["errors"] == 0
    asked = [(body["sampling_params"], body.get("stream", False)) for body in server.bodies]
    ended = [1 for one, given_up in asked if not given_up and not one["ignore_eos"] and one["max_new_tokens"] > 1]
    all_tokens = sum(one["max_new_tokens"] for one, _ in asked)
    assert ended and record["runs"][0]["totals"]["new_tokens"] == all_tokens - len(ended)


def test_a_conversation_goes_on_with_its_answer(tmp_path):
    server = SoakServer()
    run(server, tmp_path)
    prompts = [body["input_ids"] for body in server.bodies if not body.get("stream")]
    asked = {tuple(ids) for ids in prompts}
    continued = [ids for ids in prompts if any(tuple(ids[:n]) in asked and ids[n] == 7 for n in range(1, len(ids)))]
    assert len(continued) > 2


def test_runs_add_up(tmp_path):
    run(SoakServer(), tmp_path)
    code, record = run(SoakServer(), tmp_path, "--seed", "1")
    first, second = record["runs"]
    assert code == 0 and record["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.11)
    assert first["totals"]["prompt_tokens"] != second["totals"]["prompt_tokens"]
    # a later run that is well does not make an earlier failure good
    run(SoakServer(mismatch_at=2), tmp_path)
    assert run(SoakServer(), tmp_path)[0] == 1


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (SoakServer(mismatch_at=3), "1 block statistics were not those of the keys"),
        (SoakServer(check=False), "no block statistic was compared"),
        (SoakServer(short=1), "requests failed, as"),
        (SoakServer(ran=False), "decode mode hisa did not run"),
    ],
)
def test_what_fails(tmp_path, capsys, server, said):
    code, record = run(server, tmp_path)
    assert code == 1 and any(said in failure for failure in record["failures"])
    assert said in capsys.readouterr().out


def test_a_request_that_stays_in_the_server_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "IDLE_LIMIT_S", 0.3)
    server = SoakServer()
    server.busy = True
    assert any("a request was left in the server" in failure for failure in run(server, tmp_path)[1]["failures"])
    assert server.calls.count("/flush_cache") > 1


def test_a_refused_mode_fails(tmp_path):
    server = SoakServer()
    server.refused = ["decode: no kernel"]
    assert "SGLang's own indexer served: decode: no kernel" in run(server, tmp_path)[1]["failures"]


def test_a_prefill_mode_that_did_not_run_fails(tmp_path):
    server = SoakServer()
    server.prefill = "misa_rerank"
    assert run(server, tmp_path)[1]["failures"] == ["prefill mode misa_rerank did not run"]


def test_an_error_of_shadow_sampling_fails(tmp_path):
    server = SoakServer()
    server.shadow_errors = 1
    assert any("shadow sampling met an error" in failure for failure in run(server, tmp_path)[1]["failures"])


def test_a_server_that_breaks_down_is_not_asked_for_ever(tmp_path, monkeypatch):
    server = SoakServer()
    server.fail_after = 5
    monkeypatch.setattr(soak_traffic, "GIVE_UP_AFTER", 8)
    code, record = run(server, tmp_path, "--seconds", "60")
    assert code == 1 and 8 <= record["runs"][0]["totals"]["errors"] < 20
    assert "out of order" in " ".join(record["runs"][0]["totals"]["first_errors"])


def test_a_server_that_is_gone_at_the_end_is_in_the_record(tmp_path, monkeypatch, capsys):
    """Else a record of several runs would show only those that went well."""

    def gone(client):
        raise ConnectionError("no server: the connection was refused")

    monkeypatch.setattr(soak, "becomes_idle", gone)
    code, record = run(SoakServer(), tmp_path)
    assert code == 1 and record["failures"] == ["the server is gone: no server: the connection was refused"]
    assert record["runs"][0]["after"] is None and record["runs"][0]["totals"]["requests"]
    assert record["runs"][0]["kept_mib"] is None
    assert "the server is gone" in capsys.readouterr().out


def test_a_run_that_cannot_begin_leaves_no_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(openai_client, "FIRST_PAUSE_S", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert soak.main(["--url", url, "--out", str(tmp_path / "soak.json"), "--seconds", "1"]) == 2
    assert "no server at" in capsys.readouterr().err and not (tmp_path / "soak.json").exists()


def test_a_server_without_the_plugin_is_refused(tmp_path, capsys):
    with FakeServer(str, plugin=False) as server:
        assert soak.main(["--url", server.url, "--out", str(tmp_path / "soak.json"), "--seconds", "1"]) == 2
    assert "runs without the plugin" in capsys.readouterr().err


def test_a_server_with_an_older_plugin_is_refused(tmp_path, capsys):
    with FakeServer(str) as server:
        assert soak.main(["--url", server.url, "--out", str(tmp_path / "soak.json"), "--seconds", "1"]) == 2
    assert "that server's plugin is of another version" in capsys.readouterr().err


def test_memory_that_grows(tmp_path, memory):
    memory[:] = range(1000, 9000, 100)
    _, record = run(SoakServer(), tmp_path)
    assert record["runs"][0]["memory_growth_mib"] > 512
    assert any("memory grew" in failure for failure in record["failures"])


def test_memory_is_not_judged_where_others_come_and_go(tmp_path, memory):
    memory[:] = range(1000, 9000, 100)
    code, record = run(SoakServer(), tmp_path, "--no-memory")
    assert code == 0 and record["runs"][0]["memory_mib"] and record["runs"][0]["memory_growth_mib"] is None


def test_memory_that_grows_in_the_server_alone(tmp_path):
    server = SoakServer()
    server.reserved = [*range(1000, 9000, 100)]
    _, record = run(server, tmp_path, "--no-memory")
    assert record["runs"][0]["reserved_growth_mib"] > 512
    assert len(record["failures"]) == 1 and "torch's memory in the server grew" in record["failures"][0]


def test_memory_that_answers_leave_allocated(tmp_path, capsys):
    server = SoakServer()
    server.kept = 50
    code, record = run(server, tmp_path)
    grown = 50 * len(server.bodies)
    [failure] = record["failures"]
    assert code == 1 and failure == f"{grown} MiB more are allocated in the idle server than before, over 128"
    assert f"{grown} allocated when idle" in capsys.readouterr().out
    (fresh := tmp_path / "fresh").mkdir()
    assert run(server, fresh, "--kept-slack-mib", "999999")[0] == 0


def test_what_a_run_has_to_meet(tmp_path, capsys):
    (well := tmp_path / "well").mkdir()
    assert run(SoakServer(), well, "--must-retract", "--must-reuse", "0.001")[0] == 0
    server = SoakServer()
    server.cached = server.retractions = 0
    code, record = run(server, tmp_path, "--must-retract", "--must-reuse", "0.001")
    assert code == 1 and len(record["failures"]) == 2
    shown = capsys.readouterr().out
    assert "no request was retracted" in shown and "SGLANG_TEST_RETRACT=1" in shown
    assert "0 of" in shown and "less than 0.001 of them" in shown


@pytest.mark.parametrize(
    ("used", "growth"),
    [([], None), ([5], None), ([5, 9], 4), ([9, 5, 5, 5], -4), ([1, 5, 5, 8, 5, 5, 5, 9], 1), ([1, 9, 9, 9], 0)],
)
def test_growth_is_what_comes_after_the_first_half(used, growth):
    assert soak.growth_mib([(float(i), mib) for i, mib in enumerate(used)]) == growth


def test_without_a_gpu_beside_it(tmp_path, monkeypatch):
    (fresh := tmp_path / "fresh").mkdir()
    monkeypatch.setattr(soak, "used_memory_mib", lambda: None)
    assert any("memory was not measured" in failure for failure in run(SoakServer(), tmp_path)[1]["failures"])
    assert run(SoakServer(), fresh, "--no-memory")[0] == 0


def test_without_the_integrity_check(tmp_path):
    assert run(SoakServer(check=False), tmp_path, "--no-integrity")[0] == 0


def test_an_answer_as_long_as_the_context_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        soak.main(["--out", str(tmp_path / "o"), "--max-tokens", "20", "--max-new-tokens", "20"])
    assert "--max-new-tokens 20 must be in 1 .. 19" in capsys.readouterr().err


def test_a_share_is_from_0_to_1(tmp_path, capsys):
    with pytest.raises(SystemExit):
        soak.main(["--out", str(tmp_path / "o"), "--endless-share", "1.5"])
    assert "--endless-share 1.5 must be from 0 to 1" in capsys.readouterr().err


def test_nvidia_smi(monkeypatch):
    monkeypatch.undo()
    assert soak.used_memory_mib() is None or soak.used_memory_mib() > 0
