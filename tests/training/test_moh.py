"""Continued training as Mixture-of-Head: it learns, goes on after a kill, is the same on two processes, and loads."""

import json

import pytest
import torch
import transformers
from processes import run_on_two
from tiny_models import Letters, build

from heedful.training import train_moh

SMALL = {"steps": 4, "batch_size": 4, "length": 16, "progress": False}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It was the best of times, it was the worst of times. " * 60)
    return file


def log_of(out):
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_loads(text, tmp_path):
    out = train_moh(
        build("llama"), Letters(), text, tmp_path / "out", **SMALL | {"steps": 60}, lr=3e-3, shared_ratio=0.25
    )
    log = log_of(out)
    assert log[-1]["next_token"] < 0.7 * log[0]["next_token"]
    assert 2 <= log[-1]["balance"] <= 3  # two of three routed heads
    assert log[-1]["tokens"] == 60 * 4 * 16
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.moh == {"active_ratio": 0.75, "shared_ratio": 0.25, "attention": "sdpa"}
    assert loaded.config._attn_implementation == "moh"
    assert not (out / "training" / "checkpoint.pt").exists()


def test_distillation_begins_at_the_model_as_it_was(text, tmp_path):
    model = build("llama")
    with torch.no_grad():  # no head adds anything: the conversion changes nothing
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    out = train_moh(model, Letters(), text, tmp_path / "out", **SMALL | {"steps": 1}, distillation=1.0)
    assert abs(log_of(out)[0]["divergence"]) < 1e-5
    out = train_moh(build("llama"), Letters(), text, tmp_path / "other", **SMALL | {"steps": 1}, distillation=1.0)
    first = log_of(out)[0]
    assert first["divergence"] > 0.01
    assert first["loss"] == pytest.approx(first["next_token"] + 0.01 * first["balance"] + first["divergence"], rel=1e-5)


def test_goes_on_after_a_kill(text, tmp_path):
    whole = train_moh(build("llama"), Letters(), text, tmp_path / "whole", **SMALL)
    for stop in (2, None):
        part = train_moh(build("llama"), Letters(), text, tmp_path / "part", **SMALL, stop_after=stop)
    assert log_of(part)[-1]["loss"] == log_of(whole)[-1]["loss"]
    a, b = (
        torch.cat([p.flatten() for p in transformers.AutoModelForCausalLM.from_pretrained(f).parameters()])
        for f in (whole, part)
    )
    assert torch.equal(a, b)
    train_moh(build("llama"), Letters(), text, tmp_path / "other", **SMALL, stop_after=1)
    with pytest.raises(ValueError, match="is of a run with"):
        train_moh(build("llama"), Letters(), text, tmp_path / "other", **SMALL, active_ratio=0.5)


def test_batches_by_step(tmp_path):
    batches = [torch.randint(3, 90, (2, 9)) for _ in range(3)]
    out = train_moh(build("llama"), Letters(), batches, tmp_path / "out", steps=3, batch_size=2, progress=False)
    assert log_of(out)[-1]["tokens"] == 3 * 2 * 8
    with pytest.raises(ValueError, match="batches for 3 steps"):
        train_moh(build("llama"), Letters(), batches, tmp_path / "out", steps=4, batch_size=2)


def test_wrong_use_is_refused(text, tmp_path):
    for options, message in (
        ({"active_ratio": 1.0}, "keeps every head"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"length": 100_000}, "too few"),
    ):
        with pytest.raises(ValueError, match=message):
            train_moh(build("llama"), Letters(), text, tmp_path / "out", **SMALL | options)
    with pytest.raises(ValueError, match="no training text"):
        train_moh(build("llama"), Letters(), tmp_path / "none.txt", tmp_path / "out", **SMALL)


def test_two_processes_have_the_loss_of_one(text, tmp_path):
    """But for the balance loss, which is of the rows of a process."""
    alone = train_moh(build("llama"), Letters(), text, tmp_path / "alone", **SMALL, seed=3, balance=0.0)
    run_on_two(
        f"""
        from tiny_models import Letters, build
        from heedful.training import train_moh
        options = {SMALL | {"seed": 3, "balance": 0.0}!r}
        train_moh(build("llama"), Letters(), {str(text)!r}, {str(tmp_path / "two")!r}, **options)
        """,
        tmp_path,
    )
    for one, two in zip(log_of(alone), log_of(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["tokens"] == one["tokens"]
