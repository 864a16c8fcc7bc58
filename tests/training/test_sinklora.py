"""The recipe of SinkLoRA: interpolated positions, what is trained, folders that load, runs that go on."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_on_two
from tiny_models import Letters, build
from transformers import AutoModelForCausalLM

import heedful
from heedful.kernels import ShiftedSparseAttention
from heedful.training import extend_context, train_sinklora
from heedful.training.sinklora import adapt

SMALL = {
    "steps": 3, "batch_size": 2, "length": 40, "factor": 2.0, "lr": 1e-2, "warmup_steps": 1, "progress": False, "group_size_ratio": 0.3,
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It was the best of times, it was the worst of times. " * 60)
    return file


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "training" / "log.jsonl").read_text().splitlines()]


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_interpolated_positions_are_the_positions_divided(family):
    ids = torch.randint(5, 80, (1, 24), generator=torch.Generator().manual_seed(0))
    plain, extended = build(family), extend_context(build(family), 4)
    assert extended.config.max_position_embeddings == 4 * plain.config.max_position_embeddings
    assert not torch.allclose(logits(plain, ids), logits(extended, ids), atol=1e-3)
    rotary, old = extended.model.rotary_emb, plain.model.rotary_emb
    hidden, positions = torch.zeros(1, 24, 32), torch.arange(24)[None]
    for a, b in zip(rotary(hidden, positions), old(hidden, positions / 4), strict=True):
        torch.testing.assert_close(a, b)


def test_an_extended_model_survives_its_folder(tmp_path):
    model = extend_context(extend_context(build("llama"), 2), 3)
    assert model.config.rope_parameters["factor"] == 6.0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5, 30)[None]
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    gemma = extend_context(build("gemma3_text"), 2)
    assert gemma.config.rope_parameters["full_attention"]["factor"] == 2.0
    assert "factor" not in gemma.config.rope_parameters["sliding_attention"]
    for wrong, message in (
        (lambda: extend_context(model, 0.5), "at least 1"),
        (lambda: extend_context(build("gpt2"), 2), "rotary"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "yarn"}
    with pytest.raises(ValueError, match="yarn"):
        extend_context(model, 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_lora_norms_and_embeddings_are_trained_and_nothing_else(family):
    model = build(family)
    adapted = adapt(model)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("embed_tokens" in name for name in trained)
    assert any(".q_proj.lora_A" in name for name in trained)
    for name, _ in adapted.named_parameters():
        expected = "lora_" in name or "embed_tokens" in name or "norm" in name
        assert (name in trained) == expected, name
    with pytest.raises(ValueError, match="q_proj"):
        adapt(build("gpt2"))


def test_the_folder_holds_the_merged_tuned_model(text, tmp_path):
    model = build("llama", tie_word_embeddings=True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    ids = torch.randint(5, 80, (2, 40), generator=torch.Generator().manual_seed(1))
    start = logits(extend_context(build("llama", tie_word_embeddings=True), 2), ids)
    train_sinklora(model, Letters(), text, tmp_path / "out", **{**SMALL, "steps": 12})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    after = loaded.state_dict()
    assert set(after) == set(before)  # no adapter is left
    changed = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert changed == {n for n in before if "norm" in n or "embed" in n or "lm_head" in n or "self_attn" in n}
    assert loaded.config.tie_word_embeddings
    assert loaded.config.max_position_embeddings == 512
    assert not torch.allclose(logits(loaded, ids), start, atol=1e-2)
    # Merged: the given model, which had the adapter, and the folder are one function.
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=1e-5)
    curve = losses(tmp_path / "out")
    assert curve[-1] < curve[0] - 0.2


def test_a_killed_run_goes_on_as_if_nothing_had_happened(text, tmp_path):
    results = []
    for stop in (None, 2):
        out = tmp_path / f"{stop}"
        options = {**SMALL, "dropout": 0.1}
        if stop:
            train_sinklora(build("llama"), Letters(), text, out, **options, stop_after=stop)
            with pytest.raises(ValueError, match="another `out`"):
                train_sinklora(build("llama"), Letters(), text, out, **{**options, "steps": 5})
        train_sinklora(build("llama"), Letters(), text, out, **options)
        results.append(AutoModelForCausalLM.from_pretrained(out).state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-6, rtol=1e-5)


def test_micro_batches_and_checkpointing_change_nothing(text, tmp_path):
    curves = []
    for name, more in (("a", {}), ("b", {"micro_batch_size": 2}), ("c", {"gradient_checkpointing": True})):
        train_sinklora(build("llama"), Letters(), text, tmp_path / name, **SMALL, **more)
        curves.append(losses(tmp_path / name))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0] == pytest.approx(curves[2], abs=1e-5)


def test_training_reads_groups_and_full_attention_reads_all(text, tmp_path):
    rows, first = heedful.training.rows.PackedRows([text.read_text()], Letters(), 40, seed=0), {}
    batch = rows.batch(0, range(2))
    for name, more, parts in (
        ("full", {"group_size_ratio": 1.0}, []),
        ("groups", {}, [ShiftedSparseAttention(group_size_ratio=0.3)]),
        ("s2", {"shift_ratio": 0.5, "num_sink_tokens": 0, "boundary": "wrap"},
         [ShiftedSparseAttention(group_size_ratio=0.3, shift_ratio=0.5, num_sink_tokens=0, boundary="wrap")]),
    ):  # fmt: skip
        train_sinklora(build("llama"), Letters(), rows, tmp_path / name, **{**SMALL, "steps": 1, **more})
        model = extend_context(build("llama"), 2).train()
        with heedful.attach(model, *parts), torch.no_grad():
            want = model(input_ids=batch, labels=batch, use_cache=False).loss.item()
        first[name] = losses(tmp_path / name)[0]
        assert first[name] == pytest.approx(want, abs=1e-5)
    assert len({round(x, 4) for x in first.values()}) == 3


def test_wrong_arguments_are_one_clear_error(text, tmp_path):
    model = build("llama")
    for wrong, message in (
        ({"steps": 0}, "steps"), ({"batch_size": 3, "micro_batch_size": 2}, "multiple"), ({"length": 10**6}, "too few"),
        ({"shift_ratio": 2.0}, "shift_ratio"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train_sinklora(model, Letters(), text, tmp_path / "out", **{**SMALL, **wrong})
    with pytest.raises(ValueError, match="no training text"):
        train_sinklora(model, Letters(), tmp_path / "none.txt", tmp_path / "out", **SMALL)


def test_two_processes_have_the_losses_of_one(text, tmp_path):
    train_sinklora(build("llama"), Letters(), text, tmp_path / "one", **SMALL)
    run_on_two(
        f"""
        from tiny_models import Letters, build
        from heedful.training import train_sinklora
        train_sinklora(build("llama"), Letters(), {str(text)!r}, {str(tmp_path / "two")!r}, **{SMALL!r})
        """,
        tmp_path,
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
