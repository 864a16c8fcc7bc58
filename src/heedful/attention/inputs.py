"""What the operators ask of their inputs, in the same words."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

__all__ = [
    "HAS_TRITON",
    "check_attention_mask",
    "check_choice",
    "check_count",
    "check_device",
    "check_impl",
    "check_positive",
    "check_qkv",
    "in_autocast_dtype",
    "kernels_refuse",
    "refuse_triton",
    "wants_kernels",
]

#: Looked up once: a traced call must not look.
HAS_TRITON = importlib.util.find_spec("triton") is not None
#: Head dimensions of the kernels that hold a whole row of a head in one tile.
TILE_DIMS = (16, 32, 64, 128, 256)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on: a model's projections have it already, what comes from elsewhere has not."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    return tensors


def check_qkv(query: Tensor, key: Tensor, value: Tensor, like_query: str = "") -> None:
    """ValueError unless these are `(B, Hq, Tq, D)`, `(B, Hkv, Tk, D)` and `(B, Hkv, Tk, Dv)`, floating-point and alike.

    Args:
        query, key, value: The tensors.
        like_query: Where each query needs its own key (Tk = Tq), what to say to those who have a cache.
    """
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
            raise ValueError(f"{name} has no heads, or heads of size 0: shape {tuple(tensor.shape)}")
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    fits = key.shape[0] == batch and key.shape[3] == dim
    if like_query and not (fits and keys == rows):
        raise ValueError(
            f"key must be ({batch}, Hkv, {rows}, {dim}) like query ({like_query}), got shape {tuple(key.shape)}"
        )
    if not fits:
        raise ValueError(f"key must be ({batch}, Hkv, Tk, {dim}) like query, got shape {tuple(key.shape)}")
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which is not a multiple of the {kv_heads} heads of key")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be ({batch}, {kv_heads}, {keys}, Dv) like key, got shape {tuple(value.shape)}")


def check_attention_mask(attention_mask: Tensor | None, key: Tensor) -> None:
    """ValueError unless it is None or bool `(B, Tk)` on the device of `key`."""
    if attention_mask is None:
        return
    shape = (key.shape[0], key.shape[2])
    if attention_mask.dtype != torch.bool or attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must be bool {shape}, True for real tokens, got {attention_mask.dtype} "
            f"{tuple(attention_mask.shape)}; convert 0/1 with .bool()"
        )
    check_device("attention_mask", attention_mask, key)


def check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    """ValueError unless `tensor` is on the device of `query`."""
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move it there")


def check_choice(name: str, given: str, known: tuple[str, ...]) -> None:
    """ValueError unless `given` is one of `known`."""
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {given!r}")


def check_impl(impl: str) -> None:
    """ValueError for an implementation that no operator has."""
    check_choice("impl", impl, ("auto", "reference", "triton"))


def check_positive(name: str, number: float | None) -> None:
    """ValueError unless `number` is None or positive and finite."""
    if number is not None and not 0 < number < float("inf"):
        raise ValueError(f"{name} must be positive, got {number}")


def check_count(name: str, number: int, least: int) -> None:
    """ValueError unless `number` is an integer of at least `least`."""
    if isinstance(number, bool) or not isinstance(number, int | torch.SymInt) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")


def wants_kernels(impl: str, query: Tensor) -> bool:
    """Whether the kernels are asked for, or are the better choice."""
    return impl == "triton" or (impl == "auto" and query.is_cuda)


def kernels_refuse(query: Tensor, value_dim: int | None = None, *, gradients: Sequence[Tensor] = ()) -> str | None:
    """Why Triton kernels cannot take these inputs, to follow "impl='triton'"; None if they can.

    Args:
        query: `(..., D)`.
        value_dim: Dv, for kernels that hold a row of a head in one tile, with D = Dv. None: any D.
        gradients: Inputs of a kernel without a backward pass.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in gradients):
        return "has no backward and an input needs a gradient (or call it under torch.no_grad())"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {query.dtype}"
    dim = query.shape[-1]
    if value_dim is not None and (dim not in TILE_DIMS or value_dim != dim):
        return f"takes D = Dv = 16, 32, 64, 128 or 256, not D = {dim} and Dv = {value_dim}"
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if not query.is_cuda:
        from heedful.attention.interpreter import INTERPRETED

        if not INTERPRETED:
            return f"runs on CUDA devices, not on {query.device} (or set TRITON_INTERPRET=1 before triton is imported)"
    return None


def refuse_triton(reason: str | None) -> NoReturn:
    """The error where kernels that were asked for by name cannot take a call."""
    raise ValueError(f"impl='triton' {reason}; use impl='reference', or 'auto' to choose by the inputs")
