"""The Triton kernels of HiP attention under the interpreter: choices, outputs, decoding, registration, compilation."""

import os
import subprocess
import sys
import textwrap


def interpret(code):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMON) + textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip().endswith("fine"), run.stdout[-1000:] + run.stderr[-3000:]


COMMON = """
    import torch
    torch.set_num_threads(1)
    from heedful.attention import hip_attention
    from heedful.attention.hip import triton as kernels
    from heedful.attention.hip.decode import HiPDecodeState, hip_decode
    generator = torch.Generator().manual_seed(0)
    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)
    def error(got, want):
        return float((got.double() - want.double()).norm() / want.double().norm())
    SIZES = {"top_k": 32, "block_size_q": 32, "sliding_window": 20, "num_sink_tokens": 3}
"""


def test_choices_and_outputs_are_those_of_the_reference():
    interpret("""
        real = (torch.arange(160) >= torch.tensor([[5], [37]])) & (torch.arange(160) < torch.tensor([[160], [153]]))
        real[:, 60] = False
        for dtype, bound, shape, options in (
            (torch.float32, 1e-5, (1, 1, 2, 150, 150), {}),
            (torch.float16, 3e-3, (2, 1, 1, 90, 150), {"block_stride_k": 2, "sample_method": "first"}),
            (torch.float32, 1e-5, (2, 1, 4, 70, 160), {
                "block_size_k": 3, "block_size_q": 24, "block_stride_q": 5, "softcap": 5.0, "sample_method": "last",
                "sink_logits": draw(4), "attention_mask": real, "head_group_size": 2,
            }),
            (torch.float32, 1e-5, (1, 1, 1, 1, 130), {"block_size_q": 1, "block_stride_q": 1, "num_sink_tokens": 0}),
        ):
            batch, kv, groups, queries, keys = shape
            inputs = draw(batch, kv * groups, queries, 16), draw(batch, kv, keys, 16), draw(batch, kv, keys, 32)
            inputs = [x.to(dtype) for x in inputs]
            options = SIZES | options | {"return_mask": True}
            output, mask = hip_attention(*inputs, impl="triton", **options)
            expected, expected_mask = hip_attention(*(x.double() for x in inputs), impl="reference", **options)
            assert torch.equal(mask.blocks, expected_mask.blocks)
            assert torch.equal(mask.search_end, expected_mask.search_end)
            assert error(output, expected) < bound, options
            if queries == 150:  # ties are broken by position; a choice serves younger rows
                ones = torch.ones(1, 1, 120, 16)
                tied = [hip_attention(ones, ones, ones, impl=impl, **options)[1] for impl in ("triton", "reference")]
                assert torch.equal(tied[0].blocks, tied[1].blocks)
                early = [x[:, :, :130] for x in inputs]
                _, mask = hip_attention(*early, impl="triton", **options)
                row = inputs[0][:, :, -1:]
                later = [hip_attention(row, *inputs[1:], mask=mask, impl=impl) for impl in ("triton", "reference")]
                assert error(*later) < bound
        print("fine")
    """)


def test_bad_numbers_stay_where_they_are_attended():
    interpret("""
        inputs = [draw(2, 1, 110, 16) for _ in range(3)]
        clean = hip_attention(*inputs, impl="triton", **SIZES)
        for which, place in ((0, 70), (1, 70), (2, 1)):
            changed = [x.clone() for x in inputs]
            changed[which][1, 0, place] = torch.nan
            output, mask = hip_attention(*changed, impl="triton", return_mask=True, **SIZES)
            block = place // 32 * 32
            assert torch.equal(output[0], clean[0])
            assert torch.equal(output[1, :, :block], clean[1, :, :block])
            assert output[1, :, place].isnan().all()
            assert mask.blocks.max() < 55 and mask.blocks.min() >= -1
        print("fine")
    """)


def test_staged_scan():
    interpret("""
        real = torch.arange(120) >= torch.tensor([[0], [9]])
        query, key, value = draw(2, 2, 40, 16), draw(2, 1, 120, 16), draw(2, 1, 120, 16)
        options = {
            "stages": [(16, 4, 16, None), (8, 8, 4, 48)], "top_k": 20, "sliding_window": 20, "num_sink_tokens": 3,
            "attention_mask": real, "return_mask": True, "head_group_size": 2,
        }
        output, mask = hip_attention(query, key, value, impl="triton", **options)
        expected, expected_mask = hip_attention(query.double(), key.double(), value.double(), **options)
        assert torch.equal(mask.blocks, expected_mask.blocks)
        assert error(output, expected) < 1e-5
        print("fine")
    """)


def test_decoding():
    interpret("""
        for dtype, bound, shared in ((torch.float32, 1e-5, 2), (torch.float16, 3e-3, 1)):
            key, value = draw(2, 2, 2, 150, 16).to(dtype)
            options = {"refresh_interval": 2, "softcap": 7.0, "sink_logits": draw(4)}
            sizes = {"top_k": 32, "sliding_window": 20, "num_sink_tokens": 3, "head_group_size": shared}
            states = [HiPDecodeState(2, 4, 150, **sizes) for _ in range(2)]
            for length in (9, 120, 121, 100):
                query = draw(2, 4, 1, 16).to(dtype)
                lengths, first = torch.tensor([length, length - 3]), torch.tensor([0, 4])
                keys, values = key.clone(), value.clone()
                for x in (keys, values):
                    x[:, :, length:] = torch.nan
                    x[1, :, :4] = torch.nan
                got = hip_decode(query, keys, values, lengths, states[0], impl="triton", first_real=first, **options)
                wide = (x.double() for x in (query, keys, values))
                want = hip_decode(*wide, lengths, states[1], impl="reference", first_real=first, **options)
                for name in ("blocks", "chosen_at", "refreshes"):
                    assert torch.equal(getattr(states[0], name), getattr(states[1], name)), (length, name)
                assert error(got, want) < bound, length
        print("fine")
    """)


def test_operators_are_registered_and_trace_as_a_whole():
    interpret("""
        query, key, value = draw(1, 2, 20, 16), draw(1, 1, 60, 16), draw(1, 1, 60, 16)
        checks = {"test_utils": ("test_schema", "test_faketensor")}
        blocks = kernels.choose_op(query, key, None, None, None, 8, 16, 2, 2, 1, 15, 3, 1, 1)
        end = torch.full((1, 2), 30)
        torch.library.opcheck(kernels.choose_op, (query, key, None, None, None, 8, 16, 2, 2, 1, 15, 3, 1, 1), **checks)
        arguments = (query, key, value, blocks, end, None, None, None, 0.25, 0.0, 16, 2, 15, 3, False)
        torch.library.opcheck(kernels.attend_op, arguments, **checks)
        stages = [16, 8, 8, 0, 16, 8, 4, 32]
        torch.library.opcheck(kernels.scan_op, (query, key, None, None, None, stages, 8, 2, 15, 3, 1), **checks)
        state = HiPDecodeState(1, 2, 60, top_k=16, sliding_window=20)
        row, lengths = query[:, :, -1:], torch.tensor([58])
        arguments = (row, key, lengths, None, state.blocks, state.chosen_at, state.refreshes, 4, 2, 1, 20, 16)
        torch.library.opcheck(kernels.refresh_op, arguments, **checks)
        arguments = (row, key, value, lengths, None, state.blocks, state.chosen_at, None, 0.25, 0.0, 23, 2, 20, 16)
        torch.library.opcheck(kernels.decode_op, arguments, **checks)

        def prefill(q, k, v):
            return hip_attention(q, k, v, impl="triton", **SIZES)
        assert torch.equal(torch.compile(prefill, backend="eager", fullgraph=True)(query, key, value), prefill(query, key, value))
        def step(q, k, v, n):
            return hip_decode(q, k, v, n, state, refresh_interval=4, impl="triton")
        state.reset()
        want = step(row, key, value, lengths)
        state.reset()
        got = torch.compile(step, backend="eager", fullgraph=True)(row, key, value, lengths)
        assert torch.equal(got, want) and state.refreshes.tolist() == [[1, 1]]
        leaf = query.clone().requires_grad_()
        for call in (lambda: prefill(leaf, key, value), lambda: step(leaf[:, :, -1:], key, value, lengths)):
            try:
                call()
            except ValueError as refusal:
                assert "no backward" in str(refusal)
            else:
                raise AssertionError("a gradient was promised")
        print("fine")
    """)
