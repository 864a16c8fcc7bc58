"""HiPAttention in real (tiny, random) models: exact where it reads all keys, else sparse as its masks say."""

import gc

import pytest
import torch
from tiny_models import BOS, build, names
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache

import heedful
from heedful import HiPAttention, attach, kernels
from heedful.attention import hip_attention
from heedful.attention.hip import reference
from heedful.attention.hip.decode import HiPDecodeState
from heedful.kernels.hip import bounded
from heedful.kernels.hip.exact import best_blocks
from heedful.seam import Verification

SMALL = {"top_k": 12, "block_size_q": 8, "sliding_window": 8, "num_sink_tokens": 2, "decode_sample_method": "center"}
DECODERS = names("decoder")


def tokens(batch=2, length=48, seed=0):
    ids = torch.randint(5, 80, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


def left_padded(ids, padding):
    """The batch with each row's first tokens replaced by as many padding tokens in front."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def exhaustive(**arguments):
    """A part that goes through the search though it may read every key: the search must find them all."""
    part = HiPAttention(**{**SMALL, "top_k": 400, **arguments})
    part._keys_a_row = 0
    return part


@torch.no_grad()
def logits(model, *parts, **inputs):
    with attach(model, *parts):
        return model(**inputs).logits


@torch.no_grad()
def greedy(model, *parts, new_tokens=8, **inputs):
    with attach(model, *parts):
        return model.generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, output_logits=True, return_dict_in_generate=True
        )


def real(values, mask):
    return values[mask.bool()]


@pytest.mark.parametrize("padding", [None, [0, 13]])
@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_model_when_every_key_is_read(family, padding):
    model = build(family, **({"sliding_window": 48} if family == "mistral" else {}))
    inputs = {"input_ids": tokens()} if padding is None else left_padded(tokens(), padding)
    mask = inputs.get("attention_mask", torch.ones(2, 48))
    expected = logits(model, **inputs)
    part = exhaustive()
    found = logits(model, part, **inputs)
    torch.testing.assert_close(real(found, mask), real(expected, mask), atol=2e-4, rtol=1e-4)
    # At least one layer was computed here (those with a window of 6 tokens keep the model's own).
    assert any(tally.keys_read > 0 for tally in part._tallies.values())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "qwen3", "cohere2"])
def test_generates_the_models_tokens_when_every_key_is_read(family, cache):
    model = build(family)
    inputs = left_padded(tokens(), [0, 5])
    options = {"cache_implementation": "static"} if cache == "static" else {}
    expected = greedy(model, **inputs, **options)
    found = greedy(model, exhaustive(mask_refresh_interval=3), **inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)


def recording(monkeypatch):
    """Collects the masks that the part uses, in order."""
    masks = []

    def record(*args, **kwargs):
        output, mask = hip_attention(*args, **kwargs)
        masks.append(mask)
        return output, mask

    monkeypatch.setattr(kernels.hip, "hip_attention", record)
    return masks


class Restrict(heedful.Edit):
    """Dense attention that sees only what the masks chose."""

    def __init__(self, masks):
        super().__init__()
        self.masks = iter(masks)

    def logits(self, call, logits):
        chosen = next(self.masks).dense()
        return logits.masked_fill(~torch.nn.functional.pad(chosen, (0, logits.shape[-1] - chosen.shape[-1])), -1e9)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "gpt_oss", "granite", "deepseek_v3"])
def test_output_is_what_its_masks_say_in_prefill_and_decoding(family, monkeypatch):
    changes = {"layer_types": ["full_attention"] * 3} if family in ("gemma2", "gpt_oss") else {}
    model = build(family, **changes)
    inputs = left_padded(tokens(length=64), [3, 21])
    masks = recording(monkeypatch)
    found = greedy(model, HiPAttention(**SMALL, mask_refresh_interval=3), **inputs)
    assert len(masks) == 3 * 8
    assert all((mask.keys_read() <= 12 + 8 + 2 + 2).all() for mask in masks)
    expected = greedy(model, Restrict(masks), **inputs)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)
    plain = greedy(model, **inputs)
    assert not torch.allclose(found.logits[0], plain.logits[0], atol=1e-2)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "gpt_oss", "granite", "deepseek_v3"])
def test_a_static_cache_keeps_the_same_choices_on_the_device(family, interval):
    changes = {"layer_types": ["full_attention"] * 3} if family in ("gemma2", "gpt_oss") else {}
    model = build(family, **changes)
    inputs = left_padded(tokens(length=64), [3, 21])
    part, other = (HiPAttention(**SMALL, mask_refresh_interval=interval) for _ in range(2))
    expected = greedy(model, part, **inputs)
    found = greedy(model, other, **inputs, cache_implementation="static")
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)
    assert other._choices
    for layer in range(3):
        mine, theirs = other.summary(layer), part.summary(layer)
        assert mine.pop("keys_read") == pytest.approx(theirs.pop("keys_read"), rel=0.03)
        assert mine.pop("share_of_keys_read") == pytest.approx(theirs.pop("share_of_keys_read"), rel=0.03)
        assert mine.pop("mass_kept") == pytest.approx(theirs.pop("mass_kept"), rel=1e-5)
        assert mine == theirs


@pytest.mark.parametrize(("method", "trained_length"), [(None, None), ("center", 40)])
def test_a_choice_outlives_the_buffers_that_a_growing_cache_makes_too_small(method, trained_length):
    model, ids = build("llama"), tokens(length=61)  # the buffers grow at 64
    arguments = {**SMALL, "mask_refresh_interval": 5, "decode_sample_method": method, "trained_length": trained_length}
    dynamic, static = HiPAttention(**arguments), HiPAttention(**arguments)
    found = greedy(model, dynamic, input_ids=ids)
    expected = greedy(model, static, input_ids=ids, cache_implementation="static")
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)
    assert dynamic.summary(1)["refreshes"] == static.summary(1)["refreshes"] == 2


@torch.no_grad()
def test_a_static_cache_that_is_used_again_starts_without_memory():
    model = build("llama")
    cache = StaticCache(config=model.config, max_cache_len=80)
    part = HiPAttention(**SMALL, mask_refresh_interval=50)
    for seed in (1, 2, 1):
        ids = tokens(seed=seed)
        expected = greedy(model, HiPAttention(**SMALL, mask_refresh_interval=50), input_ids=ids)
        cache.reset()
        found = greedy(model, part, input_ids=ids, past_key_values=cache)
        assert torch.equal(found.sequences, expected.sequences)
    assert part.summary(0)["refreshes"] == 3


@torch.no_grad()
def test_holes_in_the_mask_are_honoured_with_a_static_cache_too():
    model, ids = build("llama"), tokens()
    mask = torch.ones_like(ids)
    mask[0, 40:] = 0  # right padding, and tokens behind it
    found = [
        greedy(model, HiPAttention(**SMALL), input_ids=ids, attention_mask=mask, **options)
        for options in ({}, {"cache_implementation": "static"})
    ]
    torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(found[1].logits), atol=2e-4, rtol=1e-4)


def test_short_inputs_run_the_models_own_attention_bit_for_bit():
    model = build("llama")
    ids = tokens(length=22)  # 12 + 8 + 2
    part = HiPAttention(**SMALL)
    with attach(model, part) as attached:
        found = model(ids).logits
    assert torch.equal(found, model(ids).logits)
    for line in attached.report():
        assert line["dense_calls"] == 1
        assert line["keys_visible"] == 0
        assert line["share_of_keys_read"] == 1.0
    assert not torch.allclose(
        logits(model, part, input_ids=tokens(length=40)), logits(model, input_ids=tokens(length=40))
    )


def test_decoding_with_a_refresh_at_each_step_equals_prefill_with_blocks_of_one():
    model = build("llama")
    part = HiPAttention(**SMALL | {"block_size_q": 1, "block_stride_q": 1}, mask_refresh_interval=1)
    out = greedy(model, part, input_ids=tokens())
    whole = logits(model, part, input_ids=out.sequences)
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 47:-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_left_padding_by_whole_blocks_changes_nothing(family):
    model = build(family)
    ids = tokens(batch=1, length=50)
    alone = greedy(model, HiPAttention(**SMALL, mask_refresh_interval=4), input_ids=ids)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 16, dtype=torch.long), ids], 1),
        "attention_mask": torch.cat([torch.zeros(1, 16, dtype=torch.long), torch.ones_like(ids)], 1),
    }
    together = greedy(model, HiPAttention(**SMALL, mask_refresh_interval=4), **padded)
    assert torch.equal(together.sequences[:, 16:], alone.sequences)
    torch.testing.assert_close(torch.stack(together.logits), torch.stack(alone.logits), atol=1e-4, rtol=1e-4)


def test_rows_of_a_batch_do_not_mix():
    model = build("llama")
    ids = tokens(batch=3, length=50)
    mask = left_padded(ids, [0, 9, 24])
    together = greedy(model, HiPAttention(**SMALL, mask_refresh_interval=4), **mask)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in mask.items()}
        alone = greedy(model, HiPAttention(**SMALL, mask_refresh_interval=4), **one)
        assert torch.equal(together.sequences[row], alone.sequences[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_prefill_in_chunks_of_whole_blocks_equals_the_whole_prefill(family):
    model = build(family)
    inputs = left_padded(tokens(length=64), [0, 5])
    with attach(model, HiPAttention(**SMALL)):
        whole = model(**inputs).logits
        cache, parts = DynamicCache(config=model.config), []
        for start, end in ((0, 40), (40, 56), (56, 64)):
            parts.append(
                model(
                    input_ids=inputs["input_ids"][:, start:end],
                    attention_mask=inputs["attention_mask"][:, :end],
                    position_ids=torch.arange(start, end).expand(2, -1),
                    past_key_values=cache,
                ).logits
            )
    mask = inputs["attention_mask"]
    torch.testing.assert_close(real(torch.cat(parts, 1), mask), real(whole, mask), atol=2e-4, rtol=1e-4)


def test_generate_with_prefill_chunks():
    model = build("llama")
    ids = tokens(length=64)
    whole = greedy(model, HiPAttention(**SMALL), input_ids=ids)
    chunks = greedy(model, HiPAttention(**SMALL), input_ids=ids, prefill_chunk_size=16)
    assert torch.equal(whole.sequences, chunks.sequences)


@torch.no_grad()
def test_a_choice_follows_its_row_when_the_cache_is_reordered():
    model = build("llama")
    ids = tokens(batch=3, length=50)
    order = torch.tensor([2, 0, 0])

    def run(rows, steps, reorder=None):
        cache = DynamicCache(config=model.config)
        mask = torch.ones(len(rows), 50, dtype=torch.long)
        model(input_ids=ids[rows], past_key_values=cache, attention_mask=mask)
        for step in range(steps):
            if step == 3 and reorder is not None:
                cache.reorder_cache(reorder)
                rows = [rows[i] for i in reorder.tolist()]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            # Row r reads its own tokens, whatever place it has by now.
            out = model(input_ids=ids[rows][:, 5 + step : 6 + step], past_key_values=cache, attention_mask=mask).logits
        return out

    with attach(model, HiPAttention(**SMALL, mask_refresh_interval=50)):
        together = run([0, 1, 2], 6, order)
        for place, row in enumerate(order.tolist()):
            alone = run([row], 6)
            torch.testing.assert_close(together[place : place + 1], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cropped_or_repeated_cache_is_searched_anew():
    model = build("llama")
    part = HiPAttention(**SMALL, mask_refresh_interval=50)
    cache = DynamicCache(config=model.config)

    def step(batch):
        model(input_ids=torch.full((batch, 1), 7), past_key_values=cache)
        return part.summary(0)["refreshes"]

    with attach(model, part):
        model(input_ids=tokens(batch=2, length=50), past_key_values=cache)
        assert [step(2) for _ in range(3)] == [1, 1, 1]
        cache.crop(-8)
        assert [step(2) for _ in range(2)] == [2, 2]
        cache.batch_repeat_interleave(2)
        assert [step(4) for _ in range(2)] == [3, 3]


def test_beam_search_runs_and_reads_what_plain_decoding_would():
    model = build("llama")
    inputs = left_padded(tokens(length=50), [0, 9])
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    with attach(model, exhaustive(mask_refresh_interval=4)):
        found = model.generate(**inputs, **options)
    assert torch.equal(found, model.generate(**inputs, **options))
    sparse = []
    for more in ({}, {"cache_implementation": "static"}):  # a row's choice follows it in both
        with attach(model, HiPAttention(**SMALL, mask_refresh_interval=4)):
            sparse.append(model.generate(**inputs, **options, **more))
    assert torch.equal(*sparse)
    assert not torch.equal(sparse[0], found)


def test_a_new_sequence_starts_without_memory():
    model = build("llama")
    part = HiPAttention(**SMALL, mask_refresh_interval=50)
    first, second = tokens(seed=1), tokens(seed=2, length=57)
    expected = [
        greedy(model, HiPAttention(**SMALL, mask_refresh_interval=50), input_ids=x).sequences for x in (first, second)
    ]
    with attach(model, part):
        for _ in range(2):
            for ids, sequences in zip((first, second), expected, strict=True):
                assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=8), sequences)


@pytest.mark.parametrize(("interval", "refreshes"), [(1, 9), (2, 5), (4, 3), (100, 1)])
def test_report_counts_refreshes_and_keys(interval, refreshes, monkeypatch):
    model = build("llama")
    masks = recording(monkeypatch)
    with attach(model, HiPAttention(**SMALL, mask_refresh_interval=interval), layers=[0, 2]) as attached:
        model.generate(**left_padded(tokens(), [0, 13]), do_sample=False, max_new_tokens=10)
    report = attached.report()
    assert [line["layer"] for line in report] == [0, 2]
    for place, line in enumerate(report):
        assert line["refreshes"] == refreshes
        assert line["dense_calls"] == 0
        dense = [mask.dense() for mask in masks[place::2]]
        assert line["keys_read"] == sum(int(m.sum()) for m in dense)
        # 4 heads; a row of 48 and one of 35 tokens, and 9 more that were fed back.
        assert line["keys_visible"] == 4 * sum(sum(range(1, n + 10)) for n in (48, 35))
        assert line["share_of_keys_read"] == line["keys_read"] / line["keys_visible"]
        assert 0.2 < line["share_of_keys_read"] < 0.95


def test_dense_layers_and_layers():
    model = build("llama")
    ids = tokens()
    with attach(model, HiPAttention(**SMALL, dense_layers=2)) as attached, torch.no_grad():
        out = model(ids, output_hidden_states=True)
    plain = model(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[2], plain.hidden_states[2])
    assert not torch.equal(out.logits, plain.logits)
    assert [line["dense_calls"] for line in attached.report()] == [1, 1, 0]
    only_last = logits(model, HiPAttention(**SMALL, layers=[2]), input_ids=ids)
    assert torch.equal(out.logits, only_last)


def test_prefill_dense_threshold_keeps_the_prompt_dense():
    model = build("llama")
    ids = tokens()
    part = HiPAttention(**SMALL, prefill_dense_threshold=48)
    out, plain = greedy(model, part, input_ids=ids), greedy(model, input_ids=ids)
    assert torch.equal(out.logits[0], plain.logits[0])
    assert not torch.equal(out.logits[1], plain.logits[1])
    longer = tokens(length=49)
    assert not torch.equal(logits(model, part, input_ids=longer), logits(model, input_ids=longer))


def test_steps_and_heads_restrict_it():
    model = build("llama")
    ids = tokens()
    out = greedy(model, HiPAttention(**SMALL, steps="decode"), input_ids=ids)
    plain = greedy(model, input_ids=ids)
    assert torch.equal(out.logits[0], plain.logits[0])
    assert not torch.equal(out.logits[1], plain.logits[1])

    class Outputs(heedful.Probe):
        def outputs(self, call, output):
            self.seen = output

    probe = Outputs(layers=[0])
    logits(model, probe, input_ids=ids)
    dense = probe.seen
    logits(model, HiPAttention(**SMALL, layers=[0], heads=[2]), probe, input_ids=ids)
    assert torch.equal(probe.seen[:, [0, 1, 3]], dense[:, [0, 1, 3]])
    assert not torch.equal(probe.seen[:, 2], dense[:, 2])


def test_a_layer_with_a_window_keeps_the_models_kernel_once_the_keys_exceed_it():
    model = build("gemma2", sliding_window=30)
    part = HiPAttention(**SMALL)
    logits(model, part, input_ids=tokens(length=30))
    assert [part.summary(layer)["dense_calls"] for layer in range(3)] == [0, 0, 0]
    greedy(model, part, input_ids=tokens(length=40))
    assert [part.summary(layer)["dense_calls"] for layer in range(3)] == [8, 0, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = build("llama", dtype=dtype)
    expected = logits(model, input_ids=tokens())
    found = logits(model, exhaustive(), input_ids=tokens())
    assert found.dtype == dtype
    assert (found - expected).float().norm() < 0.03 * expected.float().norm()


def test_backward():
    model = build("llama").train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with attach(model, exhaustive()):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, dense[name], atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_compiled_models_run_it_outside_the_graph():
    model, ids = build("llama", num_hidden_layers=1), tokens()
    with attach(model, HiPAttention(**SMALL)):
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(ids).logits, expected)
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_decoding_over_a_static_cache():
    model, ids = build("llama", num_hidden_layers=1), tokens(length=50)
    found = []
    for compiled in (False, True):
        part = HiPAttention(**SMALL, mask_refresh_interval=3)
        cache, steps = StaticCache(config=model.config, max_cache_len=80), []
        with attach(model, part):
            model(ids[:, :40], past_key_values=cache)
            run = torch.compile(model, backend="eager") if compiled else model
            for place in range(40, 46):
                mask = torch.ones(2, place + 1, dtype=torch.long)
                steps.append(run(ids[:, place : place + 1], past_key_values=cache, attention_mask=mask).logits)
        found.append(torch.cat(steps))
        assert part.summary(0)["refreshes"] == 2
    assert torch.equal(*found)
    torch._dynamo.reset()


@torch.no_grad()
def test_the_bundled_model_stays_close_to_itself():
    model, tokenizer = heedful.zoo.load("classics-20m")
    ids = tokenizer(heedful.zoo.excerpt()[:12000], return_tensors="pt").input_ids[:, :2048]
    assert ids.shape[1] == 2048

    def predictions(*parts):
        with attach(model, *parts) as attached:
            return model(ids).logits[:, 1024:].log_softmax(-1), attached.report()

    dense, _ = predictions()

    def divergence(part):
        found, report = predictions(part)
        return (dense.exp() * (dense - found)).sum(-1).mean().item(), found, report

    part = HiPAttention(top_k=512, sliding_window=128)
    sparse, found, report = divergence(part)
    window, _, _ = divergence(HiPAttention(top_k=2, sliding_window=128 + 510))
    assert sparse < 0.02
    assert sparse < window / 2
    assert (found.argmax(-1) == dense.argmax(-1)).float().mean() > 0.9
    assert all(line["share_of_keys_read"] < 0.65 for line in report)

    # Token by token it reads other keys than in blocks of 64, and predicts nearly the same.
    cache, rows = DynamicCache(config=model.config), []
    with attach(model, part):
        model(ids[:, :2032], past_key_values=cache)
        for place in range(2032, 2048):
            rows.append(model(ids[:, place : place + 1], past_key_values=cache).logits.log_softmax(-1))
    decoded, prefilled = torch.cat(rows, 1), found[:, -16:]
    assert (prefilled.exp() * (prefilled - decoded)).sum(-1).mean() < 0.03


# ---- what it refuses


def assert_refused(model, message, *, part=None, **inputs):
    with pytest.raises(ValueError, match=message), attach(model, part or HiPAttention(**SMALL)), torch.no_grad():
        model(**inputs)


def test_attention_that_is_not_causal_is_refused():
    assert_refused(build("bert"), "layer 0: HiPAttention is causal", input_ids=tokens())


def test_a_position_bias_is_refused():
    assert_refused(
        build("t5"), "layer 0: HiPAttention knows no position bias", input_ids=tokens(), decoder_input_ids=tokens()
    )


def test_dropout_is_refused():
    assert_refused(build("llama", attention_dropout=0.1).train(), "attention_dropout to 0", input_ids=tokens())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_masks_that_are_not_causal_with_padding_are_refused(attn):
    model, ids = build("llama", attn=attn), tokens()
    causal = torch.ones(48, 48, dtype=torch.bool).tril()
    tree = causal.clone()
    tree[40, 30] = False
    prefix = causal.clone()
    prefix[:5, :5] = True
    window = causal & ~causal.tril(-10)
    for seen in (tree, prefix, window):
        mask = seen.expand(2, 1, 48, 48)
        if attn == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        assert_refused(model, "another one", input_ids=ids, attention_mask=mask)
    fine = causal.expand(2, 1, 48, 48)
    if attn == "eager":
        fine = torch.zeros(fine.shape).masked_fill(~fine, torch.finfo(torch.float32).min)
        assert_refused(model, "another one", input_ids=ids, attention_mask=fine + 0.1)
    expected = logits(model, HiPAttention(**SMALL), input_ids=ids)
    assert torch.equal(logits(model, HiPAttention(**SMALL), input_ids=ids, attention_mask=fine), expected)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_documents_are_read_each_by_itself(attn):
    model, lengths = build("llama", attn=attn), (40, 3, 61, 23, 33)
    ids = tokens(batch=1, length=sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    part = HiPAttention(**SMALL)
    with attach(model, part) as attached:
        packed = model(ids, position_ids=positions, use_cache=False).logits
    line = attached.report()[0]
    assert line["keys_visible"] == 4 * sum(n * (n + 1) // 2 for n in lengths)
    assert 0.2 < line["share_of_keys_read"] < 0.9
    alone = torch.cat([logits(model, HiPAttention(**SMALL), input_ids=x) for x in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(packed, model(ids, position_ids=positions, use_cache=False).logits, atol=1e-2)
    with attach(model, HiPAttention(**SMALL)), pytest.raises(ValueError, match="another one"):
        model(ids[:, :60], position_ids=positions[:, :60], attention_mask=model_mask(attn, 60), use_cache=False)


@torch.no_grad()
def test_flash_models_say_padding_and_documents_in_their_own_way(monkeypatch):
    """By a 2-D mask or none, and by positions alone: what SDPA says by 4-D masks."""
    for interface, function in (
        (AttentionInterface, None),  # no call is dense
        (AttentionMaskInterface, AttentionMaskInterface()["flash_attention_2"]),
    ):
        monkeypatch.setitem(interface._global_mapping, "flash-in-name-only", function)
    ids = tokens(length=64)
    packed = torch.cat([torch.arange(n) for n in (40, 3, 21)]).expand(2, -1)
    found = []
    for name in ("sdpa", "flash-in-name-only"):
        model = build("llama", attn="sdpa")
        model.config._attn_implementation_internal = name
        inputs = left_padded(ids, [0, 13])
        right = {"input_ids": ids, "attention_mask": inputs["attention_mask"].flip(1)}
        found.append(
            [
                real(logits(model, HiPAttention(**SMALL), **inputs), inputs["attention_mask"]),
                real(logits(model, HiPAttention(**SMALL), **right), right["attention_mask"]),
                logits(model, HiPAttention(**SMALL), input_ids=ids, position_ids=packed, use_cache=False),
                torch.stack(greedy(model, HiPAttention(**SMALL, mask_refresh_interval=2), **inputs).logits),
            ]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_block_masks_are_refused():
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 48, 48, device="cpu")
    model = build("llama", attn="flex_attention")
    assert_refused(model, "cannot read a BlockMask; load the model with", input_ids=tokens(), attention_mask=mask)


def model_mask(attn, length):
    """Causal, but one key is hidden from one row."""
    seen = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    seen[..., 50, 10] = False
    if attn == "sdpa":
        return seen
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@torch.no_grad()
def test_heads_can_share_their_sets_and_the_search_can_go_in_stages(monkeypatch):
    model, ids = build("llama"), tokens(length=64)
    masks = recording(monkeypatch)
    sparse = greedy(model, HiPAttention(**SMALL, head_group_size=2), input_ids=ids)
    for mask in masks:
        assert torch.equal(mask.blocks[:, 0], mask.blocks[:, 1])
        assert torch.equal(mask.blocks[:, 2], mask.blocks[:, 3])
    assert any(not torch.equal(mask.blocks[:, 1], mask.blocks[:, 2]) for mask in masks)
    static = greedy(model, HiPAttention(**SMALL, head_group_size=2), input_ids=ids, cache_implementation="static")
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(sparse.logits), atol=2e-4, rtol=1e-4)
    masks.clear()
    stages = [(8, 2, 8, None), (8, 1, 4, 24)]
    found = greedy(model, HiPAttention(**SMALL, stages=stages), input_ids=ids)
    assert {mask.block_size_k for mask in masks} == {4}
    expected = greedy(model, Restrict(masks), input_ids=ids)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)
    static = greedy(model, HiPAttention(**SMALL, stages=stages), input_ids=ids, cache_implementation="static")
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(found.logits), atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_decoding_can_look_at_every_key(family, monkeypatch):
    changes = {"layer_types": ["full_attention"] * 3} if family in ("gemma2", "gpt_oss") else {}
    model, inputs = build(family, **changes), left_padded(tokens(length=64), [0, 21])
    center = {**SMALL, "mask_refresh_interval": 3, "head_group_size": 2}
    arguments = {**center, "decode_sample_method": None}  # the default, for few keys
    part = HiPAttention(**arguments)
    found = greedy(model, part, **inputs)
    static = greedy(model, HiPAttention(**arguments), **inputs, cache_implementation="static")
    assert not torch.equal(
        torch.stack(greedy(model, HiPAttention(**center), **inputs).logits), torch.stack(found.logits)
    )
    monkeypatch.setattr(HiPAttention, "_looks_at_all", lambda part, call: False)  # the operator's own oracle
    expected = greedy(model, HiPAttention(**arguments), **inputs)
    for mine in (found, static):
        assert torch.equal(mine.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(mine.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)
    assert part.summary(0)["refreshes"] == 3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("length", [5, 30, 77])
def test_the_exact_search_takes_the_operators_best_blocks(length, shared, stride):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 16, generator=g)
    key, value = torch.randn(2, 2, 2, 80, 16, generator=g)
    sizes = {"top_k": 9, "block_size_k": 3, "sliding_window": 7, "num_sink_tokens": 2, "block_stride_k": stride}
    first = torch.tensor([0, 4])
    state = HiPDecodeState(2, 4, 80, head_group_size=shared, **sizes)
    found = best_blocks(query, key, torch.full((2,), length), state, first).repeat_interleave(shared, 1)
    wide = HiPDecodeState(2, 4, 400, head_group_size=shared, **{**sizes, "top_k": 300})  # more places than blocks
    every = best_blocks(query, key, torch.full((2,), length), wide, first)
    assert every.shape == (2, 4 // shared, 100)
    assert (every >= 0).sum(-1).unique().tolist() == sorted({max(0, -(-(length - 9 - n) // 3)) for n in (0, 4)})
    mask = torch.arange(length) >= first[:, None]
    _, choice = hip_attention(
        query, key[:, :, :length], value[:, :, :length], attention_mask=mask, return_mask=True, sample_method="oracle",
        head_group_size=shared, block_size_q=1, block_stride_q=1, **sizes,
    )  # fmt: skip
    width = choice.blocks.shape[-1]
    assert torch.equal(found[..., :width], choice.blocks[:, :, 0])
    assert (found[..., width:] == -1).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_mass_kept_is_that_of_dense_attention(family, monkeypatch):
    model = build(family, **({"layer_types": ["full_attention"] * 3} if family == "gemma2" else {}))
    inputs = left_padded(tokens(length=64), [3, 40])
    masks = recording(monkeypatch)

    class Mass(heedful.Probe):
        def probabilities(self, call, probabilities):
            self.seen = [*getattr(self, "seen", []), probabilities]

    part = HiPAttention(**SMALL, layers=[0], sampled_rows=33)  # every row of the later half
    with attach(model, part):
        model(**inputs)
    probe = Mass(layers=[0])
    with attach(model, probe):
        model(**inputs)
    kept = (probe.seen[0] * masks[0].dense()).sum(-1)[:, :, 31:]
    kept = kept[inputs["attention_mask"].bool()[:, None, 31:].expand_as(kept)]
    assert part.summary(0)["mass_kept"] == pytest.approx(kept.mean().item(), abs=1e-4)


def test_prefixes_of_images_are_refused():
    model = build("gemma3_text")
    prefix = torch.ones(48, 48, dtype=torch.bool).tril()
    prefix[2:6, 2:6] = True
    assert_refused(model, "layer 1: .* another one", input_ids=tokens(), attention_mask=prefix.expand(2, 1, 48, 48))


def test_drafted_tokens_are_refused():
    model = build("llama")
    with attach(model, HiPAttention(**SMALL)), pytest.raises(ValueError, match="HiPAttention cannot honour"):
        Verification(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"mask_refresh_interval": 0}, "mask_refresh_interval"),
        ({"dense_layers": -1}, "dense_layers"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"sampled_rows": -1}, "sampled_rows"),
        ({"sampled_rows": 2.5}, "sampled_rows"),
        ({"mask_refresh_interval": 2.5}, "mask_refresh_interval"),
        ({"dense_layers": True}, "dense_layers"),
        ({"prefill_dense_threshold": -1}, "prefill_dense_threshold"),
        ({"decode_sample_method": "best"}, "sample_method"),
        ({"head_group_size": 0}, "head_group_size"),
        ({"stages": []}, "stages must be"),
        ({"sample_method": "best"}, "sample_method"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiPAttention(**arguments)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_tokens_from_a_block_boundary_on_change_nothing_before_it(family):
    changes = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3} if family == "gemma3_text" else {}
    model, ids = build(family, **changes), tokens(length=64)
    changed = ids.clone()
    changed[:, 40:] = tokens(seed=1, length=64)[:, 40:]
    one, other = (logits(model, HiPAttention(**SMALL), input_ids=x) for x in (ids, changed))
    assert torch.equal(one[:, :40], other[:, :40])
    assert not torch.equal(one[:, 40:], other[:, 40:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("trained_length", [None, 32])
def test_inference_mode(cache, trained_length):
    model, inputs = build("llama"), left_padded(tokens(), [0, 5])
    options = {"cache_implementation": "static"} if cache == "static" else {}
    arguments = {**SMALL, "mask_refresh_interval": 3, "trained_length": trained_length}
    expected = greedy(model, HiPAttention(**arguments), **inputs, **options)
    part = HiPAttention(**arguments)
    with torch.inference_mode():
        found = greedy(model, part, **inputs, **options)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    again = greedy(model, part, **inputs, **options)  # what the part keeps is used outside of the mode, too
    assert torch.equal(torch.stack(again.logits), torch.stack(expected.logits))
    with attach(model, part):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()


class Largest(TorchDispatchMode):
    """The largest storage that any operation gives out, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@torch.no_grad()
@pytest.mark.parametrize("trained_length", [None, 512])
def test_nothing_is_quadratic_in_a_model(trained_length, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1 << 18)
    monkeypatch.setattr(bounded, "_CHUNK_ELEMENTS", 1 << 18)
    model, ids = build("llama", num_hidden_layers=1), tokens(batch=1, length=8192)
    sizes = {"top_k": 64, "sliding_window": 64, "num_sink_tokens": 4, "trained_length": trained_length}
    with attach(model, HiPAttention(**sizes)) as attached, Largest() as largest:
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
    assert 1 << 18 < largest.bytes < 8192**2 // 8  # a bit for each pair of one head
    assert attached.report()[0]["share_of_keys_read"] < 0.1


def test_sequences_leave_nothing_behind():
    model, part, held = build("llama"), HiPAttention(**{**SMALL, "decode_sample_method": None}), []
    for seed in range(3):
        greedy(model, part, input_ids=tokens(seed=seed), new_tokens=3)
        gc.collect()
        held.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
    assert part.summary(0)["refreshes"] == 3 * 2
    assert part.summary(0)["keys_visible"] == 3 * 2 * 4 * sum(range(1, 51))
    assert held[2] <= held[1]


def test_leaving_restores_the_model():
    model = build("llama")
    expected = model(tokens()).logits
    with attach(model, HiPAttention(**SMALL)):
        model(tokens())
    assert torch.equal(model(tokens()).logits, expected)
