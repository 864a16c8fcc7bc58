"""heedful: published attention methods as parts that plug into the models people already have.

Everything here is imported on first use: ``import heedful`` costs no torch and no transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "attach": "heedful.seam",
    "AttentionCall": "heedful.seam",
    "Edit": "heedful.seam",
    "Kernel": "heedful.seam",
    "Probe": "heedful.seam",
    "register_attention": "heedful.seam",
    "HiPAttention": "heedful.kernels",
    "generate": "heedful.decoding",
}
_MODULES = ("attention", "catalog", "decoding", "interp", "kernels", "layers", "models", "steering", "training", "zoo")

__all__ = ["__version__", *_EXPORTS, *_MODULES]

if TYPE_CHECKING:
    from heedful import attention, catalog, decoding, interp, kernels, layers, models, steering, training, zoo
    from heedful.decoding import generate
    from heedful.kernels import HiPAttention
    from heedful.seam import AttentionCall, Edit, Kernel, Probe, attach, register_attention


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"heedful.{name}")
    else:
        raise AttributeError(f"module 'heedful' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
