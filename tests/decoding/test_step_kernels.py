"""The kernels of a captured step under the interpreter: what the tensor operations give that they stand for."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")
TREES = """
import torch
from heedful.decoding.device_walk import ancestors_of

torch.manual_seed(0)


def random_trees(batch, nodes):
    parents = torch.full((batch, nodes), -1)
    for row in parents:  # some nodes only fill the tree up
        for i in range(1, nodes):
            known = [0, *(j for j in range(1, i) if row[j] >= 0)]
            if torch.rand(()) < 0.85:
                row[i] = known[int(torch.randint(len(known), ()))]
    ancestors = ancestors_of(parents)
    return parents, ancestors, int(((ancestors.sum(-1) - 1) * (parents >= 0)).max())
"""


def interpreted(code):
    run = subprocess.run(
        [sys.executable, "-c", TREES + textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]


def test_settling_and_ancestors():
    interpreted("""
        from heedful.decoding.device_walk import settle
        from heedful.decoding.draft_kernels import write_ancestors
        from heedful.decoding.settle_rows import settle_rows
        deep = 0
        for case in range(60):
            batch, nodes = 1 + case % 3, 66 if case % 20 == 0 else 1 + case % 13
            parents, ancestors, depth = random_trees(batch, nodes)
            written = torch.zeros_like(ancestors)
            write_ancestors(parents, depth, written)
            assert torch.equal(written, ancestors)
            tokens, choices = torch.randint(0, 3, (2, batch, nodes))
            ends = torch.full((8,), -1)
            ends[0] = 2 if case % 3 == 0 else -1
            remaining = torch.randint(1, 6, (batch,)) if case % 2 else torch.full((batch,), 50)
            state = [*torch.randint(0, 60, (2, batch)), remaining, torch.rand(batch) < 0.3]
            results = []
            for function in (settle, settle_rows):
                own = [x.clone() for x in state]
                out = function(tokens, parents, ancestors, choices, min(nodes, depth + 1 + case % 3), ends, *own, 64)
                results.append(own + [getattr(out, name) for name in out.__slots__])
            for want, got in zip(*results, strict=True):
                assert torch.equal(want, got), case
            deep += int((out.count > 2).sum())
        assert deep > 5
        print("fine")
    """)


def test_looking_up():
    interpreted("""
        from heedful.decoding.draft_kernels import look_up
        from heedful.decoding.drafter import DeviceStep, DraftingOutputs
        from heedful.decoding.on_device import LookupOnDevice
        found = 0
        for case in range(16):
            batch, drafted, sizes = 1 + case % 3, 1 + case % 10, 1 + case % 4
            capacity, length = (2300, 2200) if case % 8 == 0 else (70, 25 - case)
            drafter = LookupOnDevice(batch, capacity, drafted, sizes, drafted // 2, torch.device("cpu"))
            tokens = torch.randint(0, 30 if length > 1000 else 4, (batch, length))
            padding = torch.arange(length) >= torch.randint(0, length // 2, (batch, 1))
            drafter.prefill(tokens, DraftingOutputs(attention_mask=padding.long()))
            text, lengths = drafter.text.clone(), torch.full((batch,), length)
            count, path, verified = torch.ones(batch).long(), torch.zeros(batch, 1).long(), tokens[:, -1:].contiguous()
            for _ in range(4):
                roots = torch.randint(0, 4, (batch,))
                step = DeviceStep(verified, None, None, path, count, roots, lengths, lengths, None)
                want = drafter.advance(step)
                got = look_up(text, verified, path, count, roots, lengths, drafted + 1, sizes, drafted // 2)
                assert torch.equal(text, drafter.text), case
                assert torch.equal(want[0], got[0]), case
                assert torch.equal(want[1], got[1]), case
                found += int((got[1] >= 0).sum())
                count = torch.randint(1, drafted + 2, (batch,))
                path = torch.minimum(torch.arange(drafted + 1), count[:, None] - 1)
                verified, lengths = torch.randint(0, 4, (batch, drafted + 1)), lengths + count
        assert found > 50
        print("fine")
    """)


def test_reading_the_template():
    interpreted("""
        from heedful.decoding import TokenRecycling
        from heedful.decoding.draft_kernels import read_template
        from heedful.decoding.drafter import DeviceStep
        from heedful.decoding.on_device import RecyclingOnDevice
        known = 0
        for case in range(12):
            batch, vocabulary = 1 + case % 3, 40
            drafter = RecyclingOnDevice(TokenRecycling().template, vocabulary, 8, 2 + 7 * case, torch.device("cpu"))
            for _ in range(3):
                nodes = drafter.num_nodes
                logits = 3 * torch.randn(batch, nodes, vocabulary + 3)
                logits = logits.round() if case % 2 else logits  # equal shares
                tokens, roots = torch.randint(0, vocabulary + 3, (batch, nodes)), torch.randint(0, vocabulary + 3, (batch,))
                count = torch.randint(1, 4, (batch,))
                path = torch.minimum(torch.arange(4), count[:, None] - 1).clamp(max=nodes - 1)
                step = DeviceStep(tokens, logits, None, path, count, roots, count, count, None)
                want, parents = drafter.advance(step)
                got = read_template(drafter.tokens, drafter.shares, roots, drafter.paths, drafter.above, nodes)
                assert torch.equal(parents, got[1]), case
                used = parents >= 0
                assert torch.equal(want[used], got[0][used]), case
                assert torch.equal(got[0][:, 0], roots), case
                known += int(used.sum())
        assert known > 100
        print("fine")
    """)
