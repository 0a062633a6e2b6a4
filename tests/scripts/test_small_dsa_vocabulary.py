"""The small model's tokenizer: nothing is lost, words are tokens, digits come in threes."""

import re

import pytest

pytest.importorskip("tokenizers", reason="tokenizers (it comes with SGLang) is not installed")

from retrieval_tasks import QA_TASKS, TASKS, answer_text, make_case
from retrieval_tasks.words import ADJECTIVES, NOUNS
from small_dsa.examples import tokenizer
from small_dsa.vocabulary import BOS, SPECIAL, save_tokenizer, words

GENERATED = tuple(task for task in TASKS if task not in QA_TASKS)
ODD_TEXTS = (
    "",
    " ",
    "   ",
    " lead",
    "trail ",
    "two  blanks   three",
    "\n\n\t\tx\r\ny\n",
    "no break\u00a0space, zero\u200bwidth",
    "h\u00e9llo w\u00f6rld, \u65e5\u672c\u8a9e, \U0001f600 and a\u0301",
    "don't \u2014 \u201cquote\u201d \u2026",
    "\x00\x01\x7f",
    "<0x41> <bo s> </s>",
    "0001 12 1234567 3.14 v2b",
    "CamelCase snake_case UPPER",
)


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def pieces_of(text: str) -> list[str]:
    return [tokenizer().decode([token], skip_special_tokens=False) for token in ids_of(text)]


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("task", GENERATED)
def test_prompts_come_back(task, split):
    case = make_case(task, 1200, lambda text: len(text) // 4, 3, split)
    text = case.prompt() + answer_text(case.questions[0])
    assert tokenizer().decode(ids_of(text)) == text
    # Training encodes context, question and answer apart: a server sees the same tokens of the joined text.
    question, answer = case.questions[0].text, answer_text(case.questions[0])
    assert ids_of(text) == ids_of(case.context) + ids_of(question) + ids_of(answer)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_comes_back(text):
    assert tokenizer().decode(ids_of(text), skip_special_tokens=False) == text
    assert SPECIAL.index("<unk>") not in ids_of(text)


def test_a_prompt_begins_with_bos_once():
    ids = tokenizer().encode("The road is long.").ids
    assert ids[0] == SPECIAL.index(BOS) == 0 and ids[1:] == ids_of("The road is long.")
    assert all(tokenizer().token_to_id(name) == number for number, name in enumerate(SPECIAL))


def test_every_word_is_one_token():
    split = [word for word in words() if len(ids_of(word)) != 1]
    assert not split and len(words()) > 1500
    assert {" " + word for word in (*ADJECTIVES, *NOUNS)} | set(NOUNS) <= set(words())
    for adjective, noun in zip(ADJECTIVES, NOUNS):
        assert pieces_of(f" {adjective}-{noun}.") == [" " + adjective, "-", noun, "."]


def test_digits_come_in_groups_of_at_most_three():
    for number in ("7", "42", "007", "2869743", "123456789012"):
        pieces = pieces_of(number)
        assert pieces == re.findall(r"\d{1,3}", number)
    assert len({ids_of(f"{number:0{digits}d}")[0] for digits in (1, 2, 3) for number in range(10**digits)}) == 1110
    assert pieces_of(" 2869743.") == [" ", "286", "974", "3", "."]


def test_pieces_are_distinct():
    vocabulary = tokenizer().get_vocab()
    assert sorted(vocabulary.values()) == list(range(tokenizer().get_vocab_size()))


def test_saved_tokenizer_is_the_one_that_trained(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path)
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ODD_TEXTS:
        assert loaded(text)["input_ids"] == tokenizer().encode(text).ids
        assert loaded.decode(ids_of(text)) == text
    names = (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id)
    assert names == tuple(range(len(SPECIAL)))
