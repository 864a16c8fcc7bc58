"""The bundled model has retrieval heads, and its recall hangs on them."""

import pytest

from heedful import zoo
from heedful.interp import HeadScores, needle_recall, recall_without_heads, retrieval_scores

SMALL = {"lengths": (384,), "depths": (0.2, 0.5, 0.8), "instances": 2}


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return zoo.load("classics-20m")


@pytest.fixture(scope="module")
def scores(model_and_tokenizer) -> HeadScores:
    return retrieval_scores(*model_and_tokenizer, variant="teacher-forced", **SMALL)


def test_few_heads_retrieve(scores):
    assert scores.pass_rate >= 0.8
    assert scores.top(1)[0][2] > 0.6
    assert 1 <= len(scores.retrieval_heads()) <= 15
    assert (scores.scores == 0).float().mean() > 0.5


def test_the_decode_variant_agrees(model_and_tokenizer, scores):
    decode = retrieval_scores(*model_and_tokenizer, **SMALL)
    assert decode.attempted == scores.attempted == 6
    assert (decode.scores - scores.scores).abs().max() < 0.05


def test_recall_hangs_on_them_and_not_on_random_heads(model_and_tokenizer, scores):
    count = len(scores.retrieval_heads())
    result = recall_without_heads(
        *model_and_tokenizer, scores, counts=(count,), draws=3, variant="teacher-forced", **SMALL
    )
    assert result.recall >= 0.8
    assert result.without_retrieval_heads[count] <= 0.2
    assert result.random_median[count] >= 0.8


def test_the_default_haystack_is_the_excerpt(model_and_tokenizer):
    assert needle_recall(*model_and_tokenizer, lengths=(256,), depths=(0.5,), instances=2).recall >= 0.5
