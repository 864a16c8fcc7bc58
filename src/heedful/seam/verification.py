"""How `heedful.generate` tells attached parts that a forward verifies drafted tokens.

A verification runs n rows a sample in one forward, with a mask in which each row sees its own sequence only. To every
part it is a decode call: `rows="last"` and `rows="generated"` choose all its rows, since each is the last row of its
own sequence, `steps` and boolean `rows` choose by the place that the row would have in `model.generate`, and a method
is still called once with the whole batch (`call.rows` and `call.verification.steps` tell which row is what).

    verify = Verification(model)                    # once per generate, before the prefill; refuses kernels that cannot
    ...
    with verify.rows(steps, prompt_length=..., lengths=..., start=...):
        outputs = model(tokens, attention_mask=tree_mask, position_ids=..., past_key_values=cache)
    ...                                             # the walk
    verify.accept(paths)                            # parts with running statistics take the accepted rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from heedful.seam.discovery import sites_in
from heedful.seam.naming import named_kernel
from heedful.seam.parts import Kernel, Part
from heedful.seam.site import thread


class Verification:
    """Marks the forwards of one `generate` that verify drafted tokens, for the parts attached to `model`.

    The fields hold the step that runs (or has just run) and are what a part reads as `call.verification`.

    Attributes:
        steps: (B, n) decode step that each row stands for: its token would be generated token number `steps[b, i]`,
            counted from 0. So the root has the number of tokens generated before it, and a node its depth more; -1
            where a row holds no token.
        prompt_length: Length of the padded prompt; row (b, i) has the place `prompt_length + steps[b, i]` in the padded
            sequence of `model.generate`.
        lengths: (B,) filled key slots of each sample before this forward: slots 0 .. lengths[b] - 1 hold its sequence.
        start: Key slot of row 0; row i of every sample writes its key to slot start + i. After `accept` the engine
            moves the accepted rows' keys to slots lengths[b], lengths[b] + 1, ...

    Args:
        model: The model that generates, wrapped or not.

    Raises:
        ValueError: If an attached Kernel does not honour masks (`Kernel.honours_mask`).
    """

    steps: Tensor
    prompt_length: int
    lengths: Tensor
    start: int

    def __init__(self, model: nn.Module) -> None:
        self._sites = sites_in(model)
        self._parts: list[Part] = []
        for site in self._sites:
            for selected in site.selected():
                part = selected.part
                if isinstance(part, Kernel) and not part.honours_mask:
                    raise ValueError(
                        f"layer {site.layer}: the kernel {selected.name} cannot honour the mask of drafted tokens "
                        "(honours_mask is False). Generate with drafter=None, or detach the kernel."
                    )
                if all(part is not known for known in self._parts):
                    self._parts.append(part)
        for module in model.modules():
            kernel = named_kernel(module)
            if kernel is not None and not kernel.honours_mask:
                raise ValueError(
                    f"the attention implementation {module.config._attn_implementation!r} ({type(kernel).__name__}) "  # type: ignore[union-attr]
                    "cannot honour the mask of drafted tokens. Generate with drafter=None, or choose another one."
                )

    @property
    def attached(self) -> bool:
        """Whether any part is attached to the model."""
        return bool(self._sites)

    @contextmanager
    def rows(self, steps: Tensor, *, prompt_length: int, lengths: Tensor, start: int) -> Iterator[Verification]:
        """Around one verifying forward. Give `steps` and `lengths` on the CPU: selection then never waits for a GPU."""
        self.steps, self.prompt_length, self.lengths, self.start = steps, prompt_length, lengths, start
        key = thread()
        for site in self._sites:
            site.verifications[key] = self
        try:
            yield self
        finally:
            for site in self._sites:
                site.verifications.pop(key, None)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Hands the accepted rows of the last forward to every attached part (once each).

        Args:
            paths: For each sample the accepted rows in order, starting with 0; empty for a finished sample.
        """
        for part in self._parts:
            part.accept(self, paths)
