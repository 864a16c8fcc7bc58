"""Kernels: parts that compute an attention call in place of the model's own implementation."""

from heedful.kernels.hip import HiPAttention

__all__ = ["HiPAttention"]
