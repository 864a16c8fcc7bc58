"""The kernels of a captured step under the interpreter: what the tensor operations give that they stand for."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

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
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]


def test_settling_and_ancestors():
    interpreted("""
        from heedful.decoding.device_walk import settle
        from heedful.decoding.draft_kernels import write_trees
        from heedful.decoding.graph import Trees
        from heedful.decoding.settle_rows import settle_rows
        deep = 0
        for case in range(60):
            batch, nodes = 1 + case % 3, 66 if case % 20 == 0 else 1 + case % 13
            parents, ancestors, depth = random_trees(batch, nodes)
            tokens, choices = torch.randint(0, 3, (2, batch, nodes))
            want, got = (Trees(batch, nodes, torch.device("cpu")) for _ in range(2))
            want.write(tokens, parents)
            write_trees(tokens, parents, depth, got.tokens, got.parents, got.ancestors)
            assert torch.equal(want.ancestors, ancestors)
            for name in ("tokens", "parents", "ancestors"):
                assert torch.equal(getattr(want, name), getattr(got, name)), name
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


def test_rows_that_are_written():
    interpreted("""
        from heedful.decoding.cache import put_rows
        from heedful.decoding.write_rows import write_rows
        for width, others, rows in ((16, 16, 5), (24, 10, 1), (64, 64, 9)):
            batch, heads = 3, 2
            new = [torch.randn(batch, rows, heads, d).transpose(1, 2) for d in (width, others)]
            old = [torch.randn(batch, heads, 30, d) for d in (width, others)]
            places = torch.stack([torch.randperm(30) for _ in range(batch)])[:, 3 : 3 + rows]
            want, got = ([x.clone() for x in old] for _ in range(2))
            put_rows(*want, *new, places)
            write_rows(*got, *new, places)
            for a, b, before in zip(want, got, old):
                assert torch.equal(a, b) and not torch.equal(a, before)
        print("fine")
    """)


def test_rotations():
    interpreted("""
        from heedful.decoding import beam_kernels, longspec
        for batch, heads, rows, width in ((1, 6, 4, 64), (2, 3, 5, 16), (2, 4, 1, 32)):
            x = torch.randn(batch, rows, heads, width).transpose(1, 2)
            for turned in (rows, 1):
                angles = torch.rand(batch, turned, width // 2) * 9
                want = longspec._rotate(x, longspec._turns(angles))
                got = beam_kernels.rotate(x, *longspec._turns(angles))
                assert torch.allclose(want, got, atol=1e-5)
        print("fine")
    """)


def test_growing_a_beam():
    interpreted("""
        from heedful.decoding import beam_kernels, longspec
        for batch, shape, vocabulary in ((1, (4, 6, 6), 50), (2, (3, 8, 5), 2100), (1, (1, 1, 1), 1030), (2, (16, 16), 40)):
            nodes, inner = 1 + sum(shape), 1 + sum(shape[:-1])
            trees = []
            for _ in range(2):
                seen = torch.eye(inner, dtype=torch.bool).repeat(batch, 1, 1)
                trees.append((torch.zeros(batch, nodes).long(), torch.full((batch, nodes), -1), seen))
            scores, begin, end = torch.zeros(batch, 1), 0, 1
            for width in shape:
                logits = 3 * torch.randn(batch, end - begin, vocabulary)
                logits[:, :, 5:9] = -torch.inf  # as of tokens that a model never gives
                logits = torch.nn.functional.pad(logits, (0, 7))[..., :vocabulary]  # with a stride
                want = longspec._grow(logits, scores, *trees[0], begin, width)
                got = beam_kernels.grow(logits, scores, *trees[1], begin, width)
                assert torch.allclose(want, got, atol=1e-4)
                for a, b in zip(*trees):
                    assert torch.equal(a, b)
                scores, begin, end = want, end, end + width
        print("fine")
    """)


def test_in_the_loop():
    """Whole generates with the kernels in the place of the operations: the same tokens, and the same drafts accepted."""
    interpreted("""
        from functools import partial
        import heedful
        from heedful.decoding import PromptLookup, Sequence, TokenRecycling, draft_kernels, graph
        from heedful.decoding.generate import _Run
        from heedful.decoding.on_device import LookupOnDevice, RecyclingOnDevice
        from heedful.decoding.settle_rows import settle_rows
        from tiny_models import build, inputs
        _Run._engine_class = lambda self, *_: partial(graph.GraphEngine, capture=False)
        model = build("llama", dtype=torch.float64)
        given = inputs(model, batch=3, length=11, padding="left")
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options["eos_token_id"] = [int(model.generate(**given, **options)[0, -7])]
        reference, accepted = model.generate(**given, **options), []

        def settle(self, t, choices):
            own = (self.end_tokens, self.lengths, self.positions, self.remaining, self.finished, self.capacity)
            return settle_rows(t.tokens, t.parents, t.ancestors, choices, t.path_length, *own)

        def write(self, tokens, parents):
            draft_kernels.write_trees(tokens, parents, self.path_length - 1, self.tokens, self.parents, self.ancestors)

        def advance(self, s):
            sizes = (self.num_nodes, self.max_ngram_size, self.num_tokens_short)
            return draft_kernels.look_up(self.text, s.tokens, s.path, s.count, s.roots, s.lengths, *sizes)

        def read(self, roots):
            return draft_kernels.read_template(self.tokens, self.shares, roots, self.paths, self.above, self.num_nodes)

        for kernels in (False, True):
            if kernels:
                graph.Session._settle, graph.Trees.write = settle, write
                LookupOnDevice.advance, RecyclingOnDevice.read = advance, read
            heedful.decoding.release_graphs()
            drafter = Sequence(PromptLookup(), TokenRecycling(max_nodes=60))
            for _ in range(2):  # a session that is used again begins anew
                result = heedful.generate(model, drafter=drafter, **given, **options)
                assert torch.equal(result.sequences, reference)
                accepted.append(result.stats.accepted)
        assert accepted[:2] == accepted[2:]
        assert max(n for row in accepted[1] for n in row) > 2
        print("fine")
    """)
