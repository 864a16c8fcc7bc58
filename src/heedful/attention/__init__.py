"""Attention operators: tensors in, tensors out; no model, no state.

Shapes are those of `torch.nn.functional.scaled_dot_product_attention`: `(B, H, T, D)`, with grouped keys and values
when `Hq % Hkv == 0`. Everything is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it.
_EXPORTS = {
    "HiPMask": "heedful.attention.hip",
    "alibi_slopes": "heedful.attention.lightning",
    "by_document": "heedful.attention.documents",
    "choose_heads": "heedful.attention.head_routing",
    "dispatch_heads": "heedful.attention.head_routing",
    "hip_attention": "heedful.attention.hip",
    "landmark_attention": "heedful.attention.landmark",
    "lightning_attention": "heedful.attention.lightning",
    "merge_attention_states": "heedful.attention.tree",
    "routed_attention": "heedful.attention.head_routing",
    "routed_output": "heedful.attention.head_routing",
    "routed_projection": "heedful.attention.head_routing",
    "shifted_sparse_attention": "heedful.attention.shifted",
    "tree_attention": "heedful.attention.tree",
}

__all__ = [
    "HiPMask",
    "alibi_slopes",
    "by_document",
    "choose_heads",
    "dispatch_heads",
    "hip_attention",
    "landmark_attention",
    "lightning_attention",
    "merge_attention_states",
    "routed_attention",
    "routed_output",
    "routed_projection",
    "shifted_sparse_attention",
    "tree_attention",
]

if TYPE_CHECKING:
    from heedful.attention.documents import by_document
    from heedful.attention.head_routing import (
        choose_heads,
        dispatch_heads,
        routed_attention,
        routed_output,
        routed_projection,
    )
    from heedful.attention.hip import HiPMask, hip_attention
    from heedful.attention.landmark import landmark_attention
    from heedful.attention.lightning import alibi_slopes, lightning_attention
    from heedful.attention.shifted import shifted_sparse_attention
    from heedful.attention.tree import merge_attention_states, tree_attention


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'heedful.attention' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
