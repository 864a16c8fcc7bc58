"""HiP attention (arXiv 2406.09827): a tree search finds, for each block of queries, the keys worth attending to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heedful.attention import inputs
from heedful.attention.hip import operators, reference
from heedful.attention.hip.mask import HiPMask, Stage

__all__ = ["HiPMask", "hip_attention"]

_SAMPLE_METHODS = ("center", "first", "last", "random", "oracle")


def hip_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    top_k: int = 512,
    block_size_q: int = 64,
    block_stride_q: int = 2,
    block_size_k: int = 2,
    block_stride_k: int = 1,
    sliding_window: int = 256,
    num_sink_tokens: int = 16,
    sample_method: str = "center",
    stages: Sequence[Stage] | None = None,
    mask: HiPMask | None = None,
    return_mask: bool = False,
    attention_mask: Tensor | None = None,
    head_group_size: int = 1,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, HiPMask]:
    """Causal attention to about `top_k` keys a query, found by a tree search: O(T log T), with no training.

    For each block of `block_size_q` queries and each query head, the range between the first tokens (sinks) and a
    sliding window is cut into `top_k / block_size_k` nodes. Each round halves the nodes, scores each half by the
    largest dot product between some queries of the block and the block of keys in its middle, and keeps the best,
    until nodes are single blocks. The queries then attend to the sinks, the window and these blocks. Query row i is at
    position `Tk - Tq + i`. Where the range holds at most `top_k` keys this is dense causal attention, exactly.

    The rows of a block share one choice, so a changed query can change the output of earlier rows of its block; a
    changed key or value never does. A prefill in chunks makes the choices of the whole one if the chunks are multiples
    of `block_size_q` long.

    Example:
        >>> import torch
        >>> from heedful.attention import hip_attention
        >>> query = torch.randn(1, 6, 2048, 64)
        >>> key, value = torch.randn(2, 1, 2, 2048, 64)
        >>> output, mask = hip_attention(query, key, value, top_k=256, return_mask=True)
        >>> print(f"{mask.keys_read().sum() / (6 * 2048 * 2049 / 2):.0%} of the keys read")
        45% of the keys read

    Args:
        query: `(B, Hq, Tq, D)`, float32, bfloat16, float16 or float64, rotated. Any strides.
        key: `(B, Hkv, Tk, D)`, Tk >= Tq and Hq a multiple of Hkv, not repeated to the query heads.
        value: `(B, Hkv, Tk, Dv)`.
        top_k: Keys chosen for a query block, next to window and sinks. Rounded up to whole key blocks.
        block_size_q: Queries that share a choice; blocks count from the call's first row.
        block_stride_q: Every so-many-th query of a block takes part in the search, the first being row
            `block_stride_q - 1`.
        block_size_k: Keys that are chosen together.
        sliding_window: Latest keys that are always read, the query's own included. Below `block_size_q - 1` it counts
            as that.
        num_sink_tokens: First real tokens, which are always read.
        block_stride_k: Every so-many-th key of a representative block is scored. With 2 the search reads half as much;
            where neighbours score alike, its error grows by 0 to 3 %.
        sample_method: The block that represents a node: "center", "first", "last" or "random"; "oracle" scores a node
            by the best of its blocks, which is quadratic and gives the exact top blocks, to compare with.
        stages: Search as InfiniteHiP does, instead of the tree: `[(block_size_q, block_stride_q, chunk_size, budget),
            ...]`. A stage scores the chunks of `chunk_size` tokens that the stage before kept (its `budget` tokens; None
            for the first, which visits all) by a search through their halves with the means of `block_stride_q`
            queries; the last keeps `top_k` tokens. Sizes of blocks and chunks are multiples of the next stage's,
            chunks powers of 2. Replaces the block arguments and `sample_method`. The authors' choice is `[(64, 4, 256,
            None), (64, 4, 32, 32768), (64, 1, 8, 8192)]` with top_k 2048, window 1024 and 256 sinks.
        mask: The choice of an earlier call, instead of a search: of a call of the same shape, or of one whose rows are
            all older, as in decoding. Then its last query block's choice serves, and the windows reach back to where
            that block's search ended. Sizes are the mask's own, those above are not used. Its rows must begin at the
            same slots (checked on the CPU).
        return_mask: Return `(output, mask)`: a `HiPMask`, whose `dense()` is exactly what was attended.
        attention_mask: bool `(B, Tk)`, True for real tokens. Positions, sinks and key blocks count from the first real
            token of a row, so that left padding by a multiple of `block_size_q` changes nothing. Right padding does not
            change real rows either.
        head_group_size: So many neighbouring heads share a choice, made by the maximum of their scores.
        scale: Factor on the dot products; None for `D ** -0.5`.
        softcap: Logits become `softcap * tanh(logits / softcap)`, as in Gemma 2. The choice is the same without.
        sink_logits: `(Hq,)`, a logit of each head that takes its share of the softmax and gives nothing, as in gpt-oss.
        generator: For `sample_method="random"`, on the query's device; None for torch's own.
        impl: "reference" (plain PyTorch, on every device, differentiable with the choice held constant), "triton"
            (CUDA; float32, bfloat16 or float16; D and Dv of 16, 32, 64, 128 or 256; no gradients) or "auto": Triton
            where it can, else the reference.

    Returns:
        `(B, Hq, Tq, Dv)` in the query's dtype, and the `HiPMask` if `return_mask`. Sums are float32. A row that sees
        no key (a query that is padding) gives 0. Empty inputs give an empty output.

    Raises:
        ValueError: If a shape, dtype or argument does not fit, before any work.

    Cost:
        `2 * top_k / block_stride_q` dot products a query and round, and `log2(T / top_k)` rounds; then
        `top_k + sliding_window + num_sink_tokens` dot products a query. At T = 4096 and the defaults that is 0.85 of
        dense causal attention's, and doubling T adds `top_k` a query. Memory is linear in T: nothing is Tq x Tk. On one
        CPU core (6 heads of 64, float32) the time is 2.1 times that of PyTorch's fused dense attention at T = 4096,
        equal at 16k, half at 32k.

        On one H100 (32 query and 8 key heads of 128, bfloat16, `block_stride_k=2`) the kernels take as long as the
        fastest dense attention of PyTorch a little below 8k, 0.27 of its time at 32k and 0.085 at 128k; their time grows
        2.2 times with each doubling. The staged scan visits every chunk: 2.4 times a doubling, level with dense
        attention between 32k and 64k, 0.42 of its time at 128k (`benchmarks/operators/hip.py`).

    When not to use:
        Below some thousand tokens, where dense attention is faster and exact; where one key that stands out alone must
        be found for certain (a run of `ceil(blocks / nodes)` best key blocks is always found, a single one may be
        missed).

    Paper:
        "A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention"
        (HiP Attention), Lee, Park, Lee, Suh, Kim, Jeong, Kim, Lee, Jeon, Hwang, arXiv 2406.09827.
    """
    device = query.device.type
    query, key, value = inputs.in_autocast_dtype(query, key, value)
    _check_tensors(query, key, value, attention_mask)
    search: dict[str, Any] = {
        "top_k": top_k,
        "block_size_q": block_size_q,
        "block_stride_q": block_stride_q,
        "block_size_k": block_size_k,
        "block_stride_k": block_stride_k,
        "sliding_window": sliding_window,
        "num_sink_tokens": num_sink_tokens,
        "sample_method": sample_method,
        "head_group_size": head_group_size,
    }
    check_arguments(**search, stages=stages, impl=impl)
    if query.shape[1] % head_group_size:
        raise ValueError(f"query has {query.shape[1]} heads, not a multiple of head_group_size ({head_group_size})")
    inputs.check_positive("scale", scale)
    inputs.check_positive("softcap", softcap)
    if sink_logits is not None:
        check_sink_logits(sink_logits, query)

    if 0 in query.shape[:3]:
        output = query.new_empty((*query.shape[:3], value.shape[3])) + 0 * query.sum()
        return (output, mask or _empty_choice(query, key, stages, search, attention_mask)) if return_mask else output
    backend = _backend(query, key, value, sink_logits, impl, mask, stages, search)
    with torch.autocast(device, enabled=False):  # sums stay float32
        if mask is not None:
            mask = _chosen_before(mask, query, key, attention_mask)
        elif stages is not None:
            names = ("top_k", "sliding_window", "num_sink_tokens", "head_group_size")
            sizes = {name: search[name] for name in names}
            mask = backend.choose_in_stages(query, key, attention_mask=attention_mask, stages=stages, **sizes)
        else:
            mask = backend.choose(query, key, attention_mask=attention_mask, generator=generator, **search)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output = backend.attend(query, key, value, mask, scale=scale, softcap=softcap, sink_logits=sink_logits)
    return (output, mask) if return_mask else output


def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    impl: str,
    mask: HiPMask | None,
    stages: Sequence[Stage] | None,
    search: dict[str, Any],
) -> Any:
    """The module that computes this call: the reference, or `triton` where it is asked for or can."""
    plain = operators if torch.compiler.is_compiling() else reference
    if not inputs.wants_kernels(impl, query):
        return plain
    reason = None
    leaves = [x for x in (query, key, value, sink_logits) if x is not None]
    by_tree = mask is None and stages is None
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        reason = "has no backward and an input needs a gradient (or call it under torch.no_grad())"
    elif not inputs.HAS_TRITON:
        reason = "needs the package triton, which is not installed"
    elif by_tree and search["sample_method"] not in ("center", "first", "last"):
        reason = f"takes sample_method 'center', 'first' or 'last', not {search['sample_method']!r}"
    else:
        from heedful.attention.hip import triton

        if by_tree:
            nodes = -(-min(search["top_k"], key.shape[2]) // search["block_size_k"])
            rows = min(search["block_size_q"], query.shape[2])
            reason = triton.refuses(query, key, value, nodes, rows, search["block_stride_q"], search["head_group_size"])
        else:
            reason = triton.refuses(query, key, value, 1, 1, 1, 1)
            if reason is None and mask is None and stages is not None:
                reason = triton.refuses_stages(stages)
        if reason is None:
            return triton
    if impl == "triton":
        inputs.refuse_triton(reason)
    return plain


def _chosen_before(mask: HiPMask, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> HiPMask:
    """An earlier call's choice for this call."""
    if mask.blocks.shape[:2] != query.shape[:2] or mask.blocks.device != query.device:
        raise ValueError(
            f"mask has (B, Hq) = {tuple(mask.blocks.shape[:2])} on {mask.blocks.device}, query "
            f"{tuple(query.shape[:2])} on {query.device}; leave mask out to choose anew"
        )
    if (mask.num_queries, mask.num_keys) == (query.shape[2], key.shape[2]):
        return mask.padded(attention_mask)
    return mask.extended(query.shape[2], key.shape[2], attention_mask)


def _empty_choice(
    query: Tensor,
    key: Tensor,
    stages: Sequence[Stage] | None,
    search: dict[str, Any],
    attention_mask: Tensor | None,
) -> HiPMask:
    """The choice of a call without rows."""
    batch, heads, num_queries, _ = query.shape
    block_size_q, block_size_k = search["block_size_q"], search["block_size_k"]
    if stages is not None:
        block_size_q, _, block_size_k, _ = stages[-1]
    count = -(-num_queries // block_size_q)
    return HiPMask(
        torch.empty((batch, heads, count, 0), dtype=torch.int32, device=query.device),
        torch.empty((batch, count), dtype=torch.int64, device=query.device),
        num_queries,
        key.shape[2],
        block_size_q,
        block_size_k,
        max(search["sliding_window"], (stages[0][0] if stages else block_size_q) - 1),
        search["num_sink_tokens"],
        attention_mask,
    )


def check_sink_logits(sink_logits: Tensor, query: Tensor) -> None:
    """Raises ValueError unless there is one for each head of `query (B, Hq, Tq, D)`, on its device."""
    fits = isinstance(sink_logits, Tensor) and sink_logits.shape == query.shape[1:2]
    if not fits or sink_logits.device != query.device:
        got = f"{tuple(sink_logits.shape)} on {sink_logits.device}" if isinstance(sink_logits, Tensor) else sink_logits
        raise ValueError(f"sink_logits must be a tensor ({query.shape[1]},) on {query.device}, got {got}")


def check_arguments(
    *,
    top_k: int,
    block_size_q: int,
    block_stride_q: int,
    block_size_k: int,
    sliding_window: int,
    num_sink_tokens: int,
    sample_method: str,
    impl: str,
    block_stride_k: int = 1,
    head_group_size: int = 1,
    stages: Sequence[Stage] | None = None,
) -> None:
    """Raises ValueError if an argument of `hip_attention` other than its tensors does not fit."""
    sizes = {
        "top_k": top_k,
        "block_size_q": block_size_q,
        "block_stride_q": block_stride_q,
        "block_size_k": block_size_k,
        "sliding_window": sliding_window,
        "num_sink_tokens": num_sink_tokens,
        "block_stride_k": block_stride_k,
        "head_group_size": head_group_size,
    }
    for name, size in sizes.items():
        inputs.check_count(name, size, 0 if name in ("sliding_window", "num_sink_tokens") else 1)
    if stages is not None:
        _check_stages(stages)
    elif block_stride_q > block_size_q:
        raise ValueError(f"block_stride_q ({block_stride_q}) must not be above block_size_q ({block_size_q})")
    elif block_stride_k > block_size_k:
        raise ValueError(f"block_stride_k ({block_stride_k}) must not be above block_size_k ({block_size_k})")
    inputs.check_choice("sample_method", sample_method, _SAMPLE_METHODS)
    inputs.check_impl(impl)


def _check_stages(stages: Sequence[Stage]) -> None:
    rule = (
        "stages must be [(block_size_q, block_stride_q, chunk_size, budget), ...], all positive integers but the first "
        "budget, which is None; block_size_q and chunk_size each a multiple of the next stage's, chunk_size a power of 2"
    )
    if not stages:
        raise ValueError(f"{rule}; got none")
    before = None
    for stage in stages:
        fits = isinstance(stage, Sequence) and len(stage) == 4 and (stage[3] is None) == (before is None)
        fits = fits and all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in stage if x is not None)
        fits = fits and None not in stage[:3] and stage[1] <= stage[0] and stage[2] & (stage[2] - 1) == 0
        if fits and before is not None:
            fits = before[0] % stage[0] == 0 and before[2] % stage[2] == 0
        if not fits:
            raise ValueError(f"{rule}; got {stage!r}" + (f" after {before!r}" if before else ""))
        before = stage


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> None:
    inputs.check_qkv(query, key, value)
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} rows and key only {key.shape[2]}: each row is one of the last keys"
        )
    inputs.check_attention_mask(attention_mask, key)
