"""Landmark Attention (arXiv 2305.16300): a token at the end of each block is the gate to the whole block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.attention import inputs
from heedful.attention.landmark import reference

__all__ = ["landmark_attention"]


def landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_landmark: Tensor,
    scale: float | None = None,
    *,
    attention_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention with the grouped softmax of Landmark Attention: the form for training, and for short inputs.

    A landmark ends its block. A query attends to the tokens of its own block up to itself, and to the landmarks of
    earlier blocks, in one softmax; the weight of a landmark, its block's gate, is then shared among the tokens of that
    block by a softmax of their own. The values of landmarks are never read. Blocks may be of any lengths. A block with
    no token has no gate; a row that sees nothing (a landmark that opens the sequence) gives 0.

    Example:
        >>> import torch
        >>> from heedful.attention import landmark_attention
        >>> query, key, value = torch.randn(3, 1, 4, 256, 32)
        >>> is_landmark = torch.arange(256) % 64 == 63  # blocks of 63 tokens and a landmark
        >>> landmark_attention(query, key, value, is_landmark).shape
        torch.Size([1, 4, 256, 32])

    Args:
        query: `(B, Hq, T, D)`, float32, bfloat16, float16 or float64, rotated. Any strides.
        key: `(B, Hkv, T, D)`, Hq a multiple of Hkv, not repeated to the query heads; landmarks' keys are scored by
            every query head.
        value: `(B, Hkv, T, Dv)`.
        is_landmark: Bool `(T,)` or `(B, T)`, True at landmarks.
        scale: Factor on the dot products; None for `D ** -0.5`.
        attention_mask: Bool `(B, T)`, True for real tokens. Padding, on either side, is not seen, ends no block
            (`is_landmark` there counts for nothing), gives 0 and takes no gradient. None: all are real. Packed
            documents: `heedful.attention.by_document`.
        impl: "reference" (plain PyTorch, on every device), "triton" (CUDA; float32, bfloat16 or float16; D = Dv one of
            16, 32, 64, 128, 256) or "auto": Triton where it can, else the reference. Both are differentiable, once.

    Returns:
        `(B, Hq, T, Dv)` in the query's dtype. Both softmaxes are float32 (float64 for float64). A value that is not finite
        makes all rows from its own on NaN, a NaN in a key those that score it; earlier rows stay as they are.

    Raises:
        ValueError: If a shape, dtype or argument does not fit, before any work.

    Cost:
        That of dense causal attention in time, O(T^2), and O(T) memory: the kernels take about three copies of key and
        value beside the output, the reference blocks of query rows. Blocks, landmark included, that fill a tile of 64
        or 128 keys are the fastest (63 tokens and a landmark); a block longer than a tile is read twice in the forward,
        and three times in the backward, where sums of its keys' gradients are made with atomics (in no fixed order).
        The saving is at inference, where k blocks are read in place of all: `heedful.layers.LandmarkCache`.

    When not to use:
        With a model that was not trained with landmarks. For plain long-context training without retrieval:
        `scaled_dot_product_attention`.

    Paper:
        "Landmark Attention: Random-Access Infinite Context Length for Transformers", Mohtashami and Jaggi,
        arXiv 2305.16300.
    """
    device = query.device.type
    query, key, value = inputs.in_autocast_dtype(query, key, value)
    _check_tensors(query, key, value, is_landmark, attention_mask)
    inputs.check_impl(impl)
    inputs.check_positive("scale", scale)
    scale = float(query.shape[3] ** -0.5 if scale is None else scale)
    is_landmark = is_landmark.expand(query.shape[0], query.shape[2])
    with torch.autocast(device, enabled=False):  # sums stay float32
        if inputs.wants_kernels(impl, query):
            reason = inputs.kernels_refuse(query, value.shape[-1])
            if reason is None:
                from heedful.attention.landmark import triton

                return triton.landmark_attention(query, key, value, is_landmark, attention_mask, scale)
            if impl == "triton":
                inputs.refuse_triton(reason)
        return reference.landmark_attention(query, key, value, is_landmark, attention_mask, scale)


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_landmark: Tensor,
    attention_mask: Tensor | None,
    scale: float,
    queries: int,
) -> tuple[Tensor, Tensor]:
    """The last `queries` rows, for merging with other keys: output, and `(B, Hq, Tq)`, the logarithm of the outer softmax's sum
    (-inf where nothing is seen). Without gradients."""
    query = query[:, :, query.shape[2] - queries :]
    with torch.no_grad():
        # A few rows are not worth the kernels' tables and copies.
        if query.is_cuda and queries >= 32 and inputs.kernels_refuse(query, value.shape[-1]) is None:
            from heedful.attention.landmark import triton

            query = torch.nn.functional.pad(query, (0, 0, key.shape[2] - queries, 0))
            output, lse = triton.landmark_attention_op(query, key, value, is_landmark, attention_mask, scale)
            lse = torch.where(lse == torch.inf, -torch.inf, lse) * math.log(2)
            return output.transpose(1, 2)[:, :, -queries:], lse[:, :, -queries:]
        return reference.attention_with_lse(query, key, value, is_landmark, attention_mask, scale)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, mask: Tensor | None) -> None:
    inputs.check_qkv(query, key, value, "whole rows; with a cache: heedful.layers.LandmarkCache")
    batch, _, length, _ = query.shape
    if is_landmark.dtype != torch.bool or is_landmark.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"is_landmark must be bool ({length},) or ({batch}, {length}), True at landmarks, got {is_landmark.dtype} "
            f"{tuple(is_landmark.shape)}; from tokens: input_ids == landmark_token_id"
        )
    inputs.check_device("is_landmark", is_landmark, query)
    inputs.check_attention_mask(mask, key)
