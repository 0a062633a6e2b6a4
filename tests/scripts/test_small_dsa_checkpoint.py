"""The trained checkpoint that the repository carries: it answers, its indexers find what its attention reads."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers (it comes with SGLang) is not installed")
pytest.importorskip("safetensors", reason="safetensors (it comes with SGLang) is not installed")

from tokenizers import Tokenizer

from small_dsa.architecture import SmallDsa
from small_dsa.examples import ANSWER_WEIGHT, task_example, tokenizer
from small_dsa.export import load_exported
from small_dsa.passes import dense_pass, indexer_coverage
from small_dsa.vocabulary import EOS, SPECIAL

CHECKPOINT = Path(__file__).resolve().parents[1] / "data" / "small_dsa"
SEQUENCES = 4


@pytest.fixture(scope="module")
def model():
    return load_exported(CHECKPOINT)


def answers_right(model: SmallDsa, task: str, length: int, seed: int) -> list[bool]:
    """By teacher forcing, for each answer of a sequence: every token of it, <eos> too, is the most likely one."""
    example = task_example(task, length, seed, "eval", 2)
    tokens, answer = example.tokens, (example.weight == ANSWER_WEIGHT).nonzero()[:, 0]
    best = model.logits(dense_pass(model, tokens[None])[0, answer - 1]).argmax(-1)
    right, current = [], True
    for place, guess in zip(answer.tolist(), best.tolist()):
        current &= guess == int(tokens[place])
        if int(tokens[place]) == SPECIAL.index(EOS):
            right.append(current)
            current = True
    return right


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_2"])
@torch.no_grad()
def test_it_answers_what_it_was_never_trained_on(model, task):
    right = [hit for seed in range(SEQUENCES) for hit in answers_right(model, task, 2048, seed)]
    assert len(right) >= 5 * SEQUENCES  # several questions a sequence
    assert sum(right) >= 0.9 * len(right), f"{sum(right)} of {len(right)} answers"


@torch.no_grad()
def test_indexers_keep_what_attention_reads(model):
    """Rows that see more than index_topk tokens; on others every indexer keeps all."""
    example = task_example("niah_multikey_2", 4096, 0, "eval", 32)
    rows = torch.cat([example.rows[:16], torch.linspace(3072, 4000, 16).long()])
    assert int(rows.min()) > 3000
    shares = indexer_coverage(model, example.tokens[None], rows[None])
    assert len(shares) == 3 and min(shares) >= 0.85, shares


def test_shape_is_deepseeks_where_the_kernels_care(model):
    shape = model.shape
    assert (shape.index_heads, shape.index_top_k, shape.num_layers) == (64, 2048, 3)
    assert shape.vocab_size % 64 == 0 and shape.vocab_size >= tokenizer().get_vocab_size()


def test_its_tokenizer_is_still_the_generated_one():
    """A word list or a wording that changes renumbers the tokens: then the checkpoint must be trained again."""
    stored = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert stored.get_vocab() == tokenizer().get_vocab()
    text = "The secret number of amber-falcon is 2869743.\n\u00e9 <bos>"
    assert stored.encode(text).ids == tokenizer().encode(text).ids
