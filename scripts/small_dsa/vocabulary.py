"""The small model's tokenizer: a token a word of the tasks, up to three digits a token, letters and bytes besides."""

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from retrieval_tasks import QA_TASKS, TASKS, answer_text, make_case
from retrieval_tasks.words import ADJECTIVES, NOUNS

BLANK = "\u2581"  # stands for a blank, as in sentencepiece
BOS, EOS, PAD, UNKNOWN = "<bos>", "<eos>", "<pad>", "<unk>"
SPECIAL = (BOS, EOS, PAD, UNKNOWN)
WORD = re.compile(" ?[A-Za-z]+")
PIECES = f"{BLANK}?[A-Za-z]+|[0-9]{{1,3}}|."
WORD_SCORE, LETTER_SCORE = -1.0, -20.0  # a word wins against its letters
SAMPLE_CASES = 6  # contexts of each task whose words get a token


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Every word of the tasks' word lists and wording, with its blank where one stands before it."""
    listed = [" " + word for word in ADJECTIVES] + [form for word in NOUNS for form in (" " + word, word)]
    cases: Counter[str] = Counter()
    for task in TASKS:
        for seed in range(0 if task in QA_TASKS else SAMPLE_CASES):
            case = make_case(task, 1500, lambda text: len(text) // 4, seed, "train")
            text = case.context + "".join(question.text + answer_text(question) for question in case.questions)
            cases.update(set(WORD.findall(text)))
    # Coded words and names differ from case to case; parts of uuids are the letters a to f.
    wording = [word for word, count in cases.items() if count > 1 and not re.fullmatch(" ?[a-f]+|[A-Z]+", word)]
    return tuple(dict.fromkeys(listed + sorted(wording)))


def build_tokenizer() -> Tokenizer:
    """A Unigram model with fixed scores: text is cut into the longest known words, unknown characters into bytes."""
    pieces = [(name, 0.0) for name in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(word.replace(" ", BLANK), WORD_SCORE) for word in words() if len(word) > 1]
    pieces += [(f"{number:0{digits}d}", WORD_SCORE) for digits in (1, 2, 3) for number in range(10**digits)]
    letters = [chr(code) for code in (*range(32, 127), 10) if not chr(code).isdigit() and chr(code) != " "]
    pieces += [(form, LETTER_SCORE) for letter in letters for form in (letter, BLANK + letter) if letter != "\n"]
    pieces += [(BLANK, LETTER_SCORE), ("\n", LETTER_SCORE)]
    distinct = list(dict(reversed(pieces)).items())[::-1]
    tokenizer = Tokenizer(models.Unigram(distinct, SPECIAL.index(UNKNOWN), True))
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{PIECES}|\n"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Replace(BLANK, " "), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def save_tokenizer(out: Path) -> None:
    """tokenizer.json and its configuration in the Hugging Face layout."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
