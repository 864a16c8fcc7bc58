"""Kernels: parts that compute an attention call in place of the model's own implementation."""

from heedful.kernels.h2o import H2OAttention, H2OCache
from heedful.kernels.hip import HiPAttention
from heedful.kernels.shifted import ShiftedSparseAttention

__all__ = ["H2OAttention", "H2OCache", "HiPAttention", "ShiftedSparseAttention"]
