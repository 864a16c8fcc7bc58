"""Attention operators: tensors in, tensors out; no model, no state.

Shapes are those of `torch.nn.functional.scaled_dot_product_attention`: `(B, H, T, D)`, with grouped keys and values
when `Hq % Hkv == 0`.
"""

from heedful.attention.hip import HiPMask, hip_attention
from heedful.attention.tree import merge_attention_states, tree_attention

__all__ = ["HiPMask", "hip_attention", "merge_attention_states", "tree_attention"]
