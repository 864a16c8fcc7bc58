"""Several drafters in one: the first with enough to say drafts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import LongTensor
from transformers import PreTrainedModel

from heedful.decoding.drafter import DeviceDrafter, Drafter, DraftingOutputs
from heedful.decoding.tree import DraftTree


class Sequence(Drafter):
    """Each row takes the first drafter whose tree has at least ``min_nodes`` nodes below the root, else the last drafter's.

    A long match of the prompt is worth more than a tree of guesses, and no match is worth nothing: ``Sequence(PromptLookup(),
    TokenRecycling())`` is the default to begin with where nothing has been trained. Every drafter learns from every step.

    Example:
        >>> import heedful
        >>> from heedful.decoding import PromptLookup, Sequence, TokenRecycling
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> ids = tokenizer("It was the best of times, it was the worst of", return_tensors="pt").input_ids
        >>> drafter = Sequence(PromptLookup(), TokenRecycling())
        >>> result = heedful.generate(model, ids, drafter, max_new_tokens=64, do_sample=False)

    Args:
        *drafters: two or more, the preferred one first.
        min_nodes: nodes below the root that make a draft long enough. Default 5.

    Cost:
        Every drafter proposes in every step, until one has enough; all update.

    When not to use:
        With a drafter that takes part in the model's forward (`HiddenTransfer`), whose draft is paid for in any case.
    """

    def __init__(self, *drafters: Drafter, min_nodes: int = 5) -> None:
        if len(drafters) < 2:
            raise ValueError(f"Sequence takes two or more drafters, got {len(drafters)}")
        for drafter in drafters:
            if not isinstance(drafter, Drafter):
                raise TypeError(f"Sequence takes drafters, got {type(drafter).__name__}")
        if min_nodes < 1:
            raise ValueError(f"min_nodes must be at least 1, got {min_nodes}")
        self.drafters, self.min_nodes = drafters, min_nodes
        self.requires = frozenset().union(*(drafter.requires for drafter in drafters))
        self.joins_forward = any(drafter.joins_forward for drafter in drafters)

    def begin(self, model: PreTrainedModel, batch_size: int) -> None:
        for drafter in self.drafters:
            drafter.begin(model, batch_size)

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        for drafter in self.drafters:
            drafter.prefill(tokens, outputs)

    def propose(self, roots: LongTensor, committed: list[LongTensor]) -> list[DraftTree | None]:
        chosen: list[DraftTree | None] = [None] * len(roots)
        waiting = set(range(len(roots)))
        for drafter in self.drafters:
            proposal = drafter.propose(roots, committed)
            if isinstance(proposal, DraftTree):
                proposal = [DraftTree(tokens, proposal.parents) for tokens in proposal.tokens]  # type: ignore[arg-type]
            last = drafter is self.drafters[-1]
            for row in list(waiting):
                tree = proposal[row]
                if last or (tree is not None and len(tree) > self.min_nodes):
                    chosen[row] = tree
                    waiting.discard(row)
            if not waiting:
                break
        return chosen

    def update(
        self,
        trees: list[DraftTree | None],
        outputs: DraftingOutputs,
        paths: list[list[int]],
        new_roots: LongTensor,
    ) -> None:
        for drafter in self.drafters:
            drafter.update(trees, outputs, paths, new_roots)

    def clear(self) -> None:
        for drafter in self.drafters:
            drafter.clear()

    @contextmanager
    def joining(self, model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            for drafter in self.drafters:
                stack.enter_context(drafter.joining(model))
            yield

    def on_device(self, model: PreTrainedModel, batch_size: int, capacity: int) -> DeviceDrafter | None:
        from heedful.decoding.on_device import SequenceOnDevice

        parts = [drafter.on_device(model, batch_size, capacity) for drafter in self.drafters]
        if any(part is None for part in parts):
            return None
        return SequenceOnDevice([part for part in parts if part is not None], self.min_nodes)
