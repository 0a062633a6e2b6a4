"""Decoding step by step against the pass over the whole sequence, and what the study counts."""

import json
from pathlib import Path

import pytest
import torch

import study_decode
from small_dsa.architecture import ModelShape, SmallDsa
from small_dsa.decode_pass import IndexRow, decode_pass, read_context
from small_dsa.serving_pass import serving_pass

LENGTH, FIRST = 90, 70
SMALL_MODEL = Path(__file__).resolve().parent.parent / "data" / "small_dsa"


def tiny_model(top_k: int) -> SmallDsa:
    torch.manual_seed(1)
    shape = ModelShape(
        40, num_layers=2, hidden_size=64, intermediate_size=64, num_heads=2, index_heads=4, index_top_k=top_k
    )
    return SmallDsa(shape).eval()


def native(top_k: int):
    return lambda row: row.scores.topk(min(top_k, len(row.scores))).indices


@pytest.mark.parametrize("top_k", [LENGTH, 40])
@torch.no_grad()
def test_steps_say_what_the_whole_pass_says(top_k):
    model, tokens = tiny_model(top_k), torch.randint(40, (LENGTH,), generator=torch.Generator().manual_seed(2))
    caches = read_context(model, tokens[:FIRST])
    middle, longer = decode_pass(model, caches, tokens[FIRST:80], native(top_k))
    last, _ = decode_pass(model, longer, tokens[80:], native(top_k))
    whole = serving_pass(model, tokens, lambda layer, inputs: None, LENGTH - FIRST)
    got = torch.cat([middle, last])
    if top_k == LENGTH:
        torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)
    else:  # the whole pass rounds the scores it chooses by: neighbouring ranks change places
        unread, _ = decode_pass(model, caches, tokens[FIRST:], lambda row: torch.tensor([0]))
        assert (got - whole).norm() < 0.2 * (unread - whole).norm()


def index_row(length: int = 5000, heads: int = 8) -> IndexRow:
    random = torch.Generator().manual_seed(4)
    q, w = torch.randn(heads, 128, generator=random), torch.randn(heads, generator=random)
    keys = torch.randn(length, 128, generator=random)
    scores = torch.relu(q @ keys.T).mul(w[:, None]).sum(0)
    return IndexRow(0, q, w, keys, scores)


def test_blocks_are_those_of_the_best_mean():
    row = index_row()
    got = study_decode.blocks(128, 1024)(row)
    means = row.keys[: 39 * 128].view(39, 128, 128).mean(1)
    scores = torch.relu(row.q @ means.T).mul(row.w[:, None]).sum(0)
    assert set((got // 128).tolist()) == set(scores.topk(8).indices.tolist())
    assert len(set(got.tolist())) == 1024


def test_signs_rank_keys_that_are_signs_as_native_does():
    row = index_row()
    keys = row.keys.sign() * (torch.rand(5000, 1) + 0.5)
    row = row._replace(keys=keys, scores=torch.relu(row.q @ keys.T).mul(row.w[:, None]).sum(0))
    wanted = set(row.scores.topk(300).indices.tolist())
    assert len(set(study_decode.signs(300)(row).tolist()) & wanted) >= 299
    few = set(study_decode.signs(300, study_decode.by_means(2))(row).tolist())
    assert 20 < len(few & wanted) < 290, "two heads of eight see something else"


def test_a_choice_reads_the_best_of_its_candidates_and_says_what_it_missed():
    row, found = index_row(), study_decode.Found()
    chosen = study_decode.chooser(found, lambda row: torch.arange(1000, 3500))(row)
    allowed = {*range(64), *range(1000, 3500), *range(4872, 5000)}
    kept = sorted(allowed, key=lambda token: -float(row.scores[token]))[:2048]
    assert set(chosen.tolist()) == set(kept)
    best = row.scores.topk(2048).indices.tolist()
    ((share, of_best),) = found.shares[0]
    assert share == pytest.approx(len(set(kept) & set(best)) / 2048)
    assert of_best == pytest.approx(len(set(kept) & set(best[:8])) / 8)


def test_few_candidates_are_all_that_is_read():
    chosen = study_decode.chooser(study_decode.Found(), lambda row: torch.tensor([2000]))(index_row())
    assert set(chosen.tolist()) == {*range(64), 2000, *range(4872, 5000)}


def test_the_record(tmp_path, monkeypatch):
    names = ("blocks 128, 8192", "signs, 8192")
    monkeypatch.setattr(study_decode, "CHOICES", {name: study_decode.CHOICES[name] for name in names})
    out = tmp_path / "study.json"
    flags = ["--model", str(SMALL_MODEL), "--length", "700", "--questions", "2", "--json", str(out)]
    assert study_decode.main(flags) == 0
    record = json.loads(out.read_text())
    assert record["run"]["command"] and record["bytes"] == {"blocks 128, 8192": 2, "signs, 8192": 18}
    found = record["tasks"]["niah_multikey_2"]
    assert set(found) == {"native", *names}
    for entry in found.values():  # the budget holds every token
        assert entry["answers"] == entry["questions"] == 2 and entry["right"] == entry["tokens"] > 2
    assert found["signs, 8192"]["layers"]["2"] == {"recall": 1.0, "best": 1.0}
