"""Finds a model's attention modules and their layer numbers, and gives a module heedful's attention function.

Only the attention modules that a part asks about are touched: such a module gets a shallow copy of its config that
carries our function's name and the attach state. The model's own config, its mask building and all other modules stay
as they are, so everything else takes exactly the path it took before.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from heedful.seam.site import Site

NAME = "heedful"
S = TypeVar("S", bound=Site)
_NOT_BY_NAME = (
    f"The attention implementation {NAME!r} is not chosen by name: set the model back to 'sdpa' and use "
    "heedful.attach(model, ...)."
)
CROSS = re.compile(r"cross|encoder_attn|encdecattention|encoder_decoder", re.IGNORECASE)


def _function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """The one attention function that heedful registers with transformers."""
    site = getattr(module.config, "_heedful", None)
    if site is None:
        raise RuntimeError(
            f"The attention implementation {NAME!r} is not chosen by name: use heedful.attach(model, ...)."
        )
    return site.run(query, key, value, attention_mask, keywords)


def _mask_function(*args: Any, **kwargs: Any) -> Any:
    """The mask twin of `_function`: without it, choosing the name on a model would silently remove its causal mask."""
    raise RuntimeError(_NOT_BY_NAME)


AttentionInterface.register(NAME, _function)
AttentionMaskInterface.register(NAME, _mask_function)


# ---- the twin of a config


def _itself(x: Any) -> Any:
    return x


class _Twin:
    """Mixed into the class of a config copy: whatever copies or saves it gets the plain config instead."""

    _heedful: Site

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass  # a config class is registered and made a dataclass when subclassed; a twin is neither

    def __copy__(self) -> Any:
        return copy.copy(self._heedful.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The copied module comes with a copy of our pre-hook (its dict of hooks was copied just before): take it out.
        self._heedful.forget_hook(memo)
        return copy.deepcopy(self._heedful.config, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self._heedful.config,)


_twin_classes: dict[type, type] = {}


def _twin(site: Site) -> Any:
    kind = type(site.config)
    if kind not in _twin_classes:
        _twin_classes[kind] = types.new_class(kind.__name__, (_Twin, kind))
    twin: Any = object.__new__(_twin_classes[kind])
    twin.__dict__.update(site.config.__dict__)
    twin.__dict__.update(_attn_implementation_internal=NAME, _heedful=site)
    return twin


def site_of(module: nn.Module) -> Site | None:
    """The attach state of an attention module, or None."""
    config = module.__dict__.get("config")
    return config._heedful if isinstance(config, _Twin) else None


def sites_in(model: nn.Module) -> list[Site]:
    """The attach states of all attached attention modules in `model`."""
    return [site for module in model.modules() if (site := site_of(module)) is not None]


def install(site: Site) -> None:
    """Gives the module its twin config and the pre-hook; undone by `uninstall`."""
    site.module.config = _twin(site)
    site.hook = site.module.register_forward_pre_hook(site, with_kwargs=True)


def uninstall(site: Site) -> None:
    if site_of(site.module) is site:
        site.module.config = site.config
    site.hook.remove()


# ---- discovery


@dataclass(frozen=True)
class Found:
    """An attention module of a stack: its name there, its layer index, and whether it is cross-attention."""

    name: str
    module: nn.Module
    layer: int
    cross: bool
    stack: str


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, PEFT and distributed wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def forward_of(module: nn.Module) -> Any:
    """The forward of the module's class, without decorators."""
    # The class's forward: accelerate and others replace the instance's.
    return inspect.unwrap(type(module).forward)


def has_interface(module: nn.Module) -> bool:
    """Whether the module's forward asks transformers' attention interface for its function."""
    code = getattr(forward_of(module), "__code__", None)
    return code is not None and {"get_interface", "config"} <= set(code.co_names) and _eager_name(code) is not None


def _eager_name(code: types.CodeType) -> str | None:
    return next((n for n in code.co_names if n.endswith("eager_attention_forward")), None)


def _layer_of(name: str, module: nn.Module, root: nn.Module) -> tuple[int, str]:
    """Index in the outermost ModuleList around the module, and that list's name."""
    here: Any = root
    walked: list[str] = []
    for piece in name.split(".") if name else []:
        if isinstance(here, nn.ModuleList):
            return int(piece), ".".join(walked)
        here = getattr(here, piece)
        walked.append(piece)
    own = getattr(module, "layer_idx", None)
    return (own if isinstance(own, int) else 0), ""


def find_attention(model: nn.Module) -> tuple[nn.Module, list[Found]]:
    """The stack that parts act on, and its attention modules.

    Raises:
        ValueError: If the model has no attention that goes through transformers' interface, or several stacks.
    """
    model = unwrap(model)
    decoder = getattr(model, "get_decoder", None)
    root: nn.Module = (decoder() if callable(decoder) else None) or model
    found = []
    for name, module in root.named_modules():
        if not has_interface(module):
            continue
        layer, stack = _layer_of(name, module, root)
        cross = bool(CROSS.search(name) or CROSS.search(type(module).__name__)) or bool(
            getattr(module, "is_cross_attention", False)
        )
        found.append(Found(name, module, layer, cross, stack))
    kind = type(model).__name__
    if not found:
        raise ValueError(
            f"{kind} has no attention that goes through transformers' AttentionInterface (no softmax attention at all, "
            "or its own code for it), so nothing can be attached. Use a model class that supports attn_implementation, "
            "or pass the sub-module that has such attention."
        )
    stacks = sorted({f.stack for f in found})
    if len(stacks) > 1:
        raise ValueError(
            f"{kind} has several stacks of layers ({', '.join(stacks)}), whose layer numbers would collide: pass the "
            "sub-module of the one you mean."
        )
    return root, found


def query_heads(module: nn.Module) -> int | None:
    """Number of query heads, or None where the module does not say."""
    config = module.config
    for owner, name in (
        (module, "num_heads"),
        (module, "n_heads"),
        (module, "num_attention_heads"),
        (config, "num_attention_heads"),
        (config, "num_heads"),
    ):
        number = getattr(owner, name, None)
        if isinstance(number, int) and number > 0:
            return number
    return None


def new_site(found: Found, kind: Callable[..., S] = Site) -> S:  # type: ignore[assignment]
    """The attach state for a module that has none yet, made by `kind`.

    Raises:
        ValueError: If the module runs other code by the name of its implementation.
    """
    forward = forward_of(found.module)
    code = forward.__code__
    constants = {c for k in code.co_consts for c in (k if isinstance(k, tuple) else (k,)) if isinstance(c, str)}
    implementation = getattr(found.module.config, "_attn_implementation", None)
    upcast = implementation == "eager" and getattr(found.module, "reorder_and_upcast_attn", False)
    if "sdpa" in constants or upcast:
        raise ValueError(
            f"layer {found.layer}: {type(found.module).__name__} chooses its algorithm by the name of the attention "
            "implementation, which attaching changes. "
            + (
                "Set reorder_and_upcast_attn=False or use attn_implementation='sdpa'."
                if upcast
                else "Leave it out with layers=."
            )
        )
    parameters = tuple(inspect.signature(forward).parameters)[1:]
    functions = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    return kind(found.module, found.layer, found.cross, parameters, functions, forward.__globals__[_eager_name(code)])


def check_implementation(found: Found) -> None:
    """Refuses implementations that cannot be run through: ours chosen by name, and paged attention."""
    name = getattr(found.module.config, "_attn_implementation", None) or "eager"
    if (name == NAME and site_of(found.module) is None) or str(name).startswith("paged|"):
        raise ValueError(
            f"layer {found.layer}: the model's attention implementation is {name!r}. Call "
            "model.set_attn_implementation('sdpa') before heedful.attach."
        )
