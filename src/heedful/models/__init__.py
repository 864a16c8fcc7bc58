"""Whole networks, in the form their ecosystem expects. Everything is imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it.
_EXPORTS = {
    "LightningConfig": "heedful.models.lightning",
    "LightningForCausalLM": "heedful.models.lightning",
    "LightningModel": "heedful.models.lightning",
}

__all__ = ["LightningConfig", "LightningForCausalLM", "LightningModel"]

if TYPE_CHECKING:
    from heedful.models.lightning import LightningConfig, LightningForCausalLM, LightningModel


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'heedful.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
