"""What `heedful.attach` promises of every model family, as one function; the tests and the docs' table both run it."""

from __future__ import annotations

import inspect
from typing import Any

import tiny_models
import torch
from torch import Tensor, nn

import heedful
from heedful.seam.discovery import find_attention


class Identity(heedful.Edit):
    """An edit of one stage that changes nothing."""

    def __init__(self, stage: str, **selectors: Any) -> None:
        super().__init__(**selectors)
        self.calls = 0

        def same(call: heedful.AttentionCall, *tensors: Tensor) -> Any:
            self.calls += 1
            return tensors if len(tensors) > 1 else tensors[0]

        def queries_keys(self: Any, call: Any, query: Tensor, key: Tensor) -> Any:
            return same(call, query, key)

        def one(self: Any, call: Any, tensor: Tensor) -> Any:
            return same(call, tensor)

        # A class of its own, since a part's stages are those its class overrides.
        self.__class__ = type("Identity", (Identity,), {stage: queries_keys if stage == "queries_keys" else one})


class Weights(heedful.Probe):
    """Keeps the probabilities of every call: {layer: [tensor]}."""

    def __init__(self, **selectors: Any) -> None:
        super().__init__(**selectors)
        self.seen: dict[int, list[Tensor]] = {}
        self.calls: list[heedful.AttentionCall] = []

    def probabilities(self, call: heedful.AttentionCall, probabilities: Tensor) -> None:
        self.seen.setdefault(call.layer, []).append(probabilities.detach().clone())
        self.calls.append(call)


STAGES = ("queries_keys", "logits", "probabilities", "outputs")


def result(model: Any, given: dict[str, Any]) -> Tensor:
    """The model's output that everything before it acts on."""
    with torch.no_grad():
        out = model(**given)
    for name in ("logits", "last_hidden_state", "text_embeds"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise AssertionError(type(out))


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything about the modules that attach may touch."""
    return [
        (
            name,
            id(module.__dict__.get("config")),
            getattr(module.__dict__.get("config"), "_attn_implementation", None),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_pre_hooks_with_kwargs),
            module.__dict__.get("forward"),
        )
        for name, module in model.named_modules()
    ]


def stack(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def eager_attentions(name: str, given: dict[str, Any], stack_of: Any = stack) -> list[tuple[int, Tensor]]:
    """(layer, weights) of every self-attention call of the stack, as the family's own eager function computes them."""
    model = tiny_models.build(name, attn="eager")
    _, attention = find_attention(stack_of(model))
    layer_of = {found.module: found.layer for found in attention if not found.cross}
    space = inspect.unwrap(type(attention[0].module).forward).__globals__
    function_name = next(n for n in space if n.endswith("eager_attention_forward"))
    own, seen = space[function_name], []

    def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = own(module, *args, **kwargs)
        if module in layer_of:
            seen.append((layer_of[module], weights.detach()))
        return output, weights

    space[function_name] = recorded
    try:
        result(model, given)
    finally:
        space[function_name] = own
    return seen


def real(given: dict[str, Any], out: Tensor) -> Tensor:
    """`out` without the rows of padding."""
    mask = given.get("attention_mask")
    if mask is not None and out.dim() == 3 and out.shape[:2] == mask.shape:
        return out[mask.bool()]
    return out


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def check(name: str, padding: str | None = None, tower: str | None = None) -> dict[str, Any]:
    """Runs every promise on one family; raises AssertionError where one does not hold.

    Args:
        name: A family of tiny_models.
        padding: Of the batch.
        tower: Dotted name of the sub-module to attach to; None for the model itself.

    Returns:
        Measured figures: layers, and the largest differences of `identity` edits and `probe` weights.
    """
    model = tiny_models.build(name)
    given = tiny_models.inputs(model, padding=padding)
    target = model if tower is None else model.get_submodule(tower)

    def stack_of(m: Any) -> Any:
        return stack(m) if tower is None else m.get_submodule(tower)

    base, before = result(model, given), fingerprint(model)
    figures: dict[str, Any] = {"model": type(model).__name__, "identity": 0.0, "probe": 0.0}

    with heedful.attach(target) as attached:
        assert torch.equal(result(model, given), base), "no parts"
        assert attached.layers == []
    with heedful.attach(target, Identity("outputs")) as attached:
        layers = attached.layers
    figures["layers"] = layers

    for stage in STAGES:
        for selectors in (
            {},
            {"heads": [1, 0], "rows": "last"},
            {"heads": [1]},
            {"rows": "last", "layers": layers[-1:]},
        ):
            part = Identity(stage, **selectors)
            with heedful.attach(target, part):
                out = result(model, given)
            assert part.calls > 0
            difference = largest_difference(real(given, out), real(given, base))
            figures["identity"] = max(figures["identity"], difference)
            assert difference < 1e-5, f"identity at {stage} {selectors}: {difference}"

    probe, one = Weights(), Weights(heads=[1, 0], rows="last")
    with heedful.attach(target, probe, one):
        out = result(model, given)
    assert torch.equal(out, base), "a probe changed bits"
    eager = eager_attentions(name, given, stack_of)
    assert [layer for layer, _ in eager] == [call.layer for call in probe.calls]
    order = sorted(probe.seen)
    for layer in order:
        references = [w for where, w in eager if where == layer]
        for weights, reference in zip(probe.seen[layer], references, strict=True):
            figures["probe"] = max(figures["probe"], largest_difference(*_seeing(weights, reference)))
    assert figures["probe"] < 1e-5, f"probe against eager: {figures['probe']}"
    for layer in order:
        for whole, last, call in zip(
            probe.seen[layer], one.seen[layer], [c for c in one.calls if c.layer == layer], strict=True
        ):
            expected = whole[:, [1, 0]].gather(
                2, call.rows.clamp(min=0)[:, None, :, None].expand(-1, 2, -1, whole.shape[3])
            )
            assert torch.allclose(last, expected, atol=1e-6)

    assert fingerprint(model) == before
    assert torch.equal(result(model, given), base), "after leaving"
    return figures


def _seeing(weights: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that see at least one key (the probe's are 0 elsewhere, eager's are whatever the mask left)."""
    sees = weights.sum(-1) > 0
    return weights[sees], reference[sees].float()
