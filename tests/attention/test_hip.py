"""HiP attention against dense attention, brute force, and the invariants of its card."""

import dataclasses
import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from heedful.attention import HiPMask, hip_attention
from heedful.attention.hip import operators, reference

SMALL = {
    "top_k": 32,
    "block_size_q": 16,
    "block_stride_q": 2,
    "block_size_k": 2,
    "sliding_window": 20,
    "num_sink_tokens": 3,
}


def tensors(batch=1, heads=4, kv_heads=2, queries=200, keys=None, dim=16, seed=0, dtype=torch.float32):
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim + 4)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def dense(query, key, value, attended, scale=None, softcap=None, sink_logits=None):
    """Softmax attention restricted to `attended (B, Hq, Tq, Tk)`, with 0 for rows that see nothing."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~attended, -torch.inf)
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits[:, None, None].expand(*logits.shape[:-1], 1)], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[2]]
    return torch.nan_to_num(weights) @ value


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def left_padding(batch, keys, padding):
    return torch.arange(keys) >= torch.tensor(padding)[:, None].expand(batch, 1)


@st.composite
def problems(draw):
    kv_heads = draw(st.integers(1, 3))
    queries = draw(st.integers(1, 120))
    block_size_q = draw(st.sampled_from([1, 2, 5, 16, 64]))
    shape = {
        "batch": draw(st.integers(1, 3)),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "queries": queries,
        "keys": queries + draw(st.sampled_from([0, 0, 1, 37, 90])),
        "dim": draw(st.sampled_from([3, 8, 16])),
        "seed": draw(st.integers(0, 1000)),
    }
    sizes = {
        "top_k": draw(st.integers(1, 40)),
        "block_size_q": block_size_q,
        "block_stride_q": draw(st.integers(1, block_size_q)),
        "block_size_k": draw(st.integers(1, 5)),
        "sliding_window": draw(st.integers(0, 40)),
        "num_sink_tokens": draw(st.integers(0, 9)),
        "sample_method": draw(st.sampled_from(["center", "center", "first", "last", "random", "oracle"])),
    }
    padding = draw(st.lists(st.integers(0, shape["keys"]), min_size=shape["batch"], max_size=shape["batch"]))
    right = draw(st.sampled_from([0, 0, 7]))
    mask = left_padding(shape["batch"], shape["keys"], padding) & (torch.arange(shape["keys"]) < shape["keys"] - right)
    return shape, sizes, draw(st.sampled_from([None, mask]))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_output_is_dense_attention_restricted_to_the_mask(problem):
    shape, sizes, attention_mask = problem
    query, key, value = tensors(**shape)
    output, mask = hip_attention(query, key, value, attention_mask=attention_mask, return_mask=True, **sizes)
    attended = mask.dense()
    assert output.shape == (*query.shape[:3], value.shape[-1])
    assert attended.shape == (*query.shape[:3], key.shape[2])
    assert attended.dtype == torch.bool
    torch.testing.assert_close(output, dense(query, key, value, attended), atol=1e-5, rtol=1e-5)

    # Never a future or a padded key; always the window and the sinks; never more than asked for.
    visible = causal(shape["queries"], shape["keys"])
    first = torch.zeros(shape["batch"], dtype=torch.long)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None]
        first = attention_mask.int().argmax(1)
    assert not (attended & ~visible).any()
    window = max(sizes["sliding_window"], sizes["block_size_q"] - 1)
    row = torch.arange(shape["keys"] - shape["queries"], shape["keys"])[:, None]
    position = torch.arange(shape["keys"])
    in_window = position > row - window
    is_sink = position < first[:, None, None, None] + sizes["num_sink_tokens"]
    always = ((in_window | is_sink) & visible).expand_as(attended)
    assert attended[always].all()
    budget = math.ceil(sizes["top_k"] / sizes["block_size_k"]) * sizes["block_size_k"]
    assert (attended & ~always).sum(-1).max() <= budget
    assert torch.equal(mask.keys_read(), attended.sum(-1))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_equals_dense_attention_when_top_k_suffices(problem):
    shape, sizes, attention_mask = problem
    query, key, value = tensors(**shape)
    attended = causal(shape["queries"], shape["keys"]).expand(shape["batch"], 1, -1, -1)
    if attention_mask is not None:
        attended = attended & attention_mask[:, None, None]
    output = hip_attention(query, key, value, attention_mask=attention_mask, **sizes | {"top_k": shape["keys"]})
    expected = dense(query, key, value, attended)
    if attention_mask is not None:  # what rows of right padding give is nobody's business
        real = attention_mask[:, None, -shape["queries"] :, None]
        output, expected = output * real, expected * real
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [63, 64, 65, 300, 512 + 256 + 16])
def test_equals_dense_attention_at_the_defaults_on_every_row(tokens):
    query, key, value = tensors(queries=tokens)
    torch.testing.assert_close(
        hip_attention(query, key, value), dense(query, key, value, causal(tokens, tokens)), atol=1e-5, rtol=0
    )


def test_is_sparse_as_soon_as_the_searchable_range_exceeds_top_k():
    tokens = SMALL["top_k"] + SMALL["sliding_window"] + SMALL["num_sink_tokens"]
    for extra, whole in ((0, True), (1, False)):
        query, key, value = tensors(queries=tokens + extra)
        _, mask = hip_attention(query, key, value, return_mask=True, **SMALL)
        assert bool(mask.dense()[:, :, -1].all()) == whole


@pytest.mark.parametrize("position", [0, 2, 70, 71, 143, 199])
def test_no_row_depends_on_later_keys_or_values(position):
    query, key, value = tensors()
    output, mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    key, value = key.clone(), value.clone()
    key[:, :, position:] *= -7
    value[:, :, position:] += 5
    changed, changed_mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    assert torch.equal(output[:, :, :position], changed[:, :, :position])
    assert not torch.equal(output[:, :, position:], changed[:, :, position:])
    # The choice of a whole block does not depend on keys after its first row's window.
    block = position // 16
    assert torch.equal(mask.blocks[:, :, : block + 1], changed_mask.blocks[:, :, : block + 1])


@pytest.mark.parametrize("sample_method", ["center", "first", "last", "random", "oracle"])
def test_a_run_of_blocks_that_outscores_the_rest_is_always_found(sample_method):
    tokens, sizes = 1500, SMALL | {"top_k": 32}
    generator = torch.Generator().manual_seed(0)
    query = torch.zeros(1, 1, tokens, 8)
    query[..., 0] = 1
    blocks = math.ceil((tokens - 20 - 3) / 2)
    run = math.ceil(blocks / 16)
    for start in torch.randint(0, blocks - run + 1, (30,), generator=generator).tolist():
        key = torch.randn(1, 1, tokens, 8, generator=generator)
        key[..., 0] = -torch.rand(1, 1, tokens, generator=generator)
        key[:, :, 3 + 2 * start : 3 + 2 * (start + run), 0] = torch.rand(2 * run, generator=generator)
        _, mask = hip_attention(
            query, key, key, return_mask=True, sample_method=sample_method, generator=generator, **sizes
        )
        chosen = mask.blocks[0, 0, -1]
        assert ((chosen >= start) & (chosen < start + run)).any()


def block_maxima(query, key, mask: HiPMask, stride):
    """Brute force: the best q.k of every block, over the sampled rows of each query block; (B, Hq, N, blocks)."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT
    row = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    scores = scores.masked_fill(torch.arange(key.shape[2]) > row - mask.sliding_window, -1e30)
    per_block = []
    for start in range(0, query.shape[2], mask.block_size_q):
        block = scores[:, :, start : start + mask.block_size_q]
        block = block[:, :, stride - 1 :: stride] if block.shape[2] >= stride else block[:, :, -1:]
        best = block.amax(2)[..., mask.num_sink_tokens :]
        best = torch.nn.functional.pad(best, (0, -best.shape[-1] % mask.block_size_k), value=-1e30)
        per_block.append(best.unflatten(-1, (-1, mask.block_size_k)).amax(-1))
    return torch.stack(per_block, 2)


@pytest.mark.parametrize("stride", [1, 2, 16])
def test_oracle_is_the_exact_top_blocks_and_the_tree_is_not_above_it(stride):
    query, key, value = tensors(batch=2, queries=421)
    sizes = SMALL | {"block_stride_q": stride}
    choose = lambda method: hip_attention(query, key, value, return_mask=True, sample_method=method, **sizes)[1]  # noqa: E731
    oracle, tree = choose("oracle"), choose("center")
    maxima = block_maxima(query, key, oracle, stride)
    best = maxima.topk(16).indices.sort(-1).values
    full = (oracle.search_end - 3 + 1) // 2 > 16
    assert full.sum() > 20
    assert torch.equal(oracle.blocks.long()[full[:, None].expand(-1, 4, -1)], best[full[:, None].expand(-1, 4, -1)])

    def score(mask):
        picked = maxima.gather(-1, mask.blocks.long().clamp(min=0))
        return picked.masked_fill(mask.blocks < 0, 0).sum(-1)

    assert (score(tree) <= score(oracle) + 1e-4).all()
    assert score(tree).mean() > score(choose("random")).mean() * 0.9


def drifting(coefficient, generator, tokens=4096, dim=64):
    """An AR(1) process of unit variance over the tokens, `(1, 1, T, D)`."""
    noise = torch.randn(tokens, dim, generator=generator)
    noise[1:] *= (1 - coefficient**2) ** 0.5
    for step in range(1, tokens):
        noise[step] += coefficient * noise[step - 1]
    return noise[None, None]


@pytest.mark.parametrize(("coefficient", "least"), [(0.9, 0.72), (0.99, 0.85)])
def test_where_neighbours_score_alike_the_tree_keeps_nearly_the_mass_of_the_best_blocks(coefficient, least):
    """The card's acceptance, on the later half of 4,096 rows: the share of dense attention's softmax that is kept."""
    generator = torch.Generator().manual_seed(0)
    query, key = (drifting(coefficient, generator) for _ in range(2))
    late = slice(2048, None)
    visible = causal(2048, 4096)
    weights = (query[0, 0, late] @ key[0, 0].T * 3 / 8).masked_fill(~visible, -torch.inf).softmax(-1)

    def mass(mask):
        return (weights * mask.dense()[0, 0, late]).sum(-1).mean().item()

    choose = lambda method: hip_attention(query, key, key, return_mask=True, sample_method=method)[1]  # noqa: E731
    tree = choose("center")
    places = torch.rand(64, 2048, generator=generator)
    searchable = torch.arange(2048) < (tree.search_end[0, :, None] - 16) // 2
    drawn = places.masked_fill(~searchable, 2).sort(-1)
    drawn = torch.where(drawn.values[:, :256] < 2, drawn.indices[:, :256], 9999).sort(-1).values
    random = dataclasses.replace(tree, blocks=torch.where(drawn < 9999, drawn, -1).int()[None, None])
    assert mass(tree) >= least
    assert mass(tree) >= 0.97 * mass(choose("oracle"))
    assert mass(tree) >= 2.5 * mass(random) > 0.5


def test_one_round_of_the_tree_by_hand():
    # 8 blocks of 1 key, 4 nodes of 2 blocks: one round, in which the tree sees every block.
    key = torch.tensor([5.0, 1.0, 2.0, 7.0, 3.0, 0.0, 6.0, 4.0, 0.0]).view(1, 1, 9, 1)
    query = torch.ones(1, 1, 1, 1)
    sizes = {
        "top_k": 4,
        "block_size_q": 1,
        "block_stride_q": 1,
        "block_size_k": 1,
        "sliding_window": 1,
        "num_sink_tokens": 0,
    }
    _, mask = hip_attention(query, key, key, return_mask=True, **sizes)
    assert mask.blocks.flatten().tolist() == [0, 3, 6, 7]
    # 2 nodes of 4, two rounds. The middles 2 (of 0..3: halves 0-1, 2-3 -> 1 and 3) score 1, 7; 5 and 7 score 0, 4.
    _, mask = hip_attention(query, key, key, return_mask=True, **sizes | {"top_k": 2})
    assert mask.blocks.flatten().tolist() == [3, 6]


def test_ties_are_broken_by_position():
    query, key, value = torch.ones(1, 1, 300, 4), torch.ones(1, 1, 300, 4), torch.ones(1, 1, 300, 4)
    _, mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    _, again = hip_attention(query, key, value, return_mask=True, **SMALL)
    assert torch.equal(mask.blocks, again.blocks)
    assert (mask.blocks[0, 0, -1].diff() > 0).all()


def test_random_sampling_follows_its_generator():
    query, key, value = tensors(queries=400)

    def blocks(seed):
        generator = torch.Generator().manual_seed(seed)
        mask = hip_attention(query, key, value, return_mask=True, sample_method="random", generator=generator, **SMALL)[
            1
        ]
        return mask.blocks

    assert torch.equal(blocks(0), blocks(0))
    assert not torch.equal(blocks(0), blocks(1))


def test_grouped_heads_equal_repeated_ones():
    query, key, value = tensors(batch=2, heads=6, kv_heads=2)
    grouped, mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    key, value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
    repeated, repeated_mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    assert torch.equal(mask.blocks, repeated_mask.blocks)
    torch.testing.assert_close(grouped, repeated, atol=1e-6, rtol=0)


@pytest.mark.parametrize("padding", [16, 48, 160])
def test_left_padding_by_a_multiple_of_the_block_changes_no_bit(padding):
    query, key, value = tensors(batch=2, queries=300)
    output, mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    pad = lambda x: torch.cat([torch.full_like(x, 3.0)[:, :, :padding], x], 2)  # noqa: E731
    attention_mask = left_padding(2, 300 + padding, [padding, padding])
    padded, padded_mask = hip_attention(
        pad(query), pad(key), pad(value), return_mask=True, attention_mask=attention_mask, **SMALL
    )
    assert torch.equal(padded[:, :, padding:], output)
    assert torch.equal(padded[:, :, :padding], torch.zeros_like(padded[:, :, :padding]))
    assert torch.equal(padded_mask.dense()[:, :, padding:, padding:], mask.dense())


def test_right_padding_changes_no_real_row():
    query, key, value = tensors(batch=2, queries=260)
    lengths = [260, 201]
    attention_mask = torch.arange(260) < torch.tensor(lengths)[:, None]
    output, mask = hip_attention(query, key, value, return_mask=True, attention_mask=attention_mask, **SMALL)
    for row, length in enumerate(lengths):
        alone = (x[row : row + 1, :, :length] for x in (query, key, value))
        expected, expected_mask = hip_attention(*alone, return_mask=True, **SMALL)
        assert torch.equal(mask.dense()[row, :, :length, :length], expected_mask.dense()[0])
        torch.testing.assert_close(output[row : row + 1, :, :length], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("padding", [None, [0, 16, 33], [90, 0, 299], [300, 5, 5]])
def test_rows_of_a_batch_are_bitwise_independent(padding):
    query, key, value = tensors(batch=3, queries=300)
    attention_mask = None if padding is None else left_padding(3, 300, padding)
    together, mask = hip_attention(query, key, value, return_mask=True, attention_mask=attention_mask, **SMALL)
    for row in range(3):
        one = slice(row, row + 1)
        row_mask = None if padding is None else attention_mask[one]
        alone, mask_alone = hip_attention(
            query[one], key[one], value[one], return_mask=True, attention_mask=row_mask, **SMALL
        )
        assert torch.equal(together[one], alone)
        assert torch.equal(mask.blocks[one], mask_alone.blocks)


def test_the_size_of_a_chunk_changes_no_choice(monkeypatch):
    """Nor the output but in the last bits: some CPUs' products of matrices round by how many there are."""
    query, key, value = tensors(batch=2, queries=500)
    output, mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)
    again, mask_again = hip_attention(query, key, value, return_mask=True, **SMALL)
    assert torch.equal(mask.blocks, mask_again.blocks)
    torch.testing.assert_close(again, output, atol=1e-6, rtol=0)


def test_prefill_in_chunks_of_whole_blocks_equals_the_whole_prefill():
    query, key, value = tensors(queries=300)
    whole, mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    start = 0
    for end in (64, 80, 208, 300):
        part, part_mask = hip_attention(
            query[:, :, start:end], key[:, :, :end], value[:, :, :end], return_mask=True, **SMALL
        )
        assert torch.equal(part_mask.dense(), mask.dense()[:, :, start:end, :end])
        torch.testing.assert_close(part, whole[:, :, start:end], atol=1e-6, rtol=0)
        start = end


def test_decoding_one_token_equals_the_last_row_of_prefill_with_blocks_of_one():
    query, key, value = tensors(batch=2, queries=300)
    sizes = SMALL | {"block_size_q": 1, "block_stride_q": 1}
    attention_mask = left_padding(2, 300, [0, 41])
    prefill = hip_attention(query, key, value, attention_mask=attention_mask, **sizes)
    decode = hip_attention(query[:, :, -1:], key, value, attention_mask=attention_mask, **sizes)
    torch.testing.assert_close(decode, prefill[:, :, -1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows_then", [1, 40])
@pytest.mark.parametrize("later", [1, 5, 30])
@pytest.mark.parametrize("rows_now", [1, 3, 20])
def test_a_mask_serves_later_rows_with_its_window_extended(rows_then, later, rows_now):
    query, key, value = tensors(batch=2, queries=300 + later + rows_now)
    attention_mask = left_padding(2, 300 + later + rows_now, [0, 21])
    _, mask = hip_attention(
        query[:, :, 300 - rows_then : 300],
        key[:, :, :300],
        value[:, :, :300],
        return_mask=True,
        attention_mask=attention_mask[:, :300],
        **SMALL,
    )
    output, used = hip_attention(
        query[:, :, -rows_now:], key, value, mask=mask, attention_mask=attention_mask, return_mask=True
    )
    attended = used.dense()
    torch.testing.assert_close(output, dense(query[:, :, -rows_now:], key, value, attended), atol=1e-5, rtol=1e-5)
    assert torch.equal(used.keys_read(), attended.sum(-1))
    then = mask.dense()[:, :, -1:]
    assert torch.equal(attended[..., :300], then.expand_as(attended[..., :300]))
    assert torch.equal(attended[..., 300:], causal(rows_now, rows_now + later).expand_as(attended[..., 300:]))


def test_a_mask_serves_its_own_call_again_and_not_older_rows():
    query, key, value = tensors()
    output, mask = hip_attention(query, key, value, return_mask=True, **SMALL)
    assert torch.equal(hip_attention(query, key, value, mask=mask), output)
    everything = dataclasses.replace(mask, blocks=torch.arange(100, dtype=torch.int32).expand(1, 4, 13, 100))
    torch.testing.assert_close(
        hip_attention(query, key, value, mask=everything), dense(query, key, value, causal(200, 200)), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="leave mask out"):
        hip_attention(query[:, :, -1:], key, value, mask=mask)
    with pytest.raises(ValueError, match="leave mask out"):
        hip_attention(*tensors(batch=2), mask=mask)


def test_a_mask_knows_where_its_rows_begin():
    """Blocks count from the first real token: with other padding they would be other tokens."""
    query, key, value = tensors(batch=2, queries=201)
    real = left_padding(2, 201, [0, 30])
    early = [x[:, :, :200] for x in (query, key, value)]
    _, plain = hip_attention(*early, return_mask=True, **SMALL)
    output, padded = hip_attention(*early, return_mask=True, attention_mask=real[:, :200], **SMALL)
    assert torch.equal(hip_attention(*early, mask=padded), output)
    assert torch.equal(hip_attention(*early, mask=padded, attention_mask=real[:, :200]), output)
    hidden = real[:, :200].clone()
    hidden[:, 100] = False  # a hole moves no block
    holed, used = hip_attention(*early, mask=padded, attention_mask=hidden, return_mask=True)
    assert not used.dense()[..., 100].any()
    assert torch.equal(used.keys_read(), used.dense().sum(-1))
    torch.testing.assert_close(holed, dense(*early, used.dense()), atol=1e-5, rtol=1e-5)
    for mask, other in ((plain, real), (padded, left_padding(2, 201, [0, 31]))):
        with pytest.raises(ValueError, match="leave mask out"):
            hip_attention(*early, mask=mask, attention_mask=other[:, :200])
        with pytest.raises(ValueError, match="leave mask out"):
            hip_attention(query[:, :, -1:], key, value, mask=mask, attention_mask=other)
    with pytest.raises(ValueError, match="give this call's"):
        hip_attention(query[:, :, -1:], key, value, mask=padded)


@pytest.mark.parametrize("attention_mask", [None, left_padding(2, 120, [0, 13])])
def test_gradients_equal_those_of_restricted_dense_attention(attention_mask):
    inputs = [x.requires_grad_() for x in tensors(batch=2, queries=120, dtype=torch.float64)]
    more = {"softcap": 5.0, "sink_logits": torch.randn(4, dtype=torch.float64, requires_grad=True)}
    output, mask = hip_attention(*inputs, attention_mask=attention_mask, return_mask=True, **more, **SMALL)
    direction = torch.randn(output.shape, dtype=torch.float64)
    leaves = [*inputs, more["sink_logits"]]
    ours = torch.autograd.grad(output, leaves, direction)
    theirs = torch.autograd.grad(dense(*inputs, mask.dense(), **more), leaves, direction)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torch.nan_to_num(expected), atol=1e-10, rtol=1e-8)
    assert all(gradient.abs().sum() > 0 for gradient in ours)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in tensors(heads=2, kv_heads=1, queries=20, dim=2, dtype=torch.float64)]
    _, mask = hip_attention(*inputs, return_mask=True, **SMALL | {"top_k": 4, "block_size_q": 8, "sliding_window": 8})
    assert torch.autograd.gradcheck(lambda *x: hip_attention(*x, mask=mask), inputs)


@pytest.mark.parametrize("extra", [{}, {"stages": [(16, 4, 8, None)]}])
def test_compiles_as_a_whole_with_its_gradients(extra):
    leaves = [x.requires_grad_() for x in tensors(batch=2, queries=100, dtype=torch.float64)]
    leaves.append(torch.randn(4, dtype=torch.float64, requires_grad=True))
    attention_mask = left_padding(2, 100, [0, 7])

    def run(query, key, value, sinks):
        options = {"attention_mask": attention_mask, "softcap": 3.0, "sink_logits": sinks, "return_mask": True}
        output, mask = hip_attention(query, key, value, **options, **SMALL, **extra)
        return output, mask.blocks

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    output, blocks = run(*leaves)
    again, again_blocks = compiled(*leaves)
    assert torch.equal(again, output)
    assert torch.equal(again_blocks, blocks)
    direction = torch.randn_like(output)
    for ours, theirs in zip(
        torch.autograd.grad(again, leaves, direction), torch.autograd.grad(output, leaves, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_registered_operators():
    query, key, value = tensors(queries=60)
    sizes = [32, 16, 2, 2, 1, 20, 3, 1]
    torch.library.opcheck(operators.choose_op, (query, key, left_padding(1, 60, [3]), sizes, "center"))
    torch.library.opcheck(operators.scan_op, (query, key, None, [16, 4, 8, 0], [32, 20, 3, 1]))
    mask = hip_attention(query, key, value, return_mask=True, **SMALL)[1]
    leaves = [x.requires_grad_() for x in (query, key, value, torch.zeros(4))]
    arguments = (*leaves, mask.blocks, mask.search_end, None, [16, 2, 20, 3, -1], 0.3, 5.0)
    torch.library.opcheck(operators.attend_op, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = tensors(batch=2, queries=300, dtype=dtype)
    output, mask = hip_attention(*inputs, return_mask=True, **SMALL)
    assert output.dtype == dtype
    exact, exact_mask = hip_attention(*(x.double() for x in inputs), return_mask=True, **SMALL)
    assert torch.equal(mask.blocks, exact_mask.blocks)
    torch.testing.assert_close(output.double(), exact, atol=2e-2, rtol=2e-2)
    whole = hip_attention(*inputs).double()
    torch.testing.assert_close(whole, dense(*(x.double() for x in inputs), causal(300, 300)), atol=2e-2, rtol=2e-2)


def test_autocast_means_its_dtype_and_exact_sums():
    inputs = tensors(queries=300)
    with torch.autocast("cpu", torch.bfloat16):
        output = hip_attention(inputs[0].bfloat16(), *inputs[1:], **SMALL)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, hip_attention(*(x.bfloat16() for x in inputs), **SMALL))


def test_strides_of_the_inputs_do_not_matter():
    inputs = tensors(batch=2, queries=300)
    expected = hip_attention(*inputs, **SMALL)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    sliced = [torch.cat([x, x], 2)[:, :, : x.shape[2]] for x in inputs]
    spread = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    for views in (transposed, sliced, spread):
        assert not any(x.is_contiguous() for x in views)
        torch.testing.assert_close(hip_attention(*views, **SMALL), expected, atol=1e-6, rtol=0)
        decode = hip_attention(views[0][:, :, -1:], *views[1:], **SMALL)
        torch.testing.assert_close(decode, hip_attention(inputs[0][:, :, -1:], *inputs[1:], **SMALL), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.7},
        {"softcap": 2.0},
        {"scale": 1.3, "softcap": 0.5},
        {"sink_logits": torch.tensor([-3.0, 0, 2, 300])},
    ],
)
def test_scale_softcap_and_sink_logits(options):
    query, key, value = tensors()
    output, mask = hip_attention(query, key, value, return_mask=True, **SMALL, **options)
    torch.testing.assert_close(output, dense(query, key, value, mask.dense(), **options), atol=1e-5, rtol=1e-5)


class Allocations(TorchDispatchMode):
    """Largest storage that any operation gives out, and the peak of what is alive, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage()._cdata in self.known:
                continue
            storage = tensor.untyped_storage()
            size, address = storage.nbytes(), storage._cdata
            self.known.add(address)
            self.alive += size
            self.largest, self.peak = max(self.largest, size), max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, address, size)
        return result

    def _freed(self, address, size):
        self.known.discard(address)
        self.alive -= size


def allocations(tokens, **shape):
    query, key, value = tensors(queries=tokens, dim=8, **shape)
    with Allocations() as memory:
        hip_attention(query, key, value, top_k=64, sliding_window=64, num_sink_tokens=4)
    return memory


def test_memory_grows_linearly_and_nothing_is_quadratic(monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1 << 18)
    short, long = allocations(4096), allocations(16384)
    assert short.largest > 0
    assert long.peak < 4 * short.peak * 1.1
    # One head's T x T of booleans would be 256 MiB. The largest thing is the output, beside the chunks.
    assert long.largest <= 4 * 16384 * 12 * 4
    assert long.peak < 30 * 2**20


@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 0, 0), (2, 0, 9), (0, 7, 7)])
@pytest.mark.parametrize("stages", [None, [(8, 1, 4, None)]])
def test_empty_inputs_give_empty_outputs(batch, queries, keys, stages):
    query, key, value = (x.requires_grad_() for x in tensors(batch=batch, queries=queries, keys=keys))
    output, mask = hip_attention(query, key, value, return_mask=True, stages=stages)
    assert output.shape == (batch, 4, queries, 20)
    assert mask.dense().shape == (batch, 4, queries, keys)
    assert mask.keys_read().shape == (batch, 4, queries)
    output.sum().backward()
    assert query.grad.shape == query.shape


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [1, 100, 199])
def test_a_bad_number_stays_where_it_is_attended(which, bad, place):
    inputs = dict(zip(("query", "key", "value"), tensors(batch=2, heads=2, kv_heads=1), strict=True))
    clean = hip_attention(**inputs, **SMALL)
    changed = {name: x.clone() for name, x in inputs.items()}
    changed[which][1, 0, place] = bad
    output, mask = hip_attention(**changed, return_mask=True, **SMALL)
    assert torch.equal(output[0], clean[0])
    block = place // 16 * 16
    assert torch.equal(output[1, :, :block], clean[1, :, :block])
    assert not output[1, 0, place].isfinite().all()
    assert mask.blocks.min() >= -1
    assert mask.blocks.max() < 100
    # What nobody attends to may hold anything: keys of padding.
    padded = {name: torch.cat([torch.full_like(x[:, :, :16], bad), x], 2) for name, x in inputs.items()}
    padded["query"][:, :, :16] = 0
    attention_mask = left_padding(2, 216, [16, 16])
    assert torch.equal(hip_attention(**padded, attention_mask=attention_mask, **SMALL)[:, :, 16:], clean)
    beyond = {name: torch.cat([x, torch.full_like(x[:, :, :16], bad)], 2) for name, x in inputs.items()}
    attention_mask = torch.arange(216) < torch.tensor([[200], [200]])
    torch.testing.assert_close(
        hip_attention(**beyond, attention_mask=attention_mask, **SMALL)[:, :, :192], clean[:, :, :192]
    )


def test_heads_of_a_group_share_the_best_of_their_scores():
    query, key, value = tensors(batch=2, heads=6, kv_heads=3)
    _, mask = hip_attention(query, key, value, return_mask=True, head_group_size=2, **SMALL)
    assert torch.equal(mask.blocks[:, 0::2], mask.blocks[:, 1::2])
    _, oracle = hip_attention(query, key, value, return_mask=True, head_group_size=2, sample_method="oracle", **SMALL)
    maxima = block_maxima(query, key, oracle, 2).unflatten(1, (3, 2)).amax(2)
    best = maxima[:, :, -1].topk(16).indices.sort(-1).values
    assert torch.equal(oracle.blocks[:, ::2, -1].long(), best)
    _, own = hip_attention(query, key, value, return_mask=True, **SMALL)
    assert not torch.equal(own.blocks[:, 0], own.blocks[:, 1])
    _, everything = hip_attention(query, key, value, return_mask=True, head_group_size=6, **SMALL)
    assert (everything.blocks == everything.blocks[:, :1]).all()


def test_every_other_key_of_a_block_is_scored():
    key = torch.tensor([5.0, 9.0, 2.0, 8.0, 3.0, 0.0, 6.0, 0.0, 0.0]).view(1, 1, 9, 1)
    sizes = {"top_k": 4, "block_size_q": 1, "block_stride_q": 1, "sliding_window": 1, "num_sink_tokens": 0}
    choose = lambda stride: hip_attention(  # noqa: E731
        torch.ones(1, 1, 1, 1), key, key, return_mask=True, block_stride_k=stride, **sizes
    )[1].blocks.flatten()
    assert choose(1).tolist() == [0, 1]
    assert choose(2).tolist() == [0, 3]


def tree_choice(query, key, real, sample_method, top_k, block_size_q, block_stride_q, block_size_k, block_stride_k,
                sliding_window, num_sink_tokens):  # fmt: skip
    """Blocks that the tree chooses for one head, for each query block: the card's section 3.1, token by token."""
    queries, keys = len(query), len(key)
    first, last = int(real.int().argmax()), int((real * torch.arange(1, keys + 1)).max())
    origin, window = first + num_sink_tokens, max(sliding_window, block_size_q - 1)
    scores, choices = query @ key.T, []
    for begin in range(0, queries, block_size_q):
        size = min(block_size_q, queries - begin)
        rows = min(max(last - (keys - queries + begin), 1), size)
        searchable = max(0, keys - queries + begin + rows - window - origin)
        blocks, nodes = -(-searchable // block_size_k), -(-top_k // block_size_k)
        if blocks <= nodes:
            choices.append(list(range(blocks)))
            continue
        voters = list(range(min(block_stride_q, size) - 1, rows, block_stride_q)) or [rows - 1]
        bounds = [j * blocks // nodes for j in range(nodes + 1)]
        tree = [(low, high - low) for low, high in itertools.pairwise(bounds)]

        def score(start, size, begin=begin, voters=voters):
            block = start + {"center": size // 2, "first": 0, "last": size - 1}[sample_method]
            best = -3.4028234663852886e38
            for token in range(origin + block * block_size_k, origin + (block + 1) * block_size_k, block_stride_k):
                for row in voters:
                    if token < keys and real[token] and token <= keys - queries + begin + row - window:
                        best = max(best, float(scores[begin + row, token]))
            return best

        while max(size for _, size in tree) > 1:
            halves = [half for s, n in tree for half in ((s, n // 2), (s + n // 2, n - n // 2)) if half[1] > 0]
            order = sorted(range(len(halves)), key=lambda i, halves=halves: (-score(*halves[i]), i))
            tree = sorted(halves[i] for i in order[:nodes])
        choices.append([start for start, _ in tree])
    return choices


@pytest.mark.parametrize("sample_method", ["center", "first", "last"])
@pytest.mark.parametrize(
    ("queries", "keys", "padded", "sizes"),
    [
        (150, 150, False, {}),
        (90, 190, True, {"top_k": 9, "block_size_k": 3, "block_stride_k": 2, "num_sink_tokens": 0}),
        (100, 140, True, {"top_k": 5, "block_size_k": 1, "block_size_q": 24, "block_stride_q": 7}),
        (3, 190, False, {"sliding_window": 0}),
    ],
)
def test_tree_by_its_definition(sample_method, queries, keys, padded, sizes):
    query, key, value = tensors(batch=2, heads=2, kv_heads=1, queries=queries, keys=keys, dtype=torch.float64)
    real = torch.ones(2, keys, dtype=torch.bool)
    if padded:
        real = (torch.arange(keys) >= torch.tensor([[0], [9]])) & (
            torch.arange(keys) < torch.tensor([[keys - 7], [keys]])
        )
        real[0, 40] = False
    sizes = {**SMALL, "block_stride_k": 1, **sizes, "sample_method": sample_method}
    _, mask = hip_attention(query, key, value, attention_mask=real if padded else None, return_mask=True, **sizes)
    searched = 0
    for row in range(2):
        for head in range(2):
            want = tree_choice(query[row, head], key[row, 0], real[row], **sizes)
            found = [[x for x in block if x >= 0] for block in mask.blocks[row, head].tolist()]
            assert found == want
            searched += sum(len(block) == -(-sizes["top_k"] // sizes["block_size_k"]) for block in want)
    assert searched >= 4


def scan(means, key, left, right, origin, real, chunk_size):
    """The scan of one chunk, token by token."""
    best = -math.inf

    def score(token):
        return float((means @ key[origin + token]).max()) if real[origin + token] else -3.4028234663852886e38

    while chunk_size >= 1:
        middle = (left + right) // 2
        of_left, of_right = score((left + middle) // 2), score((middle + right) // 2)
        best = max(best, of_right if of_right >= of_left else of_left)
        left, right = (middle, right) if of_right >= of_left else (left, middle)
        chunk_size //= 2
    return best


def staged_choice(query, key, stages, top_k, window, sinks, real):
    """Chunks that the staged scan chooses for one head, for each block of the last stage: the definition."""
    queries, keys = len(query), len(key)
    origin = int(real.int().argmax()) + sinks
    last = int((real * torch.arange(1, keys + 1)).max())
    rows_of_last = min(stages[-1][0], queries)
    choices = []
    for block in range(-(-queries // rows_of_last)):
        kept = []
        for number, (block_size, stride, chunk, _) in enumerate(stages):
            rows = min(block_size, queries)
            first = block * rows_of_last // rows * rows
            real_rows = min(max(last - (keys - queries + first), 1), rows)
            end = keys - queries + first + real_rows - window - origin
            means = torch.stack(
                [query[first + j : first + min(j + stride, real_rows)].mean(0) for j in range(0, real_rows, stride)]
            )
            if number == 0:
                starts = list(range(0, max(0, keys - window - sinks), chunk))
            else:
                starts = [start + piece for start in kept for piece in range(0, stages[number - 1][2], chunk)]
            scores = [
                scan(means, key, x, min(x + chunk, end), origin, real, chunk) if x < end else -math.inf for x in starts
            ]
            budget = top_k if number == len(stages) - 1 else stages[number + 1][3]
            best = sorted(range(len(starts)), key=lambda x: (-scores[x], x))[: -(-budget // chunk)]
            kept = sorted(starts[x] for x in best if scores[x] > -math.inf)
        choices.append([start // stages[-1][2] for start in kept])
    return choices


@pytest.mark.parametrize(
    ("stages", "top_k", "queries", "keys", "padded"),
    [
        ([(16, 4, 32, None), (16, 2, 8, 96), (16, 1, 2, 40)], 16, 150, 190, False),
        ([(16, 4, 16, None), (8, 8, 4, 64)], 20, 90, 120, True),
        ([(64, 4, 32, None)], 64, 10, 140, False),
        ([(1, 1, 8, None), (1, 1, 2, 32)], 6, 5, 140, True),
    ],
)
def test_staged_scan_by_its_definition(stages, top_k, queries, keys, padded):
    query, key, value = tensors(batch=2, queries=queries, keys=keys, dtype=torch.float64)
    real = torch.ones(2, keys, dtype=torch.bool)
    if padded:
        real = (torch.arange(keys) >= torch.tensor([[0], [9]])) & (
            torch.arange(keys) < torch.tensor([[keys - 7], [keys]])
        )
        real[0, 40] = False
    sizes = {"sliding_window": 20, "num_sink_tokens": 3, "attention_mask": real if padded else None}
    output, mask = hip_attention(query, key, value, stages=stages, top_k=top_k, return_mask=True, **sizes)
    window = max(20, stages[0][0] - 1)
    for row in range(2):
        for head in range(4):
            want = staged_choice(query[row, head], key[row, head // 2], stages, top_k, window, 3, real[row])
            assert [[x for x in block if x >= 0] for block in mask.blocks[row, head].tolist()] == want
    torch.testing.assert_close(output, dense(query, key, value, mask.dense()), atol=1e-9, rtol=1e-9)
    assert not (mask.dense() & ~causal(queries, keys)).any()


def test_staged_scan_is_dense_when_the_budgets_suffice_and_causal_when_they_do_not():
    stages = [(16, 4, 32, None), (16, 2, 8, 320)]
    inputs = tensors(queries=300)
    whole = hip_attention(*inputs, stages=stages, top_k=320, sliding_window=20, num_sink_tokens=3)
    torch.testing.assert_close(whole, dense(*inputs, causal(300, 300)), atol=1e-5, rtol=0)
    options = {"stages": stages, "top_k": 32, "sliding_window": 20, "num_sink_tokens": 3}
    output = hip_attention(*inputs, **options)
    changed = [x.clone() for x in inputs]
    changed[1][:, :, 201:] *= -3
    changed[2][:, :, 201:] += 1
    assert torch.equal(hip_attention(*changed, **options)[:, :, :201], output[:, :, :201])
    padded = [torch.cat([torch.ones_like(x[:, :, :32]), x], 2) for x in inputs]
    attention_mask = left_padding(1, 332, [32])
    shifted = hip_attention(*padded, attention_mask=attention_mask, **options)
    torch.testing.assert_close(shifted[:, :, 32:], output, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("queries", "keys", "padding", "sizes"),
    [
        (200, 200, None, {}),
        (70, 333, [0, 60], {"block_size_q": 5, "block_size_k": 3, "num_sink_tokens": 0}),
        (130, 300, [11, 200], {"block_size_q": 96, "sliding_window": 0}),
    ],
)
def test_block_mask_for_flex_attention_is_exact(queries, keys, padding, sizes):
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    query, key, value = tensors(batch=2, queries=queries, keys=keys)
    attention_mask = None if padding is None else left_padding(2, keys, padding)
    output, mask = hip_attention(query, key, value, attention_mask=attention_mask, return_mask=True, **SMALL | sizes)
    block_mask = mask.to_block_mask()
    assert torch.equal(create_mask(block_mask.mask_mod, 2, 4, queries, keys, device="cpu"), mask.dense())
    covered = block_mask.to_dense().bool().repeat_interleave(64, 2).repeat_interleave(128, 3)[:, :, :queries, :keys]
    assert not (mask.dense() & ~covered).any()
    seen = mask.dense().any(-1)
    flex = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
    torch.testing.assert_close(flex[seen], output[seen], atol=1e-5, rtol=1e-5)


def flops(tokens):
    query, key, value = tensors(heads=1, kv_heads=1, queries=tokens, dim=64)
    with FlopCounterMode(display=False) as counter:
        mask = hip_attention(query, key, value, return_mask=True)[1]
    attend = FlopCounterMode(display=False)
    with attend:
        hip_attention(query, key, value, mask=mask)
    dots = (counter.get_total_flops() - attend.get_total_flops()) / (2 * 64)
    return dots, mask.keys_read().sum().item()


def test_number_of_dot_products():
    search, attention = flops(4096)
    everything = 4096 * 4097 / 2
    assert search / everything == pytest.approx(0.48, abs=0.02)
    assert (search + attention) / everything == pytest.approx(0.85, abs=0.03)
    # In the second half of twice the length a query costs four rounds of top_k, where in the last quarter it was three.
    longer, _ = flops(8192)
    assert (longer - search) / 4096 == pytest.approx(4 * 512, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 200, 16)}, "query must be"),
        ({"query": torch.zeros(1, 4, 200, 16, dtype=torch.long)}, "floating-point"),
        ({"query": torch.zeros(1, 4, 200, 8)}, "key must be"),
        ({"query": torch.zeros(2, 4, 200, 16)}, "key must be"),
        ({"query": torch.zeros(1, 3, 200, 16)}, "not a multiple"),
        ({"query": torch.zeros(1, 4, 201, 16)}, "201 rows"),
        ({"query": torch.zeros(1, 0, 200, 16)}, "no heads"),
        ({"block_stride_k": 3}, "block_stride_k"),
        ({"head_group_size": 3}, "head_group_size"),
        ({"stages": []}, "stages must be"),
        ({"stages": [(64, 4, 256, 512)]}, "stages must be"),
        ({"stages": [(64, 4, 256, None), (48, 4, 32, 1024)]}, "stages must be"),
        ({"stages": [(64, 4, 256, None), (64, 4, 32, None)]}, "stages must be"),
        ({"stages": [(64, 4, 96, None)]}, "stages must be"),
        ({"key": torch.zeros(1, 2, 200, 16, dtype=torch.float64)}, "key is torch.float64"),
        ({"value": torch.zeros(1, 2, 199, 16)}, "value must be"),
        ({"value": torch.zeros(1, 1, 200, 16)}, "value must be"),
        ({"attention_mask": torch.ones(1, 199, dtype=torch.bool)}, "attention_mask must be bool"),
        ({"attention_mask": torch.ones(1, 200)}, "attention_mask must be bool"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"block_size_q": 0}, "block_size_q"),
        ({"block_stride_q": 65}, "block_stride_q"),
        ({"block_size_k": -1}, "block_size_k"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"),
        ({"sample_method": "middle"}, "sample_method"),
        ({"scale": 0.0}, "scale"),
        ({"softcap": -1.0}, "softcap"),
        ({"sink_logits": torch.zeros(2)}, "sink_logits"),
        ({"sink_logits": [0.0] * 4}, "sink_logits"),
        ({"stages": [64]}, "stages must be"),
        ({"impl": "triton"}, "takes D and Dv of 16"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    query, key, value = tensors()
    with pytest.raises(ValueError, match=message):
        hip_attention(**{"query": query, "key": key, "value": value} | change)
