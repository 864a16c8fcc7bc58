"""Tree attention against one dense masked softmax; the Triton kernels under the interpreter."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.attention import merge_attention_states, tree_attention


def random_tree(nodes, generator, batch=None):
    masks = []
    for _ in range(batch or 1):
        mask = torch.eye(nodes, dtype=torch.bool)
        for node in range(1, nodes):
            mask[node] |= mask[int(torch.randint(node, (), generator=generator))]
        masks.append(mask)
    return torch.stack(masks) if batch else masks[0]


def dense(query, key, value, tree_mask, prefix, start=None, window=None, softcap=None, scale=None):
    """One softmax over all keys, with the whole mask: the definition."""
    batch, heads, nodes, dim = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    tree_mask = tree_mask.expand(batch, nodes, nodes)
    seen = torch.zeros(batch, nodes, key.shape[2], dtype=torch.bool)
    for row in range(batch):
        length, first = int(prefix[row]), 0 if start is None else int(start[row])
        depth = tree_mask[row].sum(-1) - 1
        at = torch.arange(length)
        seen[row, :, :length] = at >= first
        own = tree_mask[row].clone()
        if window is not None:
            seen[row, :, :length] &= at > length + depth[:, None] - window
            own &= depth[None, :] > depth[:, None] - window
        seen[row, :, length : length + nodes] = own
    scores = query @ torch.where(seen.any(1)[:, None, :, None], key, 0.0).mT * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return weights @ torch.where(seen.any(1)[:, None, :, None], value, 0.0)


def tensors(batch, kv_heads, groups, nodes, keys, dim, generator):
    query = torch.randn(batch, kv_heads * groups, nodes, dim, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, batch, kv_heads, keys, dim, dtype=torch.float64, generator=generator)
    return query, key, value


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), groups=st.sampled_from([1, 3, 4]), nodes=st.integers(1, 9),
    dim=st.sampled_from([1, 5, 16]), data=st.data(),
)  # fmt: skip
def test_reference_is_one_dense_softmax(batch, kv_heads, groups, nodes, dim, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    prefix = torch.tensor([data.draw(st.integers(0, 12)) for _ in range(batch)])
    start = torch.tensor([data.draw(st.integers(0, int(p))) for p in prefix]) if data.draw(st.booleans()) else None
    window = data.draw(st.sampled_from([None, 1, 3, 50]))
    softcap = data.draw(st.sampled_from([None, 2.0]))
    query, key, value = tensors(batch, kv_heads, groups, nodes, 12 + nodes + 3, dim, generator)
    for row in range(batch):  # behind the tree there is garbage
        key[row, :, prefix[row] + nodes :] = torch.nan
        value[row, :, prefix[row] + nodes :] = torch.nan
    mask = random_tree(nodes, generator, batch if data.draw(st.booleans()) else None)
    got = tree_attention(query, key, value, mask, prefix, prefix_start=start, window=window, softcap=softcap)
    assert torch.allclose(got, dense(query, key, value, mask, prefix, start, window, softcap), atol=1e-10)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize(("nodes", "prefix"), [(1, [0, 1]), (1, [9, 4]), (7, [0, 12]), (7, [1, 12])])
def test_precision(groups, nodes, prefix):
    """The card's bounds. Halves: an output that is computed in float32 and rounded once."""
    generator = torch.Generator().manual_seed(0)
    inputs = tensors(2, 2, groups, nodes, 20, 16, generator)
    mask, prefix = random_tree(nodes, generator, 2), torch.tensor(prefix)
    mask[1, -1] = False  # sees nothing of the tree; no prefix either gives 0
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 2e-3)):
        given = [x.to(dtype) for x in inputs]
        want = dense(*(x.double() for x in given), mask, prefix)
        got = tree_attention(*given, mask, prefix)
        assert got.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * want.abs() if dtype.itemsize == 2 else 0
        assert ((got.double() - want).abs() <= bound + rounding).all()
    none = tree_attention(*inputs, torch.zeros(nodes, nodes, dtype=torch.bool), 0)
    assert torch.equal(none, torch.zeros_like(none))


def test_empty_inputs_give_empty_outputs():
    query, key, value = (x.requires_grad_() for x in tensors(2, 2, 2, 4, 11, 16, torch.Generator().manual_seed(0)))
    mask, lengths = torch.eye(4, dtype=torch.bool), torch.tensor([3, 5])
    none = tree_attention(query[:, :, :0], key, value, mask[:0, :0], lengths)
    assert none.shape == (2, 4, 0, 16)
    none.sum().backward()
    assert tree_attention(query[:0], key[:0], value[:0], mask, lengths[:0]).shape == (0, 4, 4, 16)


@pytest.mark.parametrize("prefix", [5, torch.tensor([5, 3])])
def test_compiles_as_a_whole_with_its_gradients(prefix):
    leaves = [x.requires_grad_() for x in tensors(2, 2, 2, 4, 11, 16, torch.Generator().manual_seed(0))]
    mask = torch.eye(4, dtype=torch.bool)
    mask[1:, 0] = True
    run = lambda *x: tree_attention(*x, mask, prefix, window=4, softcap=3.0)  # noqa: E731
    torch._dynamo.reset()
    ours, theirs = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves), run(*leaves)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    pairs = zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True)
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_stays_in_its_batch_row(which, bad):
    """In a query: its own row. In a node's key: its descendants. In a node's value: the nodes of its heads."""
    generator = torch.Generator().manual_seed(0)
    inputs = tensors(2, 2, 2, 6, 20, 16, generator)
    mask, prefix = random_tree(6, generator), torch.tensor([8, 11])
    clean = tree_attention(*inputs, mask, prefix)
    changed = [x.clone() for x in inputs]
    node = 2
    changed[which][1, 1, node if which == 0 else prefix[1] + node] = bad
    output = tree_attention(*changed, mask, prefix)
    heads = [1] if which == 0 else [2, 3]
    hurt = torch.zeros(4, 6, dtype=torch.bool)
    hurt[heads] = (torch.arange(6) == node, mask[:, node], torch.ones(6, dtype=torch.bool))[which]
    assert torch.equal(output[0], clean[0])
    assert torch.equal(~output[1].isfinite().all(-1), hurt)
    assert torch.equal(output[1][~hurt], clean[1][~hurt])


def test_merging_states_is_exact():
    generator = torch.Generator().manual_seed(0)
    query, key, value = tensors(2, 2, 1, 3, 10, 8, generator)
    scores = query @ key.mT
    parts = []
    for keys in (slice(0, 4), slice(4, 10), slice(0, 0)):
        part = scores[..., keys]
        parts.append((part.softmax(-1) @ value[:, :, keys], part.logsumexp(-1)))
    merged, lse = merge_attention_states(*parts[0], *parts[1])
    assert torch.allclose(merged, scores.softmax(-1) @ value, atol=1e-12)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-12)
    empty, _ = merge_attention_states(
        *parts[0], torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], -torch.inf)
    )
    assert torch.equal(empty, parts[0][0])


def test_gradients_are_those_of_the_dense_form():
    generator = torch.Generator().manual_seed(0)
    leaves = [x.requires_grad_() for x in tensors(2, 1, 2, 4, 11, 6, generator)]
    mask, prefix = random_tree(4, generator), torch.tensor([5, 7])
    weight = torch.randn(2, 2, 4, 6, dtype=torch.float64, generator=generator)
    ours = torch.autograd.grad((tree_attention(*leaves, mask, prefix) * weight).sum(), leaves)
    theirs = torch.autograd.grad((dense(*leaves, mask, prefix) * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_wrong_shapes_and_implementations_are_refused():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (x.float() for x in tensors(1, 2, 2, 4, 11, 16, generator))
    mask = random_tree(4, generator)
    with pytest.raises(ValueError, match="triton"):
        tree_attention(query, key, value, mask, 3, impl="triton")
    with pytest.raises(ValueError, match="impl"):
        tree_attention(query, key, value, mask, 3, impl="fast")
    with pytest.raises(ValueError):
        tree_attention(query[:, :3], key, value, mask, 3)
    with pytest.raises(ValueError):
        tree_attention(query, key, value, mask[:3], 3)


def test_kernels_under_the_interpreter():
    """float32 and float16, one and several shares of the keys, groups, rows of their own length and tree, window, softcap;
    a node that sees nothing; opcheck; the whole call in one graph."""
    code = """
        import torch
        torch.set_num_threads(1)
        from heedful.attention import tree_attention
        from heedful.attention.tree import triton as kernels
        generator = torch.Generator().manual_seed(0)
        for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 3e-3)):
            for batch, kv, groups, nodes, prefix, extra in (
                (1, 1, 1, 1, [70], {}), (2, 2, 3, 9, [90, 0], {}), (1, 1, 4, 20, [50], {"window": 13}),
                (2, 1, 2, 5, [40, 66], {"softcap": 5.0, "prefix_start": torch.tensor([3, 0])}),
            ):
                query = torch.randn(batch, kv * groups, nodes, 16, generator=generator).to(dtype)
                key, value = torch.randn(2, batch, kv, max(prefix) + nodes + 9, 16, generator=generator).to(dtype)
                for row, length in enumerate(prefix):
                    key[row, :, length + nodes :] = torch.nan
                    value[row, :, length + nodes :] = torch.nan
                mask = torch.eye(nodes, dtype=torch.bool)
                for node in range(1, nodes):
                    mask[node] |= mask[(node - 1) // 2]
                if nodes == 9:
                    mask = torch.stack((mask, torch.eye(nodes, dtype=torch.bool)))
                    mask[1, 4] = False
                lengths = torch.tensor(prefix)
                got = tree_attention(query, key, value, mask, lengths, impl="triton", **extra)
                wide = [x.double() for x in (query, key, value)]
                want = tree_attention(*wide, mask, lengths, impl="reference", **extra)
                error = (got.double() - want).norm() / want.norm()
                assert error < bound, (dtype, nodes, prefix, extra, float(error))
                assert nodes != 9 or (got[1, :, 4] == 0).all()  # no prefix either
        torch.library.opcheck(
            kernels.tree_attention_op, (query.float(), key.nan_to_num().float(), value.nan_to_num().float(), mask, lengths, None, 0, 0.0, 0.25),
            test_utils=("test_schema", "test_faketensor"),
        )
        arguments = [x.nan_to_num().float() for x in (query, key, value)]
        run = lambda *x: tree_attention(*x, mask, lengths, softcap=5.0, impl="triton")
        assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(*arguments), run(*arguments))
        arguments[0].requires_grad_()
        try:
            run(*arguments)
        except ValueError as refusal:
            assert "no backward" in str(refusal)
        else:
            raise AssertionError("a gradient was promised")
        print("fine")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]
