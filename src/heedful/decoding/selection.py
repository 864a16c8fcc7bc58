"""Choosing a token and deciding to stop, with generate's own processors and criteria, called in generate's own order."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor
from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList


class TokenSelector:
    """Logits to tokens: float32, the processors, then arg-max or one draw from torch's global generator.

    Args:
        processors: generate's prepared processors.
        do_sample: draw instead of taking the arg-max.
        batch_size: rows of the whole batch. Processors may index by row, so one row's logits are repeated for all of them.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, batch_size: int) -> None:
        self.processors, self.do_sample, self.batch_size = processors, do_sample, batch_size
        #: Whether a token depends on its own logits alone, so that all nodes of a step can be decided in one call. A draw for
        #: every node is as exact as one for each node of the walk, but at batch size 1 the latter are generate's own draws.
        self.at_once = len(processors) == 0 and (not do_sample or batch_size > 1)

    def batch(self, ids: LongTensor, logits: Tensor) -> LongTensor:
        """Tokens ``(B,)`` for the sequences ``ids (B, T)`` and the next tokens' logits ``(B, V)``."""
        return self._choose(self.processors(ids, self._float(logits, ids)))

    def row(self, row: int, ids: LongTensor, logits: Tensor) -> int:
        """The token of one row, for ``ids (1, T)`` and ``logits (V,)``."""
        scores = self._float(logits[None], ids)
        if self.processors:
            if self.batch_size > 1:
                ids = ids.repeat(self.batch_size, 1)  # type: ignore[assignment]
                scores = scores.repeat(self.batch_size, 1)
                scores = self.processors(ids, scores)[row : row + 1]
            else:
                scores = self.processors(ids, scores)
        return int(self._choose(scores))

    def nodes(self, logits: Tensor) -> list[list[int]]:
        """The token of every node, ``(B, n, V)`` to B lists, when `at_once`."""
        if self.do_sample:
            return self._choose(logits.float().flatten(0, 1)).view(logits.shape[:2]).tolist()
        if logits.device.type == "cpu":  # the first maximum, as in torch, an order of magnitude sooner
            return logits.float().numpy().argmax(-1).tolist()
        return logits.float().argmax(-1).tolist()

    @staticmethod
    def _float(logits: Tensor, ids: Tensor) -> Tensor:
        return logits.to(copy=True, dtype=torch.float32, device=ids.device)

    def _choose(self, scores: Tensor) -> LongTensor:
        if self.do_sample:
            probabilities = torch.nn.functional.softmax(scores, dim=-1)
            return torch.multinomial(probabilities, num_samples=1).squeeze(1)  # type: ignore[return-value]
        return torch.argmax(scores, dim=-1)  # type: ignore[return-value]


class StopChecker:
    """Whether a row ends with the token just emitted. Length and EOS are read off; any other criterion is called."""

    def __init__(self, criteria: StoppingCriteriaList, batch_size: int) -> None:
        self.batch_size = batch_size
        self.max_length: int | None = None
        self.eos: set[int] = set()
        self.others = StoppingCriteriaList()
        #: generate pads finished rows only if a criterion with an EOS is there; without one it goes on with them.
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                lengths = (criterion.max_length, self.max_length)
                self.max_length = min(length for length in lengths if length is not None)
            elif type(criterion) is EosTokenCriteria:
                self.eos |= set(criterion.eos_token_id.flatten().tolist())
            else:
                self.others.append(criterion)

    def simple(self, token: int, length: int) -> bool:
        """Length and EOS alone. ``length``: the row's, with the token."""
        return token in self.eos or (self.max_length is not None and length >= self.max_length)

    def row(self, row: int, ids: LongTensor, token: int, length: int) -> bool:
        """All criteria for one row, ``ids (1, T)`` with the token at its end."""
        stop = self.simple(token, length)
        if self.others:
            if self.batch_size > 1:
                ids = ids.repeat(self.batch_size, 1)  # type: ignore[assignment]
            stop = bool(self.others(ids, None)[row]) or stop  # type: ignore[arg-type]
        return stop
