"""LongBench's metrics against values computed by hand."""

import pytest

from longbench_metrics import (
    METRICS,
    classification,
    code_similarity,
    common_subsequence,
    count,
    qa_f1,
    retrieval,
    rouge_l,
    sample_score,
)


@pytest.mark.parametrize(
    "prediction,reference,value",
    [
        ("The cat sat.", "a cat sat", 1.0),  # articles, case and marks do not count
        ("black cat", "cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat", "cat", 2 / 3),  # a word counts as often as the reference has it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_qa_f1(prediction, reference, value):
    assert qa_f1(prediction, reference) == pytest.approx(value)


def test_rouge_l():
    assert common_subsequence("abcd", "axcdy") == 3
    # subsequence "the sat" or "the mat": 3 of 4 and 3 of 5 words
    assert rouge_l("the cat was sat", "The cat sat down now") == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert rouge_l("", "a") == rouge_l("b", "a") == 0.0


def test_classification():
    classes = ["Food", "Fast Food", "City"]
    assert classification("City", "City", classes) == 1.0
    assert classification("City or Food", "City", classes) == 0.5
    assert classification("Fast Food", "Fast Food", classes) == 1.0  # "Food" is a part of the right class
    assert classification("Fast Food", "Food", classes) == 0.5
    assert classification("none", "Food", classes) == 0.0


def test_retrieval_and_count():
    assert retrieval("Paragraph 7", "Paragraph 7") == 1.0
    assert retrieval("7 or 8", "Paragraph 7") == 0.5
    assert retrieval("17", "Paragraph 7") == retrieval("none", "Paragraph 7") == 0.0
    assert count("There are 5, no, 6", "5") == 0.5
    with pytest.raises(ValueError, match="must contain 'Paragraph N', got '7'"):
        retrieval("7", "7")


def test_code_similarity():
    assert code_similarity("\n# a note\nreturn x\nmore", "return x") == 1.0
    assert code_similarity("abcd", "abxd") == pytest.approx(2 * 3 / 8)
    assert code_similarity("# only a note", "return") == 0.0


def test_sample_score_takes_the_best_answer_and_the_first_line_of_examples():
    assert sample_score("hotpotqa", "Rome", ["Paris", "Rome"], None) == 1.0
    assert sample_score("trec", "\nCity\nFood", ["City"], ["City", "Food"]) == 1.0
    assert sample_score("triviaqa", "Rome\nQuestion: next", ["Rome"], None) == 1.0
    with pytest.raises(ValueError, match="dataset must be one of .*'dureader'"):
        sample_score("dureader", "", [], None)
    assert len(METRICS) == 16
