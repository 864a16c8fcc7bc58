"""heedful.attach: runs a model with parts in its attention calls."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from heedful.seam.discovery import (
    Found,
    check_implementation,
    find_attention,
    install,
    new_site,
    query_heads,
    site_of,
    uninstall,
)
from heedful.seam.parts import Edit, Kernel, Part, Probe
from heedful.seam.selection import Selected, Tally
from heedful.seam.site import Site

_lock = threading.RLock()


def attach(
    model: nn.Module,
    *parts: Part,
    layers: Iterable[int] | None = None,
    cross: bool = False,
    max_bytes: int | None = None,
) -> Attachment:
    """Runs `model` with `parts` in its attention calls, from now until `detach()` or the end of the `with` block.

    Only the layers that a part asks about are touched; all others run the model's own attention and are bit-identical.
    Of the touched ones only the asked heads and rows are computed beside the model's own attention, which still runs.

    Args:
        model: A transformers model, also wrapped by PEFT, torch.compile or DistributedDataParallel. With several stacks
            the parts act on that of `model.get_decoder()`; for another tower pass that sub-module.
        *parts: Kernels, Edits and Probes. Within a stage they act in this order; an outer attach acts before an inner.
        layers: Restricts every part to these layers.
        cross: Lets every part act on cross-attention too (`call.cross`).
        max_bytes: Refuses, in the call, a part whose logits or probabilities would take more bytes than this.

    Returns:
        The Attachment: a context manager with `detach()` and `report()`.

    Raises:
        ValueError: If the model has no attention interface, a layer or head is out of range, two kernels meet on one
            layer, or a part wants logits or probabilities of a kernel that has none. The model is then untouched.

    Example:
        class Sharpen(heedful.Edit):
            def logits(self, call, logits):
                return 1.5 * logits

        with heedful.attach(model, Sharpen(layers=[3], heads=[0, 2], rows="last")) as attached:
            model.generate(**inputs)
        print(attached.report())
    """
    return Attachment(model, parts, layers, cross, max_bytes)


class Attachment:
    """Parts attached to a model; made by `attach`. `with` returns the same object and detaches at its end."""

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        layers: Iterable[int] | None,
        cross: bool,
        max_bytes: int | None,
    ) -> None:
        self._selected: list[tuple[Found, tuple[Selected, ...]]] = []
        self._idle: list[Part] = []
        self._sites: list[Site] = []
        self._active = False
        self._entered = 0
        with _lock:
            self._select(model, parts, layers, cross, max_bytes)
            self._install()

    @property
    def layers(self) -> list[int]:
        """The layers on which a part acts."""
        return sorted({found.layer for found, _ in self._selected})

    def detach(self) -> None:
        """Removes these parts, in any order with other attaches; the last one restores the model exactly."""
        with _lock:
            if not self._active:
                return
            self._active, self._entered = False, 0
            for site in self._sites:
                site.frames = tuple(frame for frame in site.frames if frame[0] is not self)
                if not site.frames:
                    uninstall(site)

    def __enter__(self) -> Attachment:
        with _lock:
            if not self._active:  # entered again after it was left
                self._install()
            self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            self._entered -= 1
            if self._entered <= 0:  # the outermost of its own blocks
                self.detach()

    def report(self) -> list[dict[str, Any]]:
        """What happened so far: one dict per part and layer.

        Returns:
            Dicts with `part` (class name), `layer`, `calls`, `rows` (query rows that saw a key, over all calls and
            samples), `heads` (sorted), and for edits of logits or probabilities `mass_moved`: {head: share of a row's
            attention that moved, mean over rows} (half the sum of absolute differences). What the part tells itself
            (`Part.summary`) stands beside. A part that never acted has calls 0; one that the selectors leave no
            layer has layer None. Compiled and captured graphs are not counted.
        """
        lines: list[dict[str, Any]] = [
            {"part": type(part).__name__, "layer": None, **Tally().report()} for part in self._idle
        ]
        for found, selected in self._selected:
            for s in selected:
                where = {"layer": found.layer, **({"cross": True} if found.cross else {})}
                lines.append({"part": s.name, **where, **s.tally.report(), **s.part.summary(found.layer)})
        return lines

    # ---- set-up

    def _select(
        self, model: nn.Module, parts: Sequence[Part], layers: Iterable[int] | None, cross: bool, max_bytes: int | None
    ) -> None:
        _, attention = find_attention(model)
        known = sorted({found.layer for found in attention if not found.cross or cross})
        everywhere = None if layers is None else _indices("layers", layers)
        _check_layers("attach(layers=)", everywhere, known, model)
        plans = []
        for part in parts:
            if not isinstance(part, (Kernel, Edit, Probe)):
                raise TypeError(
                    f"{part!r} is not a part: give instances of heedful.Kernel, heedful.Edit or heedful.Probe."
                )
            plans.append(Plan(part, cross))
            plans[-1].check(attention, model)
        for found in attention:
            check_implementation(found)
            selected = []
            for plan in plans:
                if (everywhere is None or found.layer in everywhere) and plan.wants(found):
                    selected.append(plan.on(found, max_bytes))
            if selected:
                self._selected.append((found, tuple(selected)))
        acting = {id(s.part) for _, selected in self._selected for s in selected}
        self._idle = [part for part in parts if id(part) not in acting]

    def _install(self) -> None:
        sites: list[tuple[Site, tuple[Selected, ...], bool]] = []
        for found, selected in self._selected:  # everything that can be refused is refused before anything is touched
            site = site_of(found.module)
            fresh = site is None
            site = new_site(found) if site is None else site
            _check_composition(found.layer, [*site.selected(), *selected])
            sites.append((site, selected, fresh))
        self._sites = [site for site, _, _ in sites]
        for site, selected, fresh in sites:
            site.frames = (*site.frames, (self, selected))
            if fresh:
                install(site)
        self._active = True


class Plan:
    """A part's selectors, read once."""

    def __init__(self, part: Part, cross: bool) -> None:
        self.part, self.name, self.cross = part, type(part).__name__, cross or part.cross
        self.layers = None if part.layers is None else _indices(f"{self.name}: layers", part.layers)
        self.by_layer: dict[int, tuple[int, ...]] | None = None
        self.heads: tuple[int, ...] | None = None
        if isinstance(part.heads, Mapping):
            self.by_layer = {layer: self._heads(heads) for layer, heads in part.heads.items()}
        elif part.heads is not None:
            self.heads = self._heads(part.heads)
        self.rows, self.steps = self._rows(part.rows), self._steps(part.steps)

    def check(self, attention: Sequence[Found], model: nn.Module) -> None:
        """Refuses layers that the model does not have."""
        known = sorted({found.layer for found in attention if self.cross or not found.cross})
        _check_layers(self.name, self.layers, known, model)
        _check_layers(self.name, None if self.by_layer is None else tuple(self.by_layer), known, model)

    def _heads(self, heads: Iterable[int]) -> tuple[int, ...]:
        heads = _indices(f"{self.name}: heads", heads)
        if len(set(heads)) < len(heads):
            raise ValueError(f"{self.name}: heads={list(heads)} names a head twice.")
        if not heads:
            raise ValueError(f"{self.name}: heads is empty; give at least one head, or None for all.")
        return heads

    def _rows(self, rows: Any) -> Any:
        if rows is None or (isinstance(rows, str) and rows in ("last", "generated")):
            return rows
        if isinstance(rows, str):
            raise ValueError(
                f"{self.name}: rows={rows!r}; give None, 'last', 'generated' or a boolean mask over tokens."
            )
        mask = torch.as_tensor(rows)
        if mask.dtype != torch.bool or mask.dim() not in (1, 2):
            raise ValueError(
                f"{self.name}: rows must be a boolean mask (T,) or (B, T), not {tuple(mask.shape)} {mask.dtype}."
            )
        return mask.detach().cpu().clone().reshape(-1, mask.shape[-1])

    def _steps(self, steps: Any) -> Any:
        if steps is None or steps in ("prefill", "decode"):
            return steps
        if isinstance(steps, (str, int)):
            raise ValueError(
                f"{self.name}: steps={steps!r}; give 'prefill', 'decode', a range or a list of step numbers."
            )
        return steps if isinstance(steps, range) else frozenset(_indices(f"{self.name}: steps", steps))

    def wants(self, found: Found) -> bool:
        return (
            (self.layers is None or found.layer in self.layers)
            and (self.by_layer is None or found.layer in self.by_layer)
            and (self.cross or not found.cross)
        )

    def on(self, found: Found, max_bytes: int | None) -> Selected:
        """The part on one attention module."""
        heads = self.heads if self.by_layer is None else self.by_layer[found.layer]
        number = query_heads(found.module)
        wrong = [h for h in heads or () if h < 0 or (number is not None and h >= number)]
        if wrong:
            raise ValueError(
                f"layer {found.layer}: {self.name} asks for the heads {wrong}, but this layer has the query heads "
                f"0 to {(number or 0) - 1}."
            )
        return Selected(self.part, found.layer, heads, self.rows, self.steps, self.cross, max_bytes)


def _indices(what: str, numbers: Any) -> tuple[int, ...]:
    if isinstance(numbers, (int, str)):
        raise ValueError(f"{what} must be a list of numbers, not {numbers!r}.")
    numbers = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    return tuple(int(n) for n in numbers)


def _check_layers(who: str, layers: Sequence[int] | None, known: Sequence[int], model: nn.Module) -> None:
    wrong = [layer for layer in layers or () if layer not in known]
    if wrong:
        raise ValueError(
            f"{who}: layer {', '.join(map(str, wrong))} has no attention to attach to. Layers of "
            f"{type(model).__name__} that have: {list(known)}."
        )


def _check_composition(layer: int, selected: Sequence[Selected]) -> None:
    kernels = [s for s in selected if isinstance(s.part, Kernel)]
    if len(kernels) > 1:
        raise ValueError(
            f"layer {layer}: two kernels ({', '.join(s.name for s in kernels)}). A layer has one at most: give them "
            "different layers=, or detach the other."
        )
    for kernel in kernels:
        weighing = [s for s in selected if s.weighs]
        if weighing and not kernel.part.has_probabilities:  # type: ignore[attr-defined]
            raise ValueError(
                f"layer {layer}: {weighing[0].name} works on logits or probabilities, but the kernel {kernel.name} has "
                "none. Give them different layers=, or use parts of the stages queries_keys and outputs."
            )
