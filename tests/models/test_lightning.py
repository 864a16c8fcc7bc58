"""The language model of lightning attention under transformers: generation, padding, packing, saving, training."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from heedful.models import LightningConfig, LightningForCausalLM

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LightningForCausalLM(LightningConfig(**SIZES)).double().eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 61, (2, 23), generator=torch.Generator().manual_seed(0))


def test_generates_as_its_full_forward_says(model, ids):
    full = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert len(full[0, 23:].unique()) > 2
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), full)
    with torch.no_grad():
        whole = model(full, use_cache=False).logits
        cache, parts = None, []
        for part in full.split([5, 1, 20, 5], 1):
            outputs = model(part, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            parts.append(outputs.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
    assert cache.get_seq_length() == 31


def test_padding_on_either_side_changes_nothing(model, ids):
    want = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 23:]
    ones, zeros = torch.ones_like(ids), torch.zeros(2, 5, dtype=torch.long)
    left = model.generate(
        torch.cat([zeros, ids], 1), attention_mask=torch.cat([zeros, ones], 1), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(left[:, 28:], want)
    # On the right: the state waits at the last real token.
    with torch.no_grad():
        mask = torch.cat([ones, zeros], 1)
        cache = model(torch.cat([ids, zeros], 1), attention_mask=mask, use_cache=True).past_key_values
        token, tokens = want[:, :1], [want[:, :1]]
        for _ in range(5):
            mask = torch.cat([mask, ones[:, :1]], 1)
            token = model(token, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(token)
    assert torch.equal(torch.cat(tokens, 1), want)


def test_beams_and_samples(model, ids):
    beams = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    assert torch.equal(beams, model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=False))
    torch.manual_seed(0)
    sampled = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (4, 28)


def test_packed_documents(model, ids):
    with torch.no_grad():
        alone = torch.cat([model(ids[:, :9]).logits, model(ids[:, 9:]).logits], 1)
        positions = torch.cat([torch.arange(9), torch.arange(14)]).expand(2, -1)
        for mask in (None, torch.ones_like(ids)):
            got = model(ids, position_ids=positions, attention_mask=mask).logits
            assert torch.allclose(got, alone, atol=1e-10)
        flat = ids.view(1, -1)
        ends = torch.tensor([0, 9, 23, 32, 46], dtype=torch.int32)
        packed = model(flat, cu_seq_lens_q=ends).logits
        assert torch.allclose(packed.view_as(alone), alone, atol=1e-10)
        # Positions that go on are one document.
        assert torch.equal(model(ids, position_ids=torch.arange(23)[None]).logits, model(ids).logits)
    with pytest.raises(ValueError, match="packed"):
        model(ids, position_ids=positions, use_cache=True)


def test_saved_and_loaded(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "heedful_lightning"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float64
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for mine, theirs in zip(half.model.layers, model.model.layers, strict=True):
        assert torch.equal(mine.self_attn.decay, theirs.self_attn.decay)
        assert mine.self_attn.decay.dtype == torch.float32
    assert half.lm_head.weight is half.model.embed_tokens.weight


def test_gradient_checkpointing_and_compile(model, ids):
    plain = copy.deepcopy(model).train()
    plain(ids, labels=ids).loss.backward()
    saving = copy.deepcopy(model).train()
    saving.gradient_checkpointing_enable()
    saving(ids, labels=ids).loss.backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_trains_under_the_trainer(tmp_path):
    torch.manual_seed(0)
    model = LightningForCausalLM(LightningConfig(**SIZES))
    row = torch.arange(1, 41) % 7 + 1
    data = [{"input_ids": row, "labels": row}] * 16
    before = model(row[None], labels=row[None]).loss.item()
    arguments = TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    assert model.eval()(row[None], labels=row[None]).loss.item() < before / 2


def test_nothing_gives_nothing(model):
    for shape in ((0, 5), (2, 0)):
        assert model(torch.zeros(shape, dtype=torch.long)).logits.shape == (*shape, 61)


def test_wrong_use_is_refused(model, ids):
    with pytest.raises(ValueError, match="padding mask"):
        model(ids, attention_mask=torch.ones(2, 1, 23, 23))
    with pytest.raises(ValueError, match="LightningCacheLayer"):
        model(ids, past_key_values=DynamicCache(config=LightningConfig(**SIZES)))
    with pytest.raises(ValueError, match="input_ids"):
        model()
