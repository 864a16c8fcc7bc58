"""The drafters without training as tensor operations of fixed shapes, for the CUDA-graph engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import LongTensor, Tensor

from heedful.decoding.drafter import DeviceDrafter, DeviceStep, DraftingOutputs

if TYPE_CHECKING:
    from heedful.decoding.token_recycling import TreeTemplate


class RecyclingOnDevice(DeviceDrafter):
    """Token Recycling: reads the template level by level out of the matrix, and keeps the nodes with the best path scores.

    A node's score is the product of its path's shares (of its parent's top-k probability), as in the dynamic trees that the
    paper leaves for later. Of several nodes with the same token that write in one step, an accepted one writes last.

    Attributes:
        tokens: ``(V, k)`` int64, the successors of every token, likeliest first; -1 where nothing is known yet.
        shares: ``(V, k)`` float32.
    """

    parents = None

    def __init__(self, template: TreeTemplate, vocabulary: int, k: int, num_nodes: int, device: torch.device) -> None:
        self.vocabulary, self.k, self.num_nodes = vocabulary, k, min(num_nodes, len(template.parents))
        self.max_depth = len(template.levels)
        self.tokens = torch.full((vocabulary, k), -1, device=device)
        self.shares = torch.zeros(vocabulary, k, device=device)
        self.levels = [
            tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in (level, parents, ranks))
            for level, parents, _, ranks in template.levels
        ]
        self.template = torch.from_numpy(template.parents).to(device)

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        if outputs.logits is not None:  # update_from_prompt
            self._write(tokens.to(self.tokens.device).flatten(), *self._candidates(outputs.logits.flatten(0, 1)))

    def advance(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        candidates, shares = self._candidates(step.logits)
        self._write(step.tokens.flatten(), candidates.flatten(0, 1), shares.flatten(0, 1))
        accepted = step.path[:, :, None].expand(-1, -1, self.k)
        self._write(
            step.tokens.gather(1, step.path).flatten(),
            candidates.gather(1, accepted).flatten(0, 1),
            shares.gather(1, accepted).flatten(0, 1),
        )
        return self.read(step.roots)

    def read(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """The trees below ``roots (B,)``: tokens and parents ``(B, num_nodes)``."""
        batch = roots.shape[0]
        tokens = roots[:, None].repeat(1, len(self.template))
        scores = torch.ones(batch, len(self.template), device=roots.device)
        for level, parents, ranks in self.levels:
            above = tokens[:, parents].clamp(0, self.vocabulary - 1)
            known = self.tokens[above, ranks]
            tokens[:, level] = known.clamp(min=0)
            scores[:, level] = scores[:, parents] * self.shares[above, ranks] * (known >= 0)
        # A node never scores above its parent, and with equal scores comes after it: the best nodes are a tree.
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.num_nodes].sort(dim=1).values
        places = torch.full((batch, len(self.template) + 1), -1, device=roots.device)
        places.scatter_(1, best, torch.arange(self.num_nodes, device=roots.device).expand(batch, -1))
        parents = places.gather(1, self.template[best] % (len(self.template) + 1))  # of the root: the spare place, -1
        parents = torch.where(scores.gather(1, best) > 0, parents, -1)
        return tokens.gather(1, best), parents

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Top k of logits ``(..., V)``, without the head's padding."""
        top, tokens = logits[..., : self.vocabulary].topk(self.k, dim=-1)
        return tokens, top.float().softmax(-1)

    def _write(self, tokens: Tensor, candidates: Tensor, shares: Tensor) -> None:
        at = tokens.clamp(max=self.vocabulary - 1)
        self.tokens.index_copy_(0, at, candidates)
        self.shares.index_copy_(0, at, shares)


class LookupOnDevice(DeviceDrafter):
    """Prompt lookup: the text lies on the device, and every earlier place is compared with its end at once."""

    parents = None

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_tokens: int,
        max_ngram_size: int,
        num_tokens_short: int,
        device: torch.device,
    ) -> None:
        self.num_nodes, self.max_depth, self.max_ngram_size = num_tokens + 1, num_tokens, max_ngram_size
        self.num_tokens_short = num_tokens_short
        self.text = torch.full((batch, capacity + 1), -1, device=device)  # the last place takes what is not written
        self.length = torch.zeros(batch, dtype=torch.long, device=device)  # of the text, the root included
        self.chain = torch.arange(-1, num_tokens, device=device)

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        self.text.fill_(-1)
        self.text[:, : tokens.shape[1]] = tokens.to(self.text.device)
        if outputs.attention_mask is not None:
            padding = outputs.attention_mask.to(self.text.device) == 0
            self.text[:, : tokens.shape[1]].masked_fill_(padding, -1)

    def advance(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        # The accepted nodes' tokens but the root, which is in the text already, and the new root behind them.
        new = torch.cat([step.tokens.gather(1, step.path)[:, 1:], step.roots[:, None]], dim=1)
        m = new.shape[1]
        order = torch.arange(m, device=new.device)
        spare = self.text.shape[1] - 1
        start = (step.lengths - step.count + 1)[:, None]  # right behind the old root
        places = torch.where(order < step.count[:, None] - 1, start + order, spare)
        self.text.scatter_(1, places.clamp(max=spare), new)
        self.text.scatter_(1, step.lengths[:, None].clamp(max=spare), step.roots[:, None])
        self.text[:, -1] = -1
        return self.read(step.lengths)

    def read(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Chains ``(B, num_tokens + 1)`` for texts whose root is at ``ends (B,)``."""
        text, place = self.text[:, :-1], torch.arange(self.text.shape[1] - 1, device=ends.device)
        score = torch.zeros_like(text)  # by the length of the match, then the latest
        matches = torch.ones_like(text, dtype=torch.bool)
        for size in range(self.max_ngram_size):
            token = text.gather(1, (ends[:, None] - size).clamp(min=0))
            shifted = torch.nn.functional.pad(text, (size, 0), value=-2)[:, : text.shape[1]]
            matches = matches & (shifted == token) & (token >= 0) & (ends[:, None] >= size)
            score = score + matches
        earlier = place < ends[:, None]
        score = torch.where(earlier & (score > 0), score * text.shape[1] + place, -1)
        best, at = score.max(dim=1)
        steps = torch.arange(1, self.num_nodes, device=ends.device)
        source = at[:, None] + steps
        whole = best >= self.max_ngram_size * text.shape[1]  # the longest n-gram matched
        count = torch.where(whole, self.num_nodes - 1, self.num_tokens_short)
        known = (best >= 0)[:, None] & (source <= ends[:, None]) & (steps <= count[:, None])
        tokens = text.gather(1, source.clamp(max=text.shape[1] - 1))
        roots = text.gather(1, ends[:, None])
        parents = torch.where(torch.cat([roots < -1, known], dim=1), self.chain, -1)
        return torch.cat([roots, tokens.clamp(min=0)], dim=1), parents


class SequenceOnDevice(DeviceDrafter):
    """Each row takes the first drafter whose tree has enough nodes; all drafters learn from every step."""

    parents = None

    def __init__(self, drafters: Sequence[DeviceDrafter], min_nodes: int) -> None:
        self.drafters, self.min_nodes = drafters, min_nodes
        self.num_nodes = max(drafter.num_nodes for drafter in drafters)
        self.max_depth = max(drafter.max_depth for drafter in drafters)

    def begin(self) -> None:
        for drafter in self.drafters:
            drafter.begin()

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        for drafter in self.drafters:
            drafter.prefill(tokens, outputs)

    def advance(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        drafts = [self._padded(drafter, step) for drafter in self.drafters]
        tokens, parents = drafts[-1]
        for own_tokens, own_parents in reversed(drafts[:-1]):
            enough = ((own_parents >= 0).sum(1) >= self.min_nodes)[:, None]
            tokens, parents = torch.where(enough, own_tokens, tokens), torch.where(enough, own_parents, parents)
        return tokens, parents

    def _padded(self, drafter: DeviceDrafter, step: DeviceStep) -> tuple[Tensor, Tensor]:
        drafted = drafter.advance(step)
        if isinstance(drafted, tuple):
            tokens, parents = drafted
        else:
            tokens = drafted
            parents = torch.tensor(drafter.parents).to(tokens.device).expand_as(tokens)
        spare = self.num_nodes - tokens.shape[1]
        return torch.nn.functional.pad(tokens, (0, spare)), torch.nn.functional.pad(parents, (0, spare), value=-1)
