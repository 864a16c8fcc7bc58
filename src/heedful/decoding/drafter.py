"""What a drafter is: it proposes a tree of tokens, the engine verifies it, and the drafter may learn from what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import LongTensor, Tensor
from transformers import Cache, PreTrainedModel

from heedful.decoding.tree import DraftTree


@dataclass(slots=True)
class DraftingOutputs:
    """What the target model returned, as far as the drafter's ``requires`` asks for it; everything else is None.

    Attributes:
        logits: raw logits (before processors, in the model's dtype): ``(B, n, V)`` of a verification, row i is node i of the
            tree (rows past a tree's last node mean nothing); ``(B, T, V)`` of the prompt.
        hidden_states: hidden states after the final norm, ``(B, n, H)`` or ``(B, T, H)``, rows as for ``logits``.
        cache: the target's cache. In ``prefill`` it holds the prompt; in ``update`` the accepted path has been committed.
        attention_mask: ``(B, T)`` of the prompt, or None without padding. None in ``update``.
    """

    logits: Tensor | None = None
    hidden_states: Tensor | None = None
    cache: Cache | None = None
    attention_mask: Tensor | None = None


class Drafter:
    """Base class of drafters. Every method but `propose` does nothing by default.

    A drafter decides how fast decoding is, never what comes out: any tree is verified exactly. It must not draw from
    torch's global random generator, which belongs to the model's sampling.

    Attributes:
        requires: what the engine hands to `update` and `prefill`: a subset of ``"logits"``, ``"hidden_states"`` (after the
            final norm), ``"prompt_logits"``, ``"prompt_hidden_states"`` and ``"cache"``. Only that is computed.
    """

    requires: frozenset[str] = frozenset()

    def begin(self, model: PreTrainedModel, batch_size: int) -> None:
        """Called once per generate, before the prompt is read. What was learned before stays."""

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        """The prompt has been read. ``tokens``: ``(B, T)``, with the padding that ``outputs.attention_mask`` marks."""

    def propose(self, roots: LongTensor, committed: list[LongTensor]) -> Sequence[DraftTree | None] | DraftTree:
        """Proposes a tree for each row.

        Args:
            roots: ``(B,)`` on the CPU, the last token chosen of each row, which the model has not read yet.
            committed: B LongTensors on the CPU: each row's tokens before its root, prompt included, padding left out.

        Returns:
            B entries, each a `DraftTree` whose node 0 is the row's root, or None (the root alone); or one `DraftTree` with
            tokens ``(B, n)`` and parents ``(n,)`` for all rows. Entries of finished rows are ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} is a Drafter and must define propose()")

    def update(
        self,
        trees: list[DraftTree | None],
        outputs: DraftingOutputs,
        paths: list[list[int]],
        new_roots: LongTensor,
    ) -> None:
        """A step has been verified and committed.

        Args:
            trees: the trees as they were verified (nodes without room left out), None for rows that had finished before.
            outputs: what ``requires`` asks for.
            paths: for each row the accepted nodes of its tree, starting with 0; empty for rows that had finished before.
            new_roots: ``(B,)`` on the CPU, the token that follows each path.
        """

    def clear(self) -> None:
        """Forgets what was learned."""
