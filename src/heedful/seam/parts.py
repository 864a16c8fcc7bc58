"""The three kinds of part that plug into an attention call: Kernel, Edit and Probe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from heedful.seam.call import AttentionCall
    from heedful.seam.verification import Verification


class PartError(RuntimeError):
    """A part did something in a call that cannot be used; the message names the layer and the remedy."""


STAGES = ("queries_keys", "logits", "probabilities", "outputs")


class Part:
    """What Kernel, Edit and Probe share: the selectors, read once when `attach` is called.

    Args:
        layers: Layer indices to act on. Default None: every layer with attention.
        heads: Query heads to act on, a list in the order in which the tensors are wanted, or a dict
            {layer: heads} (its layers are then the only ones). Default None: all heads.
        rows: Query rows to act on: "last" (one row a sample: the last one of this call that is not padding),
            "generated" (every row of decode calls), or a boolean mask (T,) or (B, T) over the tokens of the padded
            sequence (tokens past its end are not chosen). Default None: all rows.
        steps: Calls to act on. Decode step k is the k-th decode call after the prompt (from 0): it reads generated
            token k and predicts token k + 1; the prefill predicts token 0. A collection of ints or a `range`: those
            decode steps; "prefill" or "decode": those calls. Default None: every call. A decode call has one query row
            and a cache that held tokens, so without a cache every call is a prefill, and so is the verification of
            transformers' own assisted generation (`heedful.generate` knows its own to be decoding).
        cross: Act on cross-attention too (`call.cross` tells). Default False: self-attention only.

    Attributes:
        every_call: Whether the part is called in every call of its layers, for statistics that need them; where `rows`
            and `steps` choose nothing, `call.rows` has no column, (B, 0). Default False.
    """

    every_call: ClassVar[bool] = False
    layers: Iterable[int] | None = None
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    rows: str | Tensor | None = None
    steps: str | Iterable[int] | None = None
    cross: bool = False

    def __init__(
        self,
        *,
        layers: Iterable[int] | None = None,
        heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
        rows: str | Tensor | None = None,
        steps: str | Iterable[int] | None = None,
        cross: bool = False,
    ) -> None:
        self.layers = layers
        self.heads = heads
        self.rows = rows
        self.steps = steps
        self.cross = cross

    def summary(self, layer: int) -> dict[str, Any]:
        """What this part has to tell of a layer in `Attachment.report()`, beside what the seam counts by itself."""
        return {}

    def accept(self, verification: Verification, paths: Sequence[Sequence[int]]) -> None:
        """Called once after each verification of `heedful.generate` with the rows that became text.

        Only a part that keeps statistics of past rows needs it; by default nothing happens.

        Args:
            verification: The step that has just run (`steps`, `prompt_length`, `lengths`, `start`).
            paths: For each sample the accepted rows of that call, in order (empty for a finished sample).
        """


class Kernel(Part, ABC):
    """Computes the output of an attention call in place of the model's own implementation; at most one a layer.

    With `heads` or `rows`, only those take the kernel's result; the others keep the model's own.

    Attributes:
        honours_mask: Whether any boolean or additive 4-D `call.mask` is respected (a token tree's too). A kernel that
            does not is refused inside `heedful.generate` when tokens are drafted. Default False.
        has_probabilities: Whether the kernel's output is the masked softmax of all keys, so that `logits` and
            `probabilities` parts may act on its layers. Default False: such parts are refused there.
        extends_context: Whether texts longer than the model's own context can be read under it. Default False.
    """

    honours_mask: ClassVar[bool] = False
    has_probabilities: ClassVar[bool] = False
    extends_context: bool = False

    @abstractmethod
    def __call__(self, call: AttentionCall) -> Tensor:
        """Returns the heads' outputs (B, Hq, Tq, Dv). `call.mask` is the mask as the model handed it over."""


class Edit(Part):
    """Changes an attention call at one or more of four fixed stages; a subclass overrides those that it needs.

    Every method gets tensors of the asked heads and rows only, is called once per attention call with the whole batch,
    and returns a tensor of the same shape, which is used as it is. None, another shape or a value that is not finite
    (other than at hidden keys) is an error. Rows that see no key, and rows that pad a sample (`call.rows == -1`), are
    discarded.
    """

    def queries_keys(self, call: AttentionCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Before the scores: query (B, heads, R, D), the whole key (B, Hkv, Tk, D), rotated; returns both.

        Return new tensors. A changed key acts on every head and row that uses it, in this call only: the model's
        cache keeps its own.
        """
        return query, key

    def logits(self, call: AttentionCall, logits: Tensor) -> Tensor:
        """Before the softmax: (B, heads, R, Tk) fp32, after scaling, softcap and position bias; hidden keys: -inf.

        To hide a visible key return a large negative number there. A learned factor must skip the hidden keys, since
        0 times -inf is nan in its gradient.
        """
        return logits

    def probabilities(self, call: AttentionCall, probabilities: Tensor) -> Tensor:
        """After the softmax: (B, heads, R, Tk) fp32; hidden keys are 0. Nothing is renormalised."""
        return probabilities

    def outputs(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The heads' outputs (B, heads, R, Dv) before the output projection. This stage computes no logits."""
        return output


class Probe(Part):
    """Reads an attention call at the stages of `Edit`, in the same form, and returns nothing; changes no bit."""

    def queries_keys(self, call: AttentionCall, query: Tensor, key: Tensor) -> None:
        """Reads query (B, heads, R, D) and the whole key (B, Hkv, Tk, D)."""

    def logits(self, call: AttentionCall, logits: Tensor) -> None:
        """Reads (B, heads, R, Tk) fp32; hidden keys are -inf."""

    def probabilities(self, call: AttentionCall, probabilities: Tensor) -> None:
        """Reads (B, heads, R, Tk) fp32; hidden keys are 0."""

    def outputs(self, call: AttentionCall, output: Tensor) -> None:
        """Reads the heads' outputs (B, heads, R, Dv)."""


def stages_of(part: Part) -> frozenset[str]:
    """The stages that `part` overrides (none for a Kernel)."""
    base = Edit if isinstance(part, Edit) else Probe
    return frozenset(
        name
        for name in STAGES
        if isinstance(part, (Edit, Probe)) and getattr(getattr(part, name), "__func__", None) is not getattr(base, name)
    )
