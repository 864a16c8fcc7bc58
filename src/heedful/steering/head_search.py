"""The head search of ACT: calibrate one head at a time and keep those that help on a calibration set."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from heedful.seam import attach
from heedful.seam.discovery import find_attention
from heedful.steering.act import AttentionCalibration
from heedful.steering.sinks import ColumnMeans

Head: TypeAlias = tuple[int, int]
Example: TypeAlias = Mapping[str, Any]
Scorer: TypeAlias = Callable[[Tensor, Any], float]


@dataclass(frozen=True)
class HeadSet:
    """Heads found by `search_heads`, with what they were found on: a head set serves one model, one task and one rule.

    Attributes:
        model: Name or path of the model.
        task: What the calibration set was, in the caller's words.
        shape: Layers and query heads of the model.
        baseline: Mean score of the unedited model.
        scores: Mean score with only this head calibrated, for every head searched.
        examples: Size of the calibration set.
        alpha, threshold, beta, exempt_first: The rule, as in `AttentionCalibration`.
        min_gain: A head is kept when its score exceeds the baseline by more than this.
    """

    model: str
    task: str
    shape: tuple[int, int]
    baseline: float
    scores: dict[Head, float]
    examples: int
    alpha: float = 5.0
    threshold: float | None = None
    beta: float = 0.4
    exempt_first: int = 1
    min_gain: float = 0.0

    @property
    def heads(self) -> list[Head]:
        """The kept (layer, head) pairs, best first."""
        kept = [head for head, score in self.scores.items() if score - self.baseline > self.min_gain]
        return sorted(kept, key=lambda head: (-self.scores[head], head))

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def mask(self) -> Tensor:
        """The kept heads as a boolean ``(layers, heads)`` tensor."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        for layer, head in self.heads:
            mask[layer, head] = True
        return mask

    def gains(self) -> Tensor:
        """Score minus baseline, ``(layers, heads)`` fp32; nan where a head was not searched."""
        gains = torch.full(self.shape, math.nan)
        for (layer, head), score in self.scores.items():
            gains[layer, head] = score - self.baseline
        return gains

    def calibration(self, **changes: Any) -> AttentionCalibration:
        """The edit that the search has scored, on all kept heads; ``changes`` are arguments of
        `AttentionCalibration`.
        """
        rule = {"alpha": self.alpha, "threshold": self.threshold, "beta": self.beta, "exempt_first": self.exempt_first}
        return AttentionCalibration(**{"heads": self, **rule, **changes})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the set as JSON; heads are written ``"layer-head"``."""
        record = asdict(self) | {
            "scores": {f"{layer}-{head}": score for (layer, head), score in sorted(self.scores.items())},
            "heads": self.heads,
        }
        _write(Path(path), record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadSet:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file is not a head set.
        """
        try:
            record = json.loads(Path(path).read_text())
            record.pop("heads")
            scores = {_head(name): float(score) for name, score in record.pop("scores").items()}
            return cls(**record | {"shape": tuple(record["shape"]), "scores": scores})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a head set written by HeadSet.save: {error}") from error


def _head(name: str) -> Head:
    layer, head = name.split("-")
    return int(layer), int(head)


def _write(path: Path, record: dict[str, Any]) -> None:
    """Replaces the file in one step, so that an interrupted run leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


@dataclass
class _Progress:
    """Sums over the examples done so far: all that a resumed search needs."""

    fingerprint: str
    examples: int = 0
    baseline: float = 0.0
    gains: dict[Head, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        gains = {f"{layer}-{head}": gain for (layer, head), gain in self.gains.items()}
        _write(path, asdict(self) | {"gains": gains})

    @classmethod
    def resume(cls, path: Path | None, fingerprint: str) -> _Progress:
        if path is None or not path.exists():
            return cls(fingerprint)
        try:
            record = json.loads(path.read_text())
            gains = {_head(name): float(gain) for name, gain in record["gains"].items()}
            progress = cls(record["fingerprint"], record["examples"], record["baseline"], gains)
        except (json.JSONDecodeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of search_heads: {error}; delete it or name another"
            ) from error
        if progress.fingerprint != fingerprint:
            raise ValueError(
                f"{path} is the checkpoint of another search (model, data, heads or rule differ); delete it or name "
                "another"
            )
        return progress


def search_heads(
    model: torch.nn.Module,
    dataset: Sequence[Example],
    scorer: Scorer,
    *,
    heads: Iterable[Head] | None = None,
    alpha: float = 5.0,
    threshold: float | None = None,
    beta: float = 0.4,
    exempt_first: int = 1,
    min_gain: float = 0.0,
    task: str = "",
    batch_size: int = 16,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadSet:
    """Scores every candidate head by calibrating it alone, and keeps those that raise the mean score.

    Many heads share one forward: a batch holds copies of examples, and in each copy another head is calibrated. A head
    that has no late sink in an example cannot change it, so that pair costs nothing.

    Example:
        >>> import torch, heedful
        >>> from heedful.steering import search_heads
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> ids = tokenizer("The secret number of Oslo is 4182. The secret number of Oslo is 4").input_ids
        >>> data = [{"input_ids": ids[:-1], "answer": ids[-1]}]
        >>> right = lambda logits, example: float(logits[-1].argmax() == example["answer"])
        >>> found = search_heads(model, data, right, heads=[(5, h) for h in range(6)], task="secret numbers")
        >>> found.save("heads.json")
        >>> with heedful.attach(model, found.calibration()):
        ...     tokens = model.generate(torch.tensor([data[0]["input_ids"]]), max_new_tokens=4)

    Args:
        model: A causal language model with logits.
        dataset: Examples: mappings with ``input_ids`` (a list or a 1-D tensor, no padding), optionally ``rows`` (the
            positions whose logits the scorer wants; default the last), and whatever the scorer reads.
        scorer: ``scorer(logits, example) -> float``, higher is better; logits are ``(len(rows), V)`` fp32. Accuracy is
            1.0 or 0.0.
        heads: Candidate (layer, head) pairs. Default: all heads of all layers but the first two and the last one, the
            paper's choice.
        alpha, threshold, beta, exempt_first: The rule, as in `AttentionCalibration`.
        min_gain: Keep a head when its mean score exceeds the baseline by more than this.
        task: Name of the calibration set, kept in the result.
        batch_size: Sequences a forward.
        checkpoint: A JSON file that is rewritten after every few examples; a search that is started again with the same
            arguments goes on where the file stops.
        progress: Called with (examples done, all examples).

    Returns:
        The `HeadSet`. Heads that help alone need not help together: measure the set on examples that the search has not
        seen.

    Raises:
        ValueError: Nothing to search, malformed examples, a candidate outside the model, or a checkpoint of another
            search.

    Cost:
        At most (1 + candidates) x examples sequences through the model; memory of ``batch_size`` sequences.

    When not to use:
        With a calibration set so small or a model so good that differences are noise: a kept head then means nothing.

    Paper:
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
        Attention Calibration", Yu, Wang, Fu, Shi, Shaikh, Lin (ICML 2024), arXiv 2406.15765.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    shape = (int(config.num_hidden_layers), int(config.num_attention_heads))
    if heads is None:
        layers = sorted({found.layer for found in find_attention(model)[1] if not found.cross})
        heads = [(layer, head) for layer in layers[2:-1] for head in range(shape[1])]
    candidates = sorted({(int(layer), int(head)) for layer, head in heads})
    outside = [pair for pair in candidates if not (0 <= pair[0] < shape[0] and 0 <= pair[1] < shape[1])]
    if not candidates or outside:
        raise ValueError(
            f"heads= must name (layer, head) pairs below {shape}; got {outside or 'none'}"
            + ("" if outside else " (with three layers or fewer none lies between the first two and the last)")
        )
    _check(dataset, batch_size)
    rule: dict[str, Any] = {"alpha": alpha, "threshold": threshold, "beta": beta, "exempt_first": exempt_first}
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    path = None if checkpoint is None else Path(checkpoint)
    done = _Progress.resume(path, _fingerprint(name, task, shape, candidates, rule, dataset))

    while done.examples < len(dataset):
        chunk = dataset[done.examples : done.examples + batch_size]
        probe = ColumnMeans(heads=_by_layer(candidates))
        with attach(model, probe):
            before = [scorer(x, example) for x, example in zip(_logits(model, chunk), chunk, strict=True)]
        work = [
            (index, (layer, head))
            for layer, statistics in sorted(probe.statistics.items())
            for index, head in _with_sinks(statistics.late_sinks(alpha, threshold, exempt_first), probe.heads_of[layer])
        ]
        for start in range(0, len(work), batch_size):
            pairs = work[start : start + batch_size]
            copies = [chunk[index] for index, _ in pairs]
            edit = AttentionCalibration(heads=[head for _, head in pairs], **rule)
            edit.only_in_sample = [head for _, head in pairs]
            with attach(model, edit):
                after = [scorer(x, example) for x, example in zip(_logits(model, copies), copies, strict=True)]
            for (index, head), score in zip(pairs, after, strict=True):
                done.gains[head] = done.gains.get(head, 0.0) + score - before[index]
        done.baseline += sum(before)
        done.examples += len(chunk)
        if path is not None:
            done.save(path)
        if progress is not None:
            progress(done.examples, len(dataset))

    baseline = done.baseline / done.examples
    scores = {head: baseline + done.gains.get(head, 0.0) / done.examples for head in candidates}
    return HeadSet(name, task, shape, baseline, scores, done.examples, min_gain=min_gain, **rule)


def mean_score(model: torch.nn.Module, dataset: Sequence[Example], scorer: Scorer, *, batch_size: int = 16) -> float:
    """Mean score of the model as it is (with whatever is attached) over the examples of `search_heads`.

    Args:
        model, dataset, scorer, batch_size: As in `search_heads`.

    Returns:
        The mean of ``scorer(logits, example)``.
    """
    _check(dataset, batch_size)
    total = 0.0
    for start in range(0, len(dataset), batch_size):
        chunk = dataset[start : start + batch_size]
        total += sum(scorer(x, example) for x, example in zip(_logits(model, chunk), chunk, strict=True))
    return total / len(dataset)


def _check(dataset: Sequence[Example], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(dataset):
        raise ValueError("the calibration set is empty")
    for number, example in enumerate(dataset):
        if "input_ids" not in example or len(example["input_ids"]) == 0:
            raise ValueError(f"example {number} needs input_ids, a non-empty list of token ids")


def _by_layer(heads: Iterable[Head]) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, head in sorted(heads):
        layers[layer].append(head)
    return dict(layers)


def _with_sinks(sinks: Tensor, heads: Sequence[int]) -> list[tuple[int, int]]:
    """(sample, head) pairs of ``sinks (B, h, T)`` that have one."""
    return [(sample, heads[column]) for sample, column in sinks.any(-1).nonzero().tolist()]


def _fingerprint(*parts: Any) -> str:
    *settings, dataset = parts
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for example in dataset:
        digest.update(torch.as_tensor(example["input_ids"]).to(torch.int64).cpu().numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()


@torch.no_grad()
def _logits(model: torch.nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """Logits of the rows each example asks for, from one right-padded forward (causal models never see that
    padding).
    """
    device = next(model.parameters()).device
    ids = [torch.as_tensor(example["input_ids"], device=device) for example in examples]
    lengths = torch.tensor([len(x) for x in ids], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    real = torch.arange(padded.shape[1], device=device) < lengths[:, None]
    wanted = [[row % len(x) for row in example.get("rows", [-1])] for x, example in zip(ids, examples, strict=True)]
    keep = sorted({row for rows in wanted for row in rows})
    where = {row: place for place, row in enumerate(keep)}
    logits = model(
        input_ids=padded,
        attention_mask=None if bool(real.all()) else real.long(),
        use_cache=False,
        logits_to_keep=torch.tensor(keep, device=device),
    ).logits
    if logits.shape[1] != len(keep):  # a model without logits_to_keep returns every row
        logits = logits[:, keep]
    return [x[[where[row] for row in rows]].float() for x, rows in zip(logits, wanted, strict=True)]
