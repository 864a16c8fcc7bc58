"""The drafters without training as tensor operations of fixed shapes, for the CUDA-graph engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
        shares: ``(V, k)`` float32, 0 where nothing is known.
    """

    parents = None

    def __init__(self, template: TreeTemplate, vocabulary: int, k: int, num_nodes: int, device: torch.device) -> None:
        self.vocabulary, self.k, self.num_nodes = vocabulary, k, min(num_nodes, len(template.parents))
        self.max_depth = len(template.levels)
        self.tokens = torch.full((vocabulary, k), -1, device=device)
        self.shares = torch.zeros(vocabulary, k, device=device)
        self.paths, self.above = (torch.from_numpy(array).to(device) for array in (template.paths, template.parents))

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
        if roots.is_cuda:
            from heedful.decoding.draft_kernels import MOST_NODES, read_template

            if len(self.above) <= MOST_NODES:
                return read_template(self.tokens, self.shares, roots, self.paths, self.above, self.num_nodes)
        nodes = len(self.above)
        tokens = roots[:, None].clamp(max=self.vocabulary - 1).expand(-1, nodes)
        scores = torch.ones_like(tokens, dtype=torch.float32)
        for ranks in self.paths.T:  # each node goes down its own path
            # -1, of which nothing is known, has the score 0, whatever is read there.
            scores = torch.where(ranks >= 0, scores * self.shares[tokens, ranks], scores)
            tokens = torch.where(ranks >= 0, self.tokens[tokens, ranks], tokens)
        tokens = torch.cat([roots[:, None], tokens[:, 1:]], dim=1)
        # A node never scores above its parent, and with equal scores comes after it: the best nodes are a tree.
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.num_nodes].sort(dim=1).values
        places = torch.full((roots.shape[0], nodes + 1), -1, device=roots.device)  # of the root's parent: the last, -1
        places.scatter_(1, best, torch.arange(self.num_nodes, device=roots.device).expand_as(best))
        parents = places.gather(1, self.above[best] % (nodes + 1))
        parents = parents.masked_fill(scores.gather(1, best) <= 0, -1)
        return tokens.gather(1, best).clamp(min=0), parents

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

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        self.text.fill_(-1)
        self.text[:, : tokens.shape[1]] = tokens.to(self.text.device)
        if outputs.attention_mask is not None:
            padding = outputs.attention_mask.to(self.text.device) == 0
            self.text[:, : tokens.shape[1]].masked_fill_(padding, -1)

    def advance(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        if step.tokens.is_cuda:
            from heedful.decoding.draft_kernels import look_up

            return look_up(
                self.text, step.tokens, step.path, step.count, step.roots, step.lengths,
                self.num_nodes, self.max_ngram_size, self.num_tokens_short,
            )  # fmt: skip
        # Right behind the old root, which is in the text already: the other accepted nodes' tokens, and the new root.
        new = torch.cat([step.tokens.gather(1, step.path)[:, 1:], step.roots[:, None]], dim=1)
        order, spare = torch.arange(1, new.shape[1] + 1, device=new.device), self.text.shape[1] - 1
        count = step.count[:, None]
        places = (step.lengths[:, None] - count + order).masked_fill_(order > count, spare)
        self.text.scatter_(1, places.clamp_(max=spare), torch.where(order == count, step.roots[:, None], new))
        self.text[:, -1] = -1
        return self.read(step.lengths)

    def read(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Chains ``(B, num_tokens + 1)`` for texts whose root is at ``ends (B,)``."""
        text, ends = self.text[:, :-1], ends[:, None]
        length = text.shape[1]
        places, steps, sizes = (
            torch.arange(n, device=text.device) for n in (length, self.num_nodes, self.max_ngram_size)
        )
        pattern = text.gather(1, (ends - sizes).clamp_(min=0))  # the root, the token before it, ...
        # Padding and what lies before the text match nothing.
        pattern.masked_fill_((pattern < 0) | (ends < sizes), -3)
        before = torch.nn.functional.pad(text, (self.max_ngram_size - 1, 0), value=-2)
        matches = score = text == pattern[:, :1]
        for size in range(1, self.max_ngram_size):
            shifted = before[:, self.max_ngram_size - 1 - size :][:, :length]
            matches = matches & (shifted == pattern[:, size : size + 1])
            score = score + matches.long()
        # The longest match, and of several the latest.
        rank = torch.add(places, score, alpha=length).masked_fill_(places >= ends, -1)
        best, at = rank.max(dim=1, keepdim=True)
        # As many tokens as there are behind it; few after a match shorter than the longest.
        whole = best >= self.max_ngram_size * length
        count = torch.minimum(ends - at, torch.where(whole, self.num_nodes - 1, self.num_tokens_short))
        count = count.masked_fill_(best < length, 0)
        tokens = text.gather(1, (at + steps).clamp_(max=length - 1))
        tokens = torch.where(steps == 0, text.gather(1, ends), tokens).clamp_(min=0)
        return tokens, (steps - 1).expand_as(tokens).masked_fill(steps > count, -1)


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
