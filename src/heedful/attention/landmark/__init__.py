"""Landmark Attention (arXiv 2305.16300): a token at the end of each block is the gate to the whole block."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from heedful.attention.landmark import reference

__all__ = ["landmark_attention"]

_IMPLEMENTATIONS = ("auto", "reference", "triton")
# Looked up once: a traced call must not look.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


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
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    _check_tensors(query, key, value, is_landmark, attention_mask)
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, _IMPLEMENTATIONS))}, got {impl!r}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    scale = float(query.shape[3] ** -0.5 if scale is None else scale)
    is_landmark = is_landmark.expand(query.shape[0], query.shape[2])
    with torch.autocast(device, enabled=False):  # sums stay float32
        if impl == "triton" or (impl == "auto" and device == "cuda"):
            reason = _triton_refuses(query, value)
            if reason is None:
                from heedful.attention.landmark import triton

                return triton.landmark_attention(query, key, value, is_landmark, attention_mask, scale)
            if impl == "triton":
                raise ValueError(f"impl='triton' {reason}; use impl='reference', or 'auto' to choose by the inputs")
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
        if query.is_cuda and queries >= 32 and _triton_refuses(query, value) is None:
            from heedful.attention.landmark import triton

            query = torch.nn.functional.pad(query, (0, 0, key.shape[2] - queries, 0))
            output, lse = triton.landmark_attention_op(query, key, value, is_landmark, attention_mask, scale)
            lse = torch.where(lse == torch.inf, -torch.inf, lse) * math.log(2)
            return output.transpose(1, 2)[:, :, -queries:], lse[:, :, -queries:]
        return reference.attention_with_lse(query, key, value, is_landmark, attention_mask, scale)


def _triton_refuses(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, to follow "impl='triton'"; None if they can."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {query.dtype}"
    dim = query.shape[-1]
    if dim not in (16, 32, 64, 128, 256) or value.shape[-1] != dim:
        return f"takes D = Dv = 16, 32, 64, 128 or 256, not D = {dim} and Dv = {value.shape[-1]}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if not query.is_cuda:
        from heedful.attention.landmark import triton

        if not triton.INTERPRETED:
            return f"runs on CUDA devices, not on {query.device} (or set TRITON_INTERPRET=1 before triton is imported)"
    return None


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, mask: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (B, H, T, D), got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} and query {query.dtype} on {query.device}, not alike"
            )
        if tensor.shape[1] == 0 or tensor.shape[3] == 0:
            raise ValueError(f"{name} has no head or no dimension: shape {tuple(tensor.shape)}")
    batch, heads, length, dim = query.shape
    if key.shape[0] != batch or key.shape[2:] != (length, dim):
        raise ValueError(
            f"key must be ({batch}, Hkv, {length}, {dim}) like query, whole rows (with a cache: "
            f"heedful.layers.LandmarkCache), got shape {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must be ({batch}, {key.shape[1]}, {length}, Dv) like key, got shape {tuple(value.shape)}"
        )
    if heads % key.shape[1]:
        raise ValueError(f"query has {heads} heads, which is not a multiple of the {key.shape[1]} heads of key")
    if is_landmark.dtype != torch.bool or is_landmark.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"is_landmark must be bool ({length},) or ({batch}, {length}), True at landmarks, got {is_landmark.dtype} "
            f"{tuple(is_landmark.shape)}; from tokens: input_ids == landmark_token_id"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, length)):
        raise ValueError(
            f"attention_mask must be bool ({batch}, {length}), True for real tokens, got {mask.dtype} "
            f"{tuple(mask.shape)}; convert 0/1 with .bool()"
        )
    for name, flags in (("is_landmark", is_landmark), ("attention_mask", mask)):
        if flags is not None and flags.device != query.device:
            raise ValueError(f"{name} is on {flags.device}, query on {query.device}: move it there")
