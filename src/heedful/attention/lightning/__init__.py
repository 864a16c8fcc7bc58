"""Lightning Attention-2 (arXiv 2401.04658): causal linear attention whose past decays, a rate a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.attention import inputs
from heedful.attention.lightning import reference

__all__ = ["alibi_slopes", "lightning_attention"]


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    scale: float | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention without a softmax, exact, in time linear in the length and with a past of constant size.

    `o_i = scale * sum_{j <= i} exp(-decay (i - j)) (q_i . k_j) v_j`. There is no denominator. The same in recurrent form:
    `S_i = exp(-decay) S_{i-1} + k_i^T v_i`, `o_i = scale * q_i S_i`. So a sequence may be cut anywhere, handing on the
    state, and a call with T = 1 is the step of a decoder, at a cost that does not depend on how long the past is.

    Example:
        >>> import torch
        >>> from heedful.attention import alibi_slopes, lightning_attention
        >>> query, key, value = torch.randn(3, 2, 8, 1000, 64)
        >>> decay = alibi_slopes(8)
        >>> output = lightning_attention(query, key, value, decay)
        >>> head, state = lightning_attention(  # the first 600 tokens, then the rest from their state
        ...     query[:, :, :600], key[:, :, :600], value[:, :, :600], decay, output_final_state=True
        ... )
        >>> tail = lightning_attention(query[:, :, 600:], key[:, :, 600:], value[:, :, 600:], decay, initial_state=state)
        >>> torch.allclose(torch.cat([head, tail], 2), output, atol=1e-4)
        True

    Args:
        query: `(B, Hq, T, D)`, float32, bfloat16, float16 or float64. Any strides.
        key: `(B, Hkv, T, D)`, Hq a multiple of Hkv, not repeated to the query heads.
        value: `(B, Hkv, T, E)`.
        decay: `(Hq,)`, the rate of each query head a token, not negative: a token n places back weighs `exp(-decay * n)`.
            0 is plain causal linear attention. Takes no gradient. Usually `alibi_slopes(Hq, layer, num_layers)`.
        scale: Positive factor on the output; None for `D ** -0.5`. The paper's form is 1.0.
        initial_state: `(B, Hq, D, E)` (with `cu_seqlens`: `(N, Hq, D, E)`), float32 (float64 for float64 inputs): the state
            before the first token. None for zeros.
        output_final_state: Whether to return the state after the last token as well.
        chunk_size: Tokens of a chunk of the reference, at least 1. The result does not depend on it, but for rounding; the
            Triton kernels have tiles of their own.
        attention_mask: bool `(B, T)`, True for real tokens. Tokens before the first and after the last real one have no part:
            the state waits there, so that the final state is that of the last real token. Padding gives rows of zeros, and no
            gradients. None if all are real.
        cu_seqlens: int32 or int64 `(N + 1,)`, from 0 to T, not decreasing, with B = 1: document n is the tokens
            `cu_seqlens[n] <= i < cu_seqlens[n + 1]`, and sees no other. The reference looks at their values, which waits for
            the device and breaks a compiled graph; the kernels do not.
        impl: "reference" (plain PyTorch, on every device), "triton" (CUDA; float32, bfloat16 or float16; D and E at most
            256), both with gradients, or "auto": Triton where it can, else the reference.

    Returns:
        `(B, Hq, T, E)` in the query's dtype; with `output_final_state=True` `(output, state)`, the state `(B, Hq, D, E)` (or
        `(N, Hq, D, E)`), float32 (float64 for float64), `S_T = sum_j exp(-decay (T - j)) k_j^T v_j`, without `scale`.
        Gradients flow from both, to query, key, value and initial_state.

    Raises:
        ValueError: If a shape, dtype or argument does not fit, or `decay` asks for a gradient. Negative rates and wrong
            `cu_seqlens` are refused on the CPU; on a GPU, where looking would wait for the device, the result is then
            undefined for rates; tokens outside all documents give zeros.

    Cost:
        About `2 T Hq (C (D + E) + 2 D E)` floating-point operations with tiles of C = 64 tokens, forward; backward 2.5 times
        as many. Memory beside the output: a state for each segment of a long sequence (D * E floats a head and up to 32768
        tokens), nothing that grows with T squared. Where there are few sequences and heads, long sequences are cut into
        segments that run side by side, and keys and values are read twice, except where all weights have decayed to zero
        (below 2^-150): there a NaN or infinity is not looked at either.

    When not to use:
        In place of softmax attention in a trained model: it is another function, the model has to be trained with it. Where
        the decay depends on the data (Mamba-2, GLA) it is not this operator. Below some thousand tokens softmax attention is
        as fast.

    Paper:
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models", Qin, Sun, Li,
        Shen, Sun, Zhong, arXiv 2401.04658.
    """
    device = query.device.type
    query, key, value = inputs.in_autocast_dtype(query, key, value)
    _check(query, key, value, decay, initial_state, attention_mask, cu_seqlens)
    inputs.check_impl(impl)
    inputs.check_count("chunk_size", chunk_size, 1)
    inputs.check_positive("scale", scale)
    dim = query.shape[3]
    scale = dim**-0.5 if scale is None else float(scale)

    with torch.autocast(device, enabled=False):  # sums and states stay float32
        kernels = inputs.wants_kernels(impl, query)
        reason = _triton_refuses(query, value) if kernels else None
        if impl == "triton" and reason is not None:
            inputs.refuse_triton(reason)
        arguments: dict[str, Any] = {
            "mask": attention_mask,
            "cu_seqlens": cu_seqlens,
            "initial": initial_state,
            "scale": scale,
        }
        if kernels and reason is None and query.numel() and value.numel():
            from heedful.attention.lightning import triton

            output, state = triton.lightning_attention(
                query, key, value, decay.float(), want_final=output_final_state, **arguments
            )
        else:
            output, state = reference.lightning_attention(query, key, value, decay, chunk_size=chunk_size, **arguments)
            output = output.to(query.dtype)
    return (output, state) if output_final_state else output


def alibi_slopes(num_heads: int, layer: int | None = None, num_layers: int | None = None) -> Tensor:
    """The decay rates of the paper, geometric over the heads (the rule of ALiBi), smaller in each further layer.

    For H a power of two head h = 1..H has `2^(-8 h / H)`. Otherwise the largest power of two below H, P, gives the first P
    slopes, and every second one of the rule for 2 P the rest. Layer l of L multiplies by `1 - l / (L - 1) + 1e-5`: the last
    layer hardly forgets.

    Example:
        >>> from heedful.attention import alibi_slopes
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])

    Args:
        num_heads: H, at least 1.
        layer: The layer, 0 for the first; None for no factor.
        num_layers: Layers of the model; needed with `layer`.

    Returns:
        float32 `(H,)`, positive.

    Raises:
        ValueError: If a number is out of its range, or one of `layer` and `num_layers` is missing.

    Cost:
        None.

    When not to use:
        For weights trained with another rule: TransNormerLLM and MiniMax-01 have this one (MiniMax divides by
        `L - 1 + 1e-5`), flash-linear-attention's `chunk_lightning_attn` another: `8 / H * (1 - l / L) * h` for h = 0..H-1.

    Paper:
        "Lightning Attention-2", arXiv 2401.04658; "Train Short, Test Long", Press, Smith, Lewis, arXiv 2108.12409 (ALiBi).
    """
    return torch.tensor(slopes(num_heads, layer, num_layers), dtype=torch.float32)


def slopes(num_heads: int, layer: int | None = None, num_layers: int | None = None) -> list[float]:
    """`alibi_slopes` as numbers, for modules that are built on the meta device."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer of at least 1, got {num_heads!r}")
    if (layer is None) != (num_layers is None):
        raise ValueError("give layer and num_layers, or neither")
    power = 1 << (num_heads.bit_length() - 1)
    rates = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    rates += [2.0 ** (-4 * (2 * h + 1) / power) for h in range(num_heads - power)]
    factor = 1.0
    if layer is not None and num_layers is not None:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer must be from 0 to num_layers - 1 = {num_layers - 1}, got {layer}")
        factor = 1 - layer / max(1, num_layers - 1) + 1e-5
    return [rate * factor for rate in rates]


def _triton_refuses(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, to follow "impl='triton'"; None if they can."""
    if query.shape[3] > 256 or value.shape[3] > 256:
        return f"takes D and E up to 256, not {query.shape[3]} and {value.shape[3]}"
    return inputs.kernels_refuse(query)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    inputs.check_qkv(
        query, key, value, "linear attention over whole rows; in decoding: the rows that are new, and initial_state"
    )
    batch, heads, length, dim = query.shape
    if decay.shape != (heads,) or not decay.is_floating_point():
        raise ValueError(
            f"decay must be floating-point ({heads},), a rate a query head, got {decay.dtype} {tuple(decay.shape)}"
        )
    if decay.requires_grad:
        raise ValueError("decay takes no gradient: give decay.detach(), or keep it in a buffer")
    for name, given in {"decay": decay, "initial_state": initial_state, "cu_seqlens": cu_seqlens}.items():
        if given is not None:
            inputs.check_device(name, given, query)
    inputs.check_attention_mask(attention_mask, key)
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("give attention_mask (padded rows) or cu_seqlens (packed documents), not both")
    sequences = batch
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"cu_seqlens must be an int32 or int64 tensor of shape (N + 1,), got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)}"
            )
        if batch != 1:
            raise ValueError(f"cu_seqlens needs the documents in one row, B = 1, got B = {batch}: flatten the batch")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        shape = (sequences, heads, dim, value.shape[3])
        if initial_state.shape != shape or initial_state.dtype != wide:
            raise ValueError(
                f"initial_state must be {wide} {shape}, got {initial_state.dtype} {tuple(initial_state.shape)}"
            )
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(((decay >= 0) & decay.isfinite()).all()):
            raise ValueError(
                "decay must be finite and not negative: the weight of a token n places back is exp(-decay * n)"
            )
        if cu_seqlens is not None and (
            int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or bool((cu_seqlens.diff() < 0).any())
        ):
            raise ValueError(f"cu_seqlens must go from 0 to T = {length} without decreasing, got {cu_seqlens.tolist()}")
