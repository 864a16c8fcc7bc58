"""The kernels of tree attention on a CUDA device."""

import pytest
import torch

from heedful.attention import tree_attention

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def tree(nodes):
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        mask[node] |= mask[(node - 1) // 3]
    return mask.cuda()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    *[
        (BF16, 128, *case)
        for case in ((1, 1, 3300), (4, 1, 3300), (4, 16, 3300), (4, 21, 3300), (4, 100, 3300), (1, 128, 3300))
    ],
    *[(BF16, dim, 8, 64, capacity) for dim in (64, 128, 256) for capacity in (700, 3300)],
    *[(BF16, dim, 4, 16, 3300) for dim in (16, 32)],
    *[(FP16, 128, 4, 16, 3300), (FP16, 64, 8, 64, 3300), (FP32, 64, 4, 16, 3300), (FP32, 128, 8, 64, 700)],
]


@pytest.mark.parametrize(("dtype", "dim", "groups", "nodes", "capacity"), CASES)
def test_error(dtype, dim, groups, nodes, capacity):
    torch.manual_seed(0)
    query = torch.randn(2, 2 * groups, nodes, dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, 2, 2, capacity, dim, device="cuda", dtype=dtype)
    lengths = torch.tensor([capacity - 301, 5], device="cuda")
    for row, length in enumerate(lengths.tolist()):
        key[row, :, length + nodes :] = torch.nan
        value[row, :, length + nodes :] = torch.nan
    start = torch.tensor([17, 5], device="cuda")
    for extra in ({}, {"window": 40, "softcap": 20.0, "prefix_start": start}):
        got = tree_attention(query, key, value, tree(nodes), lengths, impl="triton", **extra).double()
        wide = [x.double() for x in (query, key, value)]
        want = tree_attention(*wide, tree(nodes), lengths, impl="reference", **extra)
        assert (got - want).norm() / want.norm() < BOUNDS[dtype]


def test_a_captured_call_follows_the_length():
    torch.manual_seed(0)
    query = torch.randn(1, 8, 16, 128, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 2, 2000, 128, device="cuda", dtype=torch.bfloat16)
    lengths, mask = torch.tensor([100], device="cuda"), tree(16)
    tree_attention(query, key, value, mask, lengths, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention(query, key, value, mask, lengths, impl="triton")
    for length in (0, 77, 1900):
        lengths.fill_(length)
        graph.replay()
        want = tree_attention(query, key, value, mask, lengths, impl="triton")
        assert torch.equal(out, want)


def test_offsets_beyond_two_to_the_31():
    torch.manual_seed(0)
    nodes, prefix = 8, 2**31 // (2 * 128) + 1000
    query = torch.randn(1, 8, nodes, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.zeros(1, 2, prefix + nodes, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    end = slice(prefix - 700, prefix + nodes)
    for states in (key, value):
        states[:, :, end].normal_()
    assert key[0, 1, prefix:].storage_offset() > 2**31
    start = torch.tensor([prefix - 700], device="cuda")
    got = tree_attention(query, key, value, tree(nodes), prefix, prefix_start=start, impl="triton")
    few = [states[:, :, end].double() for states in (key, value)]
    want = tree_attention(query.double(), *few, tree(nodes), 700, impl="reference")
    assert (got.double() - want).norm() / want.norm() < BOUNDS[torch.bfloat16]
