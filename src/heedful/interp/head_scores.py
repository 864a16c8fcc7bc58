"""Scores of attention heads: one number a head, and the instances it is the mean of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False)
class HeadScores:
    """Retrieval scores of all query heads of a model, and how they were found.

    Args:
        per_instance: ``(N, L, H)`` float32: the score of each of the H query heads of each of the L layers on each of
            the N instances that the model passed; nan where there is none (a layer without softmax attention or not
            asked about, a sliding window that does not reach the needle).
        attempted: how many instances were tried, N of them passed; None where that is not known (a file of the
            field's form holds only the passed ones).
        threshold: the score from which a head counts as a retrieval head (the paper's 0.1: it pastes a tenth of the
            needle).
    """

    per_instance: Tensor
    attempted: int | None = None
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.per_instance.ndim != 3:
            raise ValueError(f"per_instance must be (instances, layers, heads), got {tuple(self.per_instance.shape)}")
        if self.attempted is not None and self.attempted < len(self.per_instance):
            raise ValueError(f"{len(self.per_instance)} instances passed, so attempted={self.attempted} cannot be")
        self.per_instance = self.per_instance.detach().float().cpu()

    @property
    def scores(self) -> Tensor:
        """``(L, H)`` float32: the mean over the passed instances in which the head could see the needle, else nan."""
        return self.per_instance.nanmean(0)

    @property
    def activation_frequency(self) -> Tensor:
        """``(L, H)`` float32: the share of those instances in which the head scores above 0, else nan."""
        measured = ~self.per_instance.isnan()
        return (self.per_instance > 0).sum(0) / torch.where(measured.any(0), measured.sum(0), torch.nan)

    @property
    def pass_rate(self) -> float | None:
        """The share of attempted instances that the model passed. Scores say little about a model that passes few."""
        return len(self.per_instance) / self.attempted if self.attempted else None

    def top(self, k: int | None = 10) -> list[tuple[int, int, float]]:
        """The k highest-scoring heads (all, if k is None) as ``(layer, head, score)``, best first; ties by layer and
        head.

        Heads without a score are left out. ``ablate_heads`` takes this list as it is.
        """
        if k is not None and k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        rows = [
            (layer, head, score) for layer, row in enumerate(self.scores.tolist()) for head, score in enumerate(row)
        ]
        ranked = sorted((row for row in rows if row[2] == row[2]), key=lambda row: -row[2])
        return ranked[:k]

    def retrieval_heads(self, threshold: float | None = None) -> list[tuple[int, int, float]]:
        """The heads with a score of at least ``threshold`` (default: ``self.threshold``), best first, as in
        :meth:`top`."""
        threshold = self.threshold if threshold is None else threshold
        return [row for row in self.top(None) if row[2] >= threshold]

    def random_heads(self, k: int, *, seed: int = 0) -> list[tuple[int, int, float]]:
        """k heads drawn without repeats from those that are *not* retrieval heads: the control of an ablation.

        The draw depends on ``seed`` alone, so it can be held fixed over prompts.

        Raises:
            ValueError: fewer than k heads are left.
        """
        others = [row for row in self.top(None) if row[2] < self.threshold]
        if not 0 <= k <= len(others):
            raise ValueError(f"cannot draw {k} of {len(others)} heads that score under {self.threshold}; lower k")
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        return [others[index] for index in order[:k].tolist()]

    # --- the field's file form ---

    def to_json(self, path: str | Path | None = None) -> str:
        """``{"layer-head": [score of each passed instance, ...], ...}``, nan as null; written to ``path`` if given."""
        _, layers, heads = self.per_instance.shape
        values = {
            f"{layer}-{head}": [
                None if value != value else value for value in self.per_instance[:, layer, head].tolist()
            ]
            for layer in range(layers)
            for head in range(heads)
        }
        text = json.dumps(values)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, list[float | None]], *, threshold: float = 0.1) -> HeadScores:
        """Reads the field's form: a path, the JSON text, or the mapping itself. Heads that are not named get nan.

        Raises:
            ValueError: it is not ``{"layer-head": [score, ...]}`` with lists of one length.
        """
        if isinstance(source, Mapping):
            values = source
        else:
            is_text = isinstance(source, str) and source.lstrip().startswith("{")
            values = json.loads(source if is_text else Path(source).read_text(encoding="utf-8"))  # type: ignore[arg-type]
        form = 'expected {"layer-head": [score of each instance, ...], ...}'
        try:
            columns = {tuple(map(int, key.split("-"))): list(column) for key, column in values.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(form) from error
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1 or any(len(key) != 2 for key in columns):
            raise ValueError(f"{form}, all lists of one length; found lengths {sorted(lengths)}")
        layers, heads = (1 + max(key[axis] for key in columns) for axis in (0, 1))
        per_instance = torch.full((lengths.pop(), layers, heads), torch.nan)
        for (layer, head), column in columns.items():
            per_instance[:, layer, head] = torch.tensor([torch.nan if value is None else value for value in column])
        return cls(per_instance, threshold=threshold)

    # --- to look at ---

    def table(self, k: int = 10) -> str:
        """The k highest-scoring heads as lines of text: head, score, activation frequency, a bar."""
        frequency = self.activation_frequency
        lines = ["head    score  active"]
        for layer, head, score in self.top(k):
            bar = "█" * round(20 * min(score, 1.0))
            lines.append(f"{f'{layer}-{head}':<7} {score:5.2f} {frequency[layer, head]:6.0%}  {bar}".rstrip())
        return "\n".join(lines)

    def __str__(self) -> str:
        passed, layers, heads = self.per_instance.shape
        tried = (
            f"{passed} of {self.attempted} instances passed" if self.attempted is not None else f"{passed} instances"
        )
        found = len(self.retrieval_heads())
        head = f"{layers} layers x {heads} heads, {tried}, {found} retrieval heads (score >= {self.threshold:g})"
        return f"{head}\n{self.table()}" if passed else f"{head}: nothing was measured"

    def __repr__(self) -> str:
        return str(self)

    def plot(self, *, label_top: int = 10) -> Figure:
        """A layer x head heat map in which the ``label_top`` best heads are named. Returns the figure, shows nothing.

        Raises:
            ImportError: matplotlib is not there (``pip install heedful[plot]``); ``print(scores)`` needs none.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'heedful[plot]', or print the scores") from error
        scores = self.scores
        layers, heads = scores.shape
        figure = Figure(figsize=(2 + 0.38 * heads, 1.4 + 0.32 * layers), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("0.8")  # shows through where there is no score
        image = axes.imshow(scores.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for layer, head, score in self.top(label_top):
            if score > 0:
                colour = "black" if score > 0.6 else "white"
                axes.text(head, layer, f"{layer}.{head}", ha="center", va="center", fontsize=7, color=colour)
        axes.set(xlabel="head", ylabel="layer", title="Retrieval score")
        figure.colorbar(image)
        return figure
