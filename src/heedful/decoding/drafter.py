"""What a drafter is: it proposes a tree of tokens, the engine verifies it, and the drafter may learn from what came out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
        hidden_states: hidden states after the final norm, ``(B, n, H)`` or, of the prompt, ``(B, T, H)``, rows as for
            ``logits``. Without ``"prompt_hidden_states"`` only the prompt's last row comes, ``(B, 1, H)``.
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
        joins_forward: whether the drafter takes part in the model's forward itself (`joining`).
        rows_per_node: rows of the forward that a node of the tree has, its own included, where the drafter appends the most. A
            drafter that joins the forward and leaves it at 1 runs in the eager engine.
    """

    requires: frozenset[str] = frozenset()
    joins_forward: bool = False
    rows_per_node: int = 1

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

    def joining(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Entered around the model's forward of each verification, where `joins_forward`."""
        return nullcontext()

    def on_device(self, model: PreTrainedModel, batch_size: int, capacity: int) -> DeviceDrafter | None:
        """This drafter in tensor operations of fixed shapes, for the CUDA-graph engine; None: it drafts on the host.

        Args:
            model: the target model.
            batch_size: rows.
            capacity: rows of the static cache.
        """
        return None


@dataclass(slots=True)
class DeviceStep:
    """What one verification gave, as tensors of fixed shapes on the model's device: B rows, n nodes, paths of m nodes.

    Attributes:
        tokens: ``(B, n)`` int64, the verified trees; node 0 is the root.
        logits: ``(B, n, V)``, raw, in the model's dtype.
        hidden_states: ``(B, n, H)`` after the final norm, if ``requires`` has ``"hidden_states"``, else None.
        path: ``(B, m)`` int64, the accepted nodes, node 0 first; entries from ``count`` on repeat the last accepted node.
        count: ``(B,)`` int64, accepted nodes, the root included: at least 1.
        roots: ``(B,)`` int64, the token chosen after each path: the root of the next tree.
        lengths: ``(B,)`` int64, rows of the cache that hold each row's text (padding included), this step's path included.
        positions: ``(B,)`` int64, the position of the next root (``lengths`` without the padding).
        cache: the static cache, this step's path committed: ``cache.layers[i].keys`` is ``(B, Hkv, capacity, D)``, rows from
            ``lengths`` on mean nothing.
    """

    tokens: Tensor
    logits: Tensor
    hidden_states: Tensor | None
    path: Tensor
    count: Tensor
    roots: Tensor
    lengths: Tensor
    positions: Tensor
    cache: Cache


class DeviceDrafter:
    """A drafter inside the captured step of the CUDA-graph engine: trees of one fixed shape, made by tensor operations.

    `advance` is captured and replayed: no host synchronisation, no data-dependent Python, no shape that changes, and state in
    tensors that are made once and written in place. It runs once after the prefill (there the "tree" is the last prompt
    token: n = m = 1), and then in every step; each of the two is captured, after it has run eagerly.

    Attributes:
        parents: the shape of every tree, ``parents[0] == -1`` and ``0 <= parents[i] < i``; or None: every tree has its own,
            which `advance` returns.
        num_nodes: nodes of every tree, the root included.
        max_depth: the deepest node that a tree may have.
    """

    parents: tuple[int, ...] | None
    num_nodes: int
    max_depth: int

    def begin(self) -> None:
        """A generate begins: resets, in place, what belongs to one generate."""

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        """The prompt has been read (not captured); as `Drafter.prefill`."""

    def joining(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """As `Drafter.joining`, around forwards that are captured: n rows may become up to ``rows_per_node`` times n.

        What is appended comes behind the n nodes, step by step: row ``s * n + i`` is one more node, a child of row
        ``(s - 1) * n + i``. The session gives such rows their attention and their places in the cache, and the next
        verification writes over them.
        """
        return nullcontext()

    def advance(self, step: DeviceStep) -> Tensor | tuple[Tensor, Tensor]:
        """Learns from a verification and drafts the next trees.

        Returns:
            tokens ``(B, num_nodes)`` int64, ``step.roots`` first; where `parents` is None also parents ``(B, num_nodes)``
            int64, in which nodes that are not used have -1.
        """
        raise NotImplementedError(f"{type(self).__name__} is a DeviceDrafter and must define advance()")
