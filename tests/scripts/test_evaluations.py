"""The evaluation scripts against a fake server: scores, resuming, refusals, and modes that did not run."""

import json

import pytest

import eval_longbench
import eval_niah
import eval_ruler
import openai_client
from eval_loop import ResultsFile
from openai_client import Client, LocalTokenizer
from retrieval_tasks import NEW_TOKENS, QA_TASKS, TASKS, answer_text, make_case
from tests.scripts.fake_server import FakeServer, WordTokenizer

LENGTH = 1400
GENERATED = [task for task in TASKS if task not in QA_TASKS]


@pytest.fixture(autouse=True)
def words_are_tokens(monkeypatch):
    for module in (eval_ruler, eval_niah, eval_longbench):
        monkeypatch.setattr(module, "LocalTokenizer", WordTokenizer)


def knows_needles(prompt: str) -> str:
    """The right answer to a prompt that asks for one needle."""
    lead = prompt.split("\nAnswer: ")[1]
    return " " + prompt.split(lead + " ")[1].split(".")[0]


def ruler(server: FakeServer, out, *flags: str) -> int:
    return eval_ruler.main(["--url", server.url, "--tokenizer", "none", "--out", str(out), *flags])


SMALL = ("--tasks", "niah_single_1", "niah_multikey_2", "--lengths", str(LENGTH), "--samples", "3")


def test_right_answers_score_100_and_wrong_ones_0(tmp_path, capsys):
    cases = [make_case(task, LENGTH - NEW_TOKENS[task], WordTokenizer("").count, seed)
             for task in GENERATED for seed in range(2)]  # fmt: skip
    ideal = {case.prompt(): answer_text(case.questions[0]) for case in cases}
    flags = ["--lengths", str(LENGTH), "--samples", "2", "--modes", "native", "hisa"]
    for answer, score in ((ideal.__getitem__, 100), (lambda prompt: "no idea", 0)):
        with FakeServer(answer) as server:
            assert ruler(server, tmp_path / str(score), *flags) == 0
        record = json.loads((tmp_path / str(score) / "ruler.json").read_text())
        assert {cell["mode"] for cell in record["cells"]} == {"native", "hisa"}
        assert len(record["cells"]) == 2 * len(GENERATED)
        assert all(cell["score"] == score and cell["samples"] == 2 for cell in record["cells"])
        assert set(record["skipped"]) == set(QA_TASKS) and "command" in record["run"]
        runs = [entry["after"]["device_runs"].get(f"prefill/{entry['mode']}", 0) for entry in record["counters"]]
        assert runs == [2 * len(GENERATED)] * 2
        assert f"{score}.0" in capsys.readouterr().out.splitlines()[-1]


def test_greedy_requests_after_a_switch_and_a_flush(tmp_path):
    with FakeServer(knows_needles) as server:
        assert ruler(server, tmp_path, *SMALL, "--modes", "misa", "native") == 0
    assert [mode for mode, _ in server.requests] == ["misa"] * 6 + ["native"] * 6
    assert all(body["temperature"] == 0 and body["max_tokens"] == 128 for _, body in server.requests)
    assert all(body["model"] == "tiny" for _, body in server.requests)
    for mode in ("misa", "native"):
        after = server.calls[server.calls.index(f"switch {mode}") :]
        assert after.index("/flush_cache") < after.index("/v1/completions")


def test_a_rerun_asks_only_what_is_missing(tmp_path):
    with FakeServer(knows_needles) as server:
        server.fail_after = 4
        assert ruler(server, tmp_path, *SMALL, "--modes", "hisa", "--concurrency", "1") == 1
        assert len(server.requests) == 4
        server.fail_after = None
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"mode": "hisa", "key": "torn')  # as a killed run leaves it
        assert ruler(server, tmp_path, *SMALL, "--modes", "hisa") == 0
        assert len(server.requests) == 6
        assert ruler(server, tmp_path, *SMALL, "--modes", "hisa") == 0
        assert len(server.requests) == 6
        assert ruler(server, tmp_path, *SMALL, "--modes", "hisa", "native") == 0
        assert len(server.requests) == 12
    asked = [body["prompt"] for mode, body in server.requests if mode == "hisa"]
    assert len(set(asked)) == 6
    record = json.loads((tmp_path / "ruler.json").read_text())
    assert all(cell["score"] == 100 and cell["samples"] == 3 for cell in record["cells"])


def test_results_of_other_settings_are_refused(tmp_path, capsys, monkeypatch):
    with FakeServer(knows_needles) as server:
        assert ruler(server, tmp_path, *SMALL) == 0
        assert ruler(server, tmp_path, *SMALL, "--seed", "7") == 2
        assert "seed was 0, now 7" in capsys.readouterr().out
        monkeypatch.setenv("COMMIT", "c0ffee")
        assert ruler(server, tmp_path, *SMALL) == 2
    assert "now 'c0ffee'" in capsys.readouterr().out, "samples of two commits would be one record"


def test_a_mode_that_did_not_run_fails(tmp_path, capsys):
    with FakeServer(knows_needles, stuck=("hisa",)) as server:
        for _ in range(2):  # a rerun must not take its samples for finished
            assert ruler(server, tmp_path, *SMALL, "--modes", "native", "hisa") == 1
            assert "mode hisa did not run: device_runs of prefill/hisa stayed at 0" in capsys.readouterr().out
        assert not (tmp_path / "ruler.json").exists()
        assert [mode for mode, _ in server.requests].count("native") == 6


def test_modes_need_a_server_that_can_switch(tmp_path, capsys):
    with FakeServer(knows_needles, plugin=False) as server:
        assert ruler(server, tmp_path / "plain", *SMALL, "--modes", "hisa") == 2
        assert "runs without the plugin" in capsys.readouterr().out
        assert ruler(server, tmp_path / "plain", *SMALL) == 0
    with FakeServer(knows_needles, switchable=False) as server:
        assert ruler(server, tmp_path / "fixed", *SMALL, "--modes", "hisa") == 2
        assert "SGLANG_EXT_RUNTIME_SWITCH=1" in capsys.readouterr().out
        server.mode = "misa"
        assert ruler(server, tmp_path / "fixed", *SMALL) == 0
    record = json.loads((tmp_path / "fixed" / "ruler.json").read_text())
    assert {cell["mode"] for cell in record["cells"]} == {"misa"}
    with FakeServer(knows_needles) as server:
        assert ruler(server, tmp_path / "odd", *SMALL, "--modes", "odd") == 2
    assert "can switch to native, misa" in capsys.readouterr().out


def test_bad_flags(tmp_path, capsys):
    with FakeServer(knows_needles) as server:
        assert ruler(server, tmp_path, *SMALL[:-1], "0") == 2
        assert "--samples must be at least 1, got 0" in capsys.readouterr().out
        assert ruler(server, tmp_path, "--qa-file", "vt=x") == 2
        assert "--qa-file must be TASK=FILE" in capsys.readouterr().out


def test_no_server(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(openai_client, "FIRST_PAUSE_S", 0.001)
    with FakeServer(knows_needles) as server:
        pass
    assert ruler(server, tmp_path, *SMALL) == 1
    assert f"no server at {server.url}: the connection was refused 5 times" in capsys.readouterr().out


def test_niah_heatmap(tmp_path):
    pytest.importorskip("matplotlib")
    with FakeServer(lambda prompt: knows_needles(prompt) if len(prompt) < 6000 else "?") as server:
        flags = ["--modes", "native", "misa", "--lengths", "800", "3000", "--depths", "0", "50", "--samples", "2"]
        assert eval_niah.main(["--url", server.url, "--tokenizer", "none", "--out", str(tmp_path), *flags]) == 0
    cells = json.loads((tmp_path / "niah.json").read_text())["cells"]
    assert eval_niah.grid(cells, "misa", [800, 3000, 9], [0, 50]) == [[100, 0, None], [100, 0, None]]
    assert (tmp_path / "niah.png").read_bytes().startswith(b"\x89PNG")


def write_longbench(folder) -> None:
    folder.mkdir()
    sample = {"context": "x " * 5000, "input": "Where {is} it?", "answers": ["Rome"], "all_classes": None, "length": 1,
              "dataset": "hotpotqa", "language": "en", "_id": "a"}  # fmt: skip
    (folder / "hotpotqa.jsonl").write_text(json.dumps(sample) + "\n" + json.dumps({**sample, "answers": ["Bari"]}))
    (folder / "dureader.jsonl").write_text(json.dumps(sample))


def longbench(server: FakeServer, out, *flags: str) -> int:
    return eval_longbench.main(["--url", server.url, "--tokenizer", "none", "--out", str(out), *flags])


def test_longbench(tmp_path, capsys):
    write_longbench(tmp_path / "data")
    with FakeServer(lambda prompt: " Rome") as server:
        assert longbench(server, tmp_path, "--data", str(tmp_path / "data"), "--modes", "native", "hisa") == 0
    record = json.loads((tmp_path / "longbench.json").read_text())
    assert [(cell["mode"], cell["cell"], cell["score"]) for cell in record["cells"]] == [
        ("native", "hotpotqa", 50),
        ("hisa", "hotpotqa", 50),
    ]
    assert list(record["skipped"]) == ["dureader"] and record["settings"]["max_length"] == 4096
    for _, body in server.requests:  # cut in the middle: the question stays
        assert len(body["prompt"].split(" ")) <= 4096 - 32 and "Where {is} it?" in body["prompt"]
    assert "dureader is skipped: Chinese" in capsys.readouterr().out


def test_longbench_names_what_is_missing(tmp_path, capsys):
    with FakeServer(lambda prompt: "") as server:
        assert longbench(server, tmp_path, "--data", str(tmp_path / "none")) == 2
        assert "is no folder" in capsys.readouterr().out
        write_longbench(tmp_path / "data")
        assert longbench(server, tmp_path, "--data", str(tmp_path / "data"), "--datasets", "trec") == 2
        assert "has no trec.jsonl" in capsys.readouterr().out
        assert longbench(server, tmp_path, "--data", str(tmp_path / "data"), "--datasets", "odd") == 2
        assert "--datasets must be of" in capsys.readouterr().out
        (tmp_path / "data" / "trec.jsonl").write_text('{"input": ""}\n')
        assert longbench(server, tmp_path, "--data", str(tmp_path / "data"), "--datasets", "trec") == 2
        assert "line 1 lacks context, answers, all_classes, _id" in capsys.readouterr().out


def test_prompts_metrics_and_new_tokens_cover_the_same_datasets():
    assert set(eval_longbench.PROMPTS) == set(eval_longbench.NEW_TOKENS) == set(eval_longbench.METRICS)


def test_results_file_keeps_whole_lines_only(tmp_path):
    path = tmp_path / "samples.jsonl"
    ResultsFile(path, {"a": 1}).add_sample({"mode": "m", "key": "k", "cell": "c", "score": 1.0})
    path.write_text(path.read_text() + '{"mode"')
    again = ResultsFile(path, {"a": 1})
    again.add_sample({"mode": "m", "key": "l", "cell": "c", "score": 0.0})
    assert set(ResultsFile(path, {"a": 1}).samples) == {("m", "k"), ("m", "l")}
    with pytest.raises(ValueError, match="b was None, now 2"):
        ResultsFile(path, {"a": 1, "b": 2})


def test_client_url_and_stop():
    with FakeServer(lambda prompt: "x") as server:
        client = Client(server.url + "/v1/")
        assert client.complete("a b", 4, stop=["\n"]).prompt_tokens == 2
        assert client.max_model_len() == 4096
    assert server.requests[0][1]["stop"] == ["\n"]


def test_local_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from tiny_model import write_model

    write_model(tmp_path, layers=1, heads=16)
    tokenizer = LocalTokenizer(str(tmp_path))
    assert tokenizer.count("abc de") == 6
    assert tokenizer.cut_middle("abcdefghij", 4) == "abij"
    assert tokenizer.cut_middle("abcd", 4) == "abcd"
