import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.interp import HeadScores


def scores_of(*rows):
    return HeadScores(torch.tensor([[list(row)] for row in rows]), attempted=len(rows) + 1)


def test_mean_frequency_and_pass_rate_leave_out_what_was_not_measured():
    nan = math.nan
    scores = scores_of((1.0, 0.0, nan, nan), (0.5, 0.0, 0.2, nan))
    assert torch.equal(scores.scores[0, :3], torch.tensor([0.75, 0.0, 0.2]))
    assert torch.equal(scores.activation_frequency[0, :3], torch.tensor([1.0, 0.0, 1.0]))
    assert scores.scores[0, 3].isnan()
    assert scores.activation_frequency[0, 3].isnan()
    assert scores.pass_rate == pytest.approx(2 / 3)


def test_top_breaks_ties_by_layer_and_head_and_skips_nan():
    per_instance = torch.tensor([[[0.2, 0.9, math.nan], [0.2, 0.05, 0.9]]])
    scores = HeadScores(per_instance)
    assert [(layer, head) for layer, head, _ in scores.top(None)] == [(0, 1), (1, 2), (0, 0), (1, 0), (1, 1)]
    assert [row[:2] for row in scores.retrieval_heads()] == [(0, 1), (1, 2), (0, 0), (1, 0)]
    assert [row[:2] for row in scores.retrieval_heads(0.5)] == [(0, 1), (1, 2)]
    assert scores.top(0) == []


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 10))
def test_random_heads_are_never_retrieval_heads_and_depend_on_the_seed_alone(seed, k):
    scores = HeadScores(torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(3)) ** 3)
    drawn = scores.random_heads(k, seed=seed)
    assert drawn == scores.random_heads(k, seed=seed)
    assert len({row[:2] for row in drawn}) == k
    assert not {row[:2] for row in drawn} & {row[:2] for row in scores.retrieval_heads()}
    assert scores.random_heads(k + 1, seed=seed)[:k] == drawn  # a smaller control is part of a larger one


def test_random_heads_say_when_too_few_are_left():
    with pytest.raises(ValueError, match="cannot draw 2 of 1"):
        scores_of((1.0, 0.0)).random_heads(2)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_json_round_trip_in_the_form_of_the_field(instances, layers, heads, seed):
    per_instance = torch.rand(instances, layers, heads, generator=torch.Generator().manual_seed(seed))
    per_instance[per_instance < 0.2] = math.nan
    text = HeadScores(per_instance).to_json()
    form = json.loads(text)  # strict JSON: nan is null
    assert "NaN" not in text
    assert set(form) == {f"{layer}-{head}" for layer in range(layers) for head in range(heads)}
    assert all(len(column) == instances for column in form.values())
    for source in (text, form):
        again = HeadScores.from_json(source).per_instance
        assert torch.equal(again.nan_to_num(-1), per_instance.nan_to_num(-1))


def test_json_files(tmp_path):
    path = tmp_path / "scores.json"
    scores_of((1.0, 0.25)).to_json(path)
    assert json.loads(path.read_text()) == {"0-0": [1.0], "0-1": [0.25]}
    assert HeadScores.from_json(path).top(1) == [(0, 0, 1.0)]
    assert HeadScores.from_json(str(path)).attempted is None
    sparse = HeadScores.from_json({"3-1": [0.5, 0.7]})
    assert sparse.per_instance.shape == (2, 4, 2)
    assert [row[:2] for row in sparse.top(None)] == [(3, 1)]


@pytest.mark.parametrize("form", [{"a": [1.0]}, {"0-0": [1.0], "0-1": []}, {"0": [1.0]}, {"0-0": 1.0}, {}])
def test_json_of_another_form_is_refused(form):
    with pytest.raises(ValueError, match="layer-head"):
        HeadScores.from_json(form)


def test_text_and_picture():
    scores = HeadScores(torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)), attempted=4)
    assert "3 of 4 instances passed" in str(scores)
    assert len(scores.table(3).splitlines()) == 4
    figure = scores.plot(label_top=2)
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert labels == [f"{layer}.{head}" for layer, head, _ in scores.top(2)]
    nothing = HeadScores(torch.empty(0, 2, 2), attempted=3)
    assert "nothing was measured" in str(nothing)
    assert nothing.top() == []
    nothing.plot()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="instances, layers, heads"):
        HeadScores(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="attempted"):
        HeadScores(torch.zeros(2, 2, 2), attempted=1)
