"""heedful.register_attention: a kernel by name, for `attn_implementation=` and `model.set_attn_implementation`.

transformers hands an attention function the module and its tensors, but not the cache, the position tables or the
positions of the call. Those come through a pre-hook on the module, as under `attach`; the first call of a module finds
it without one, and reads them from the frame of the module's forward that made the call.
"""

from __future__ import annotations

import sys
import types
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from heedful.seam.attachment import Plan
from heedful.seam.discovery import CROSS, Found, forward_of, has_interface, new_site, site_of
from heedful.seam.parts import Kernel, PartError
from heedful.seam.site import Site, nothing, thread

_BASES = ("sdpa", "eager")
_STATE = "_heedful_named"  # the attribute of an attention module that holds its NamedSite
_registered: dict[str, NamedAttention] = {}


def register_attention(name: str, part: Kernel, *, base: str = "sdpa") -> NamedAttention:
    """Makes a kernel an attention implementation of transformers, chosen by name wherever a model is loaded or set.

    Every attention layer of a model with that name runs `part`, as after `heedful.attach(model, part)`; layers, heads,
    rows and calls that the part's selectors leave out run `base`. What a layer must remember lives on its module and
    goes with it. Calling it again with the same name puts the new part in the place of the old one.

    Example:
        >>> import heedful
        >>> hip = heedful.register_attention("hip", heedful.HiPAttention(top_k=256))
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> model.set_attn_implementation("hip")  # or from_pretrained(..., attn_implementation="hip")
        >>> inputs = tokenizer("It was the best of times, " * 200, return_tensors="pt")
        >>> tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        >>> share = hip.report()[0]["share_of_keys_read"]
        >>> model.set_attn_implementation("sdpa")

    Args:
        name: The implementation's name; not one that transformers has itself.
        part: The Kernel. Models that use one name share it, and its report; give two models their own by two names.
        base: The model's own attention beneath it, "sdpa" or "eager": whose masks the part reads, and what runs where
            it does not act. Default "sdpa". "eager" for models whose attention SDPA does not know: Gemma 2's softcap,
            gpt-oss's sink logits.

    Returns:
        The NamedAttention, whose `report()` is that of `Attachment.report`.

    Raises:
        ValueError: At once if the name is transformers' own, or `base` is neither of the two. In a call under "sdpa"
            if the model passes a softcap or sink logits; in the first call of a layer that is compiled before it ever
            ran (run the model once, or use `heedful.attach`).
        TypeError: If `part` is no Kernel.

    Cost:
        A pre-hook on each attention module, from its first call on, which goes when the model has another
        implementation.

    When not to use:
        For some layers of one model, Edits, Probes or a block of code only: `heedful.attach`. A name set on a model of
        several towers reaches them all: `set_attn_implementation({"text_config": name})` means one.
    """
    if not isinstance(part, Kernel):
        raise TypeError(f"{part!r} is not a heedful.Kernel; other parts go through heedful.attach(model, part).")
    if base not in _BASES:
        raise ValueError(f"base must be 'sdpa' or 'eager', got {base!r}.")
    if (
        not isinstance(name, str)
        or not name
        or "|" in name
        or (name not in _registered and name in ("eager", *AttentionInterface().valid_keys()))
    ):
        raise ValueError(f"{name!r} is transformers' own attention implementation (or no name); choose another one.")
    attention = NamedAttention(name, part, base)
    _registered[name] = attention
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[base])
    return attention


def named_kernel(module: nn.Module) -> Kernel | None:
    """The kernel that an attention module has by the name of its implementation, or None."""
    attention = _registered.get(getattr(getattr(module, "config", None), "_attn_implementation", None) or "")
    return None if attention is None else attention.part


class NamedAttention:
    """A kernel under a name; made by `register_attention`. It is the attention function that transformers calls."""

    def __init__(self, name: str, part: Kernel, base: str) -> None:
        self.name, self.part, self.base = name, part, base
        self._plan = Plan(part, cross=False)
        self._sites: WeakSet[NamedSite] = WeakSet()

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        site = module.__dict__.get(_STATE)
        if not isinstance(site, NamedSite) or site.module is not module or site.attention is not self:
            site = self._site(module)
            site.read_frame(sys._getframe(1), query.shape[2])
        if self.base == "sdpa":
            for what in ("softcap", "s_aux"):
                if keywords.get(what) is not None:
                    raise ValueError(
                        f"layer {site.layer}: this model passes `{what}` to its attention, which SDPA does not know. "
                        f"Register the part with base='eager': heedful.register_attention({self.name!r}, part, "
                        "base='eager')."
                    )
        return site.run(query, key, value, attention_mask, keywords)

    def report(self) -> list[dict[str, Any]]:
        """What happened so far: one dict per attention module that ran the part, as in `Attachment.report`."""
        lines = []
        for site in sorted(self._sites, key=lambda site: site.layer):
            for s in site.selected():
                lines.append({"part": s.name, "layer": s.layer, **s.tally.report(), **s.part.summary(s.layer)})
        return lines

    def _site(self, module: nn.Module) -> NamedSite:
        """The state of a module that this implementation has not run yet, with its hook."""
        kind = type(module).__name__
        layer = getattr(module, "layer_idx", None)
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{kind}: the first call under attn_implementation={self.name!r} is being compiled. Run the model once "
                "before torch.compile, or use heedful.attach(model, part)."
            )
        if not isinstance(layer, int):
            raise ValueError(f"{kind} does not say its layer_idx. Use heedful.attach(model, part) instead.")
        if not has_interface(module):
            raise ValueError(f"{kind} does not use transformers' AttentionInterface, so no part can run in it.")
        cross = bool(CROSS.search(kind)) or bool(getattr(module, "is_cross_attention", False))
        found = Found("", module, layer, cross, "")
        site = new_site(found, lambda *given: NamedSite(self, *given))
        if self._plan.wants(found):
            site.frames = ((self, (self._plan.on(found, None),)),)
        old = module.__dict__.get(_STATE)
        if isinstance(old, NamedSite) and old.module is module:
            old.hook.remove()
        site.hook = module.register_forward_pre_hook(site, with_kwargs=True)
        module.__dict__[_STATE] = site
        self._sites.add(site)
        return site


class NamedSite(Site):
    """The state of one attention module whose implementation was chosen by name."""

    def __init__(self, attention: NamedAttention, *given: Any) -> None:
        super().__init__(*given)
        self.attention = attention

    def original_function(self) -> tuple[str, Any]:
        return self.attention.base, self.functions.get_interface(self.attention.base, self.eager)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attached = site_of(module)
        config: Any = module.config if attached is None else attached.config
        if _registered.get(config._attn_implementation) is not self.attention:  # the model has another one by now
            self.hook.remove()
            del module.__dict__[_STATE]
            return
        super().__call__(module, args, kwargs)

    def read_frame(self, frame: types.FrameType | None, queries: int) -> None:
        """Takes the inputs of a forward that began before the hook was there from that forward's own frame."""
        code = forward_of(self.module).__code__
        for _ in range(8):  # under `attach` there are frames between
            if frame is None:
                break
            if frame.f_code is code and frame.f_locals.get("self") is self.module:
                given = dict(frame.f_locals)
                del given["self"]
                given.update(given.pop("kwargs", {}))
                super().__call__(self.module, (), given)
                inputs = self.inputs[thread()]
                if inputs.cache is not None and not inputs.cross:
                    inputs.past = inputs.past - queries  # the forward has added its own tokens since
                return
            frame = frame.f_back
        raise PartError(
            f"layer {self.layer}: the forward of {type(self.module).__name__} was not found around its first attention "
            "call. Use heedful.attach(model, part) instead."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nothing  # a copied module begins anew
