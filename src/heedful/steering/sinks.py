"""Where the attention sinks of a model are: the mean attention that every token gets, by layer and head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heedful.seam import AttentionCall, Probe, attach
from heedful.steering._columns import ColumnStatistics, HeadPairs, column_statistics


class ColumnMeans(Probe):
    """Reads the column statistics of each attention call without its weights; keeps those of the last call of a layer.

    Attributes:
        statistics: By layer, ``(B, heads, Tk)``.
        heads_of: By layer, the query heads of axis 1.
    """

    def __init__(
        self, *, layers: Iterable[int] | None = None, heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    ) -> None:
        super().__init__(layers=layers, heads=heads)
        self.statistics: dict[int, ColumnStatistics] = {}
        self.heads_of: dict[int, tuple[int, ...]] = {}

    def outputs(self, call: AttentionCall, output: Tensor) -> None:
        if call.sinks is not None:
            raise ValueError(
                f"layer {call.layer}: this model's softmax has a learned sink, so its rows do not sum to 1 and column "
                "means say nothing about a sink token."
            )
        columns = column_statistics(HeadPairs.of(call))
        self.statistics[call.layer] = columns.view(call.query.shape[0], len(call.head_list))
        self.heads_of[call.layer] = call.head_list


@dataclass(frozen=True)
class Sink:
    """A token that one head attends to in excess.

    Attributes:
        layer, head: The head.
        position: Index in the sequence, without padding.
        token: The token's text, or its id as text when there is no tokenizer.
        mean: Mean attention from the rows that see it.
    """

    layer: int
    head: int
    position: int
    token: str
    mean: float


@dataclass(frozen=True, eq=False)
class SinkMap:
    """Mean attention that each token of one sequence gets.

    Attributes:
        means: ``(L, H, T)`` fp32 on the CPU: column means over the rows that see the token. nan in layers without
            attention.
        thresholds: ``(L,)`` the mean above which a token is a sink.
        tokens: The T tokens as text.
        exempt_first: So many tokens at the start are no late sinks.
    """

    means: Tensor
    thresholds: Tensor
    tokens: list[str]
    exempt_first: int = 1

    @property
    def late(self) -> Tensor:
        """Late sinks, boolean ``(L, H, T)``."""
        late = self.means > self.thresholds[:, None, None]
        late[..., : self.exempt_first] = False
        return late

    @property
    def first_token(self) -> Tensor:
        """Mean attention to the first token by head, ``(L, H)``."""
        return self.means[..., 0]

    def sinks(self) -> list[Sink]:
        """All late sinks, the strongest first."""
        found = [
            Sink(layer, head, position, self.tokens[position], float(self.means[layer, head, position]))
            for layer, head, position in self.late.nonzero().tolist()
        ]
        return sorted(found, key=lambda sink: -sink.mean)

    def by_token(self) -> list[tuple[str, int]]:
        """Sink tokens as text, with the number of (head, position) pairs where they are a late sink; the most frequent
        first.
        """
        return Counter(sink.token for sink in self.sinks()).most_common()


@torch.no_grad()
def sink_map(
    model: torch.nn.Module,
    input_ids: Tensor | Mapping[str, Any],
    attention_mask: Tensor | None = None,
    *,
    tokenizer: Any = None,
    alpha: float = 5.0,
    threshold: float | None = None,
    exempt_first: int = 1,
) -> SinkMap | list[SinkMap]:
    """Measures the attention sinks of a model on a text, by layer and head, in one forward and without attention
    matrices.

    Example:
        >>> import heedful
        >>> from heedful.steering import sink_map
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> sinks = sink_map(model, tokenizer("It was the best of times.", return_tensors="pt"), tokenizer=tokenizer)
        >>> sinks.means.shape, sinks.first_token.max(), sinks.by_token()

    Args:
        model: A transformers model whose attention is a softmax.
        input_ids: Token ids ``(T,)`` or ``(B, T)``, or what a tokenizer returns.
        attention_mask: ``(B, T)``, 0 at padding (left or right).
        tokenizer: Turns ids into text; without one, tokens are written as ids.
        alpha, threshold, exempt_first: What is a late sink, as in `AttentionCalibration`.

    Returns:
        A `SinkMap`; for more than one sequence a list of them, each without padding.

    Raises:
        ValueError: The model's softmax has a learned sink (gpt-oss).

    Cost:
        One forward, and one more pass over the attention of every head; memory O(T D) and a block of 32 MiB.
    """
    if isinstance(input_ids, Mapping):
        given = dict(input_ids)
        input_ids, attention_mask = given["input_ids"], given.get("attention_mask", attention_mask)
    device = next(model.parameters()).device
    ids = torch.as_tensor(input_ids, device=device)
    ids = ids[None] if ids.dim() == 1 else ids
    real = (
        torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask, device=device).view_as(ids)
    )
    probe = ColumnMeans()
    with attach(model, probe):
        model(input_ids=ids, attention_mask=None if bool(real.all()) else real, use_cache=False)
    layers, heads = 1 + max(probe.statistics), max(x.sums.shape[1] for x in probe.statistics.values())
    maps = []
    for sample, (line, mask) in enumerate(zip(ids, real.bool(), strict=True)):
        means = torch.full((layers, heads, int(mask.sum())), torch.nan)
        thresholds = torch.full((layers,), torch.inf)
        for layer, columns in probe.statistics.items():
            mine = columns.means[sample][:, mask]
            means[layer, : len(mine)] = mine.float().cpu()
            thresholds[layer] = float(columns.threshold(alpha, threshold)[sample, 0])
        numbers = line[mask].tolist()
        tokens = [str(n) for n in numbers] if tokenizer is None else [tokenizer.decode([n]) for n in numbers]
        maps.append(SinkMap(means, thresholds, tokens, exempt_first))
    return maps[0] if len(maps) == 1 else maps
