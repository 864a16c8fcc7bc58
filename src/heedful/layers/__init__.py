"""Layers: modules built on the operators, and functions that put them into models people already have.

Everything is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it.
_EXPORTS = {
    "LandmarkAttention": "heedful.layers.landmark",
    "LandmarkCache": "heedful.layers.landmark",
    "LightningAttention": "heedful.layers.lightning",
    "LightningCacheLayer": "heedful.layers.lightning",
    "MixtureOfHeads": "heedful.layers.moh",
    "convert_to_landmark": "heedful.layers.landmark",
    "convert_to_moh": "heedful.layers.moh",
    "load_landmark": "heedful.layers.landmark",
}

__all__ = [
    "LandmarkAttention",
    "LandmarkCache",
    "LightningAttention",
    "LightningCacheLayer",
    "MixtureOfHeads",
    "convert_to_landmark",
    "convert_to_moh",
    "load_landmark",
]

if TYPE_CHECKING:
    from heedful.layers.landmark import LandmarkAttention, LandmarkCache, convert_to_landmark, load_landmark
    from heedful.layers.lightning import LightningAttention, LightningCacheLayer
    from heedful.layers.moh import MixtureOfHeads, convert_to_moh


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'heedful.layers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
