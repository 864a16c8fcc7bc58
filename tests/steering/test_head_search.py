"""search_heads: many heads in one forward give what one head after the other gives; resumable; saved with its rule."""

import json
import math

import pytest
import tiny_models
import torch

import heedful
from heedful.steering import AttentionCalibration, HeadSet, mean_score, search_heads

RULE = {"alpha": 1.5, "beta": 0.2}


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama", num_hidden_layers=4, dtype=torch.float64)


@pytest.fixture(scope="module")
def dataset():
    g = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(5, 80, (n,), generator=g).tolist(), "answer": n, "rows": [0, -1] if n % 2 else [-1]}
        for n in (12, 20, 7, 15, 18, 5)
    ]


def scorer(logits, example):
    assert logits.shape == (len(example["rows"]), tiny_models.VOCABULARY)
    assert logits.dtype == torch.float32
    return float(logits[-1].log_softmax(-1)[example["answer"]])


def test_batched_search_equals_one_head_at_a_time(model, dataset):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = search_heads(model, dataset, scorer, batch_size=4, task="test", **RULE)
    handle.remove()
    assert (found.shape, found.examples, found.task) == ((4, 4), 6, "test")
    assert set(found.scores) == {(2, head) for head in range(4)}, "all layers but the first two and the last"
    assert len(calls) <= 2 + math.ceil(4 * 4 / 4) + math.ceil(2 * 4 / 4)
    assert found.baseline == pytest.approx(mean_score(model, dataset, scorer), abs=1e-5)
    for pair, score in found.scores.items():
        with heedful.attach(model, AttentionCalibration(heads=[pair], **RULE)):
            alone = sum(scorer(one_by_one(model, example), example) for example in dataset) / 6
        assert score == pytest.approx(alone, abs=1e-5)
    gains = {pair: score - found.baseline for pair, score in found.scores.items()}
    assert any(abs(gain) > 1e-3 for gain in gains.values())
    kept = [pair for pair, gain in gains.items() if gain > 0]
    assert sorted(found) == sorted(kept)
    assert len(found) == int(found.mask().sum()) == len(kept)
    assert found.heads == sorted(kept, key=lambda pair: -gains[pair])
    assert found.gains()[2].isfinite().all()
    assert found.gains()[[0, 1, 3]].isnan().all()


def one_by_one(model, example):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
    return logits[example["rows"]].float()


def test_the_set_is_saved_with_its_rule(model, dataset, tmp_path):
    found = search_heads(model, dataset, scorer, heads=[(1, 0), (2, 3), (3, 1)], task="t", exempt_first=2, **RULE)
    found.save(tmp_path / "heads.json")
    again = HeadSet.load(tmp_path / "heads.json")
    assert again == found
    record = json.loads((tmp_path / "heads.json").read_text())
    assert record["heads"] == [list(pair) for pair in found.heads]
    assert set(record["scores"]) == {"1-0", "2-3", "3-1"}
    assert (record["beta"], record["alpha"], record["exempt_first"], record["task"]) == (0.2, 1.5, 2, "t")
    edit = again.calibration(beta=0.5)
    assert (edit.beta, edit.alpha, edit.exempt_first) == (0.5, 1.5, 2)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"other\.json is not a head set"):
        HeadSet.load(tmp_path / "other.json")


def test_a_search_that_was_interrupted_goes_on(model, dataset, tmp_path):
    whole = search_heads(model, dataset, scorer, batch_size=2, **RULE)
    path, seen = tmp_path / "progress.json", []

    def stop(done, total):
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_heads(model, dataset, scorer, batch_size=2, checkpoint=path, progress=stop, **RULE)
    scored = []

    def count(logits, example):
        scored.append(example["answer"])
        return scorer(logits, example)

    resumed = search_heads(model, dataset, count, batch_size=2, checkpoint=path, **RULE)
    assert seen == [(2, 6), (4, 6)]
    assert set(scored) == {18, 5}
    assert resumed.scores == pytest.approx(whole.scores)
    assert resumed.baseline == pytest.approx(whole.baseline)
    with pytest.raises(ValueError, match="another search"):
        search_heads(model, dataset, scorer, checkpoint=path, alpha=2.0)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a checkpoint"):
        search_heads(model, dataset, scorer, checkpoint=path, **RULE)


def test_no_head_helps_a_scorer_that_does_not_care(model, dataset):
    found = search_heads(model, dataset, lambda logits, example: 1.0, **RULE)
    assert found.baseline == 1.0
    assert len(found) == 0
    ids = torch.tensor([dataset[0]["input_ids"]])
    with torch.no_grad(), heedful.attach(model, found.calibration()):
        edited = model(ids).logits
    assert torch.equal(edited, model(ids).logits)


def test_bad_input_is_refused_before_any_forward(model, dataset):
    model_that_must_not_run = model
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    try:
        for wrong, message in (
            ({"heads": [(4, 0)]}, "below"),
            ({"heads": []}, "none"),
            ({"batch_size": 0}, "batch_size"),
        ):
            with pytest.raises(ValueError, match=message):
                search_heads(model_that_must_not_run, dataset, scorer, **wrong)
        with pytest.raises(ValueError, match="empty"):
            search_heads(model, [], scorer)
        with pytest.raises(ValueError, match="example 1 needs input_ids"):
            search_heads(model, [dataset[0], {"input_ids": []}], scorer)
        with pytest.raises(ValueError, match="empty"):
            mean_score(model, [], scorer)
    finally:
        handle.remove()
