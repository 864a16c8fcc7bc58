"""Drafters with weights: modules that a recipe trains, that folders and hubs hold, and that the engine runs."""

from __future__ import annotations

import inspect
import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedModel

from heedful.decoding.drafter import Drafter
from heedful.decoding.sizing import setting
from heedful.decoding.support import model_device
from heedful.decoding.tree import DraftTree

#: Paths of candidate ranks, from the root: the nodes of a cartesian tree.
RankPaths = Sequence[Sequence[int]]
#: Candidates of each step that a tree may use.
RANKS = 10
#: What a tree has to promise over plain decoding: products of accuracies take a path's successes for independent (2.27 tokens a step
#: where 2.00 came, reproductions/results/medusa.json), and a step is timed in parts, each by its shortest run.
_GAIN = 1.25


class TrainedDrafter(nn.Module, Drafter, PyTorchModelHubMixin):
    """Base class of drafters with weights: `from_pretrained`, `save_pretrained` and `push_to_hub` come with it.

    A folder holds ``config.json`` (the constructor's arguments) and ``model.safetensors`` (this module's parameters alone:
    the target model is never a sub-module, so none of its weights are saved or trained by accident).
    """

    #: Share of the training that is done, which the loop sets before every step: for losses with a schedule.
    trained_share: float = 1.0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any) -> Self:
        """Loads a folder that `save_pretrained` or a recipe wrote, or a hub repository.

        Args:
            pretrained_model_name_or_path: the folder, or ``owner/name``.
            **options: of the constructor, in place of those in the folder; ``revision``, ``token``... of the hub.

        Raises:
            ValueError: there is no such folder, or it holds something else.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            cls._check_folder(Path(name))
        elif name.count("/") != 1 or name[0] in "./~":
            raise ValueError(f"there is no folder {name} to load a {cls.__name__} from")
        with redirect_stdout(StringIO()):  # the mixin prints that it loads
            return super().from_pretrained(name, **options)  # type: ignore[no-any-return]

    @classmethod
    def _check_folder(cls, folder: Path) -> None:
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).is_file():
                raise ValueError(f"{folder} holds no {cls.__name__}: it has no {file}, which save_pretrained writes")
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parameters = inspect.signature(cls).parameters
        needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        if not needed <= set(given) <= set(parameters):
            raise ValueError(f"{folder} holds another drafter than {cls.__name__}: its config.json has {sorted(given)}")

    def sizes(self, model: PreTrainedModel) -> dict[str, int]:
        """What of this drafter has to fit a model: argument names and the model's own values."""
        text = model.config.get_text_config(decoder=True)
        return {"hidden_size": text.hidden_size}

    def bind(self, model: PreTrainedModel) -> None:
        """Makes `model` the target: checks the sizes and moves this module to its device and dtype.

        Raises:
            ValueError: the drafter was made for a model of other sizes.
        """
        for name, size in self.sizes(model).items():
            if getattr(self, name) != size:
                raise ValueError(
                    f"this {type(self).__name__} was made for {name}={getattr(self, name)}, but {type(model).__name__} has "
                    f"{size}; load the drafter that was trained for this model, or make one with {type(self).__name__}.for_model"
                )
        self._target = (model,)  # in a tuple: not a sub-module
        self.to(device=model_device(model), dtype=model.dtype)
        self.eval()

    @property
    def target(self) -> PreTrainedModel:
        """The model bound last."""
        return self._target[0]

    @abstractmethod
    def loss(
        self, model: PreTrainedModel, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss on rows of text.

        Args:
            model: the target model; frozen unless the recipe says otherwise.
            input_ids: ``(B, T)``, packed rows without padding.
            labels: ``input_ids`` with -100 where a token is not to be learnt (a prompt); None: all are.

        Returns:
            The scalar loss, and figures to log (detached scalars: losses and accuracies by step ahead).
        """


def mean_where(values: Tensor, labels: Tensor) -> Tensor:
    """The mean of ``values`` where ``labels`` are not -100; 0 where none is."""
    counted = labels != -100
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def output_weight(model: PreTrainedModel) -> Tensor:
    """The output head's weight ``(V, H)``, without rows beyond the vocabulary."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings to draft with")
    return cast(Tensor, head.weight)


class _Final:
    """What a decoder returns, with given hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def model_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's logits ``(B, T, V)`` for hidden states ``(B, T, H)`` after the final norm.

    By the model's own code, with a stand-in for its decoder: families differ in what they do around the output head (Phi has a
    bias, Cohere and Granite scale, Gemma 2 caps).
    """
    decoder = cast(Any, model.get_decoder())
    own = vars(decoder).get("forward")  # accelerate's device maps put one there
    decoder.forward = lambda *args, **kwargs: _Final(hidden)  # the instance's, over its class's
    try:
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return cast(Tensor, model(input_ids=tokens, use_cache=False).logits)
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


class RankTree:
    """A cartesian tree: a node of depth i with last rank r carries the r-th candidate of step i, whatever its parent is.

    Args:
        paths: the nodes, without the root; every node's parent must be among them.
        steps: candidates there are, which bounds the depth.
        ranks: ranks there are.
    """

    def __init__(self, paths: RankPaths, steps: int, ranks: int) -> None:
        nodes: list[tuple[int, ...]] = [(), *sorted({tuple(path) for path in paths})]
        known = {path: node for node, path in enumerate(nodes)}
        for path in nodes[1:]:
            if path[:-1] not in known:
                raise ValueError(f"tree: the node {path} needs its parent {path[:-1]} in the tree too")
            if len(path) > steps:
                raise ValueError(f"tree: the node {path} has depth {len(path)}, but only {steps} steps are drafted")
            if not 0 <= path[-1] < ranks:
                raise ValueError(f"tree: the node {path} has a rank outside [0, {ranks})")
        self.paths = nodes[1:]
        self.parents: tuple[int, ...] = (-1, *(known[path[:-1]] for path in nodes[1:]))
        self.ranks = max((path[-1] + 1 for path in nodes[1:]), default=1)
        self.depth = max((len(path) for path in nodes[1:]), default=0)
        #: Place of each node's token among the flattened candidates ``(steps, ranks)``.
        self.places = torch.tensor([(len(path) - 1) * self.ranks + path[-1] for path in nodes[1:]], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.parents)

    def fill(self, roots: Tensor, candidates: Tensor) -> Tensor:
        """Tokens ``(B, n)`` for ``roots (B,)`` and ``candidates (B, steps, ranks)``, best first.

        Where a tiny vocabulary has fewer ranks than the tree, the last one stands in for the others."""
        if (missing := self.ranks - candidates.shape[2]) > 0:
            candidates = torch.cat([candidates, candidates[:, :, -1:].expand(-1, -1, missing)], dim=2)
        flat = candidates[:, :, : self.ranks].flatten(1)
        places = self.places.to(flat.device)
        return torch.cat([roots[:, None], flat[:, places]], dim=1)


def best_tree(accuracies: Sequence[Sequence[float]], max_nodes: int) -> list[tuple[int, ...]]:
    """The tree with the largest expected length that grows by one best node at a time (Medusa's construction).

    Args:
        accuracies: ``[step][rank]``: how often the candidate of that rank is the model's own token.
        max_nodes: nodes below the root.

    Returns:
        Paths of ranks; the tree of n nodes contains that of n - 1.
    """
    chosen: list[tuple[int, ...]] = []
    frontier: dict[tuple[int, ...], float] = {(0,): float(accuracies[0][0])} if len(accuracies) and max_nodes else {}
    values: dict[tuple[int, ...], float] = {(): 1.0}
    while frontier and len(chosen) < max_nodes:
        path = max(frontier, key=lambda p: (frontier[p], [-r for r in p]))
        values[path] = frontier.pop(path)
        chosen.append(path)
        step, rank = len(path) - 1, path[-1]
        if rank + 1 < len(accuracies[step]):
            frontier[(*path[:-1], rank + 1)] = values[path[:-1]] * accuracies[step][rank + 1]
        if step + 1 < len(accuracies):
            frontier[(*path, 0)] = values[path] * accuracies[step + 1][0]
    return chosen


def path_chances(paths: RankPaths, accuracies: Sequence[Sequence[float]]) -> list[float]:
    """How likely each node is accepted: the product of accuracies along its path, 0 for a rank that was not measured."""
    return [
        math.prod(accuracies[step][rank] if rank < len(accuracies[step]) else 0.0 for step, rank in enumerate(path))
        for path in paths
    ]


def expected_length(paths: RankPaths, accuracies: Sequence[Sequence[float]]) -> float:
    """Expected tokens a step of a tree, by products of accuracies (successes are correlated: a guide)."""
    return 1.0 + sum(path_chances(paths, accuracies))


@torch.no_grad()
def rank_accuracies(
    candidates: Tensor, choices: Tensor, first: int = 2, prompt: int = 0
) -> tuple[list[list[float]], Tensor]:
    """How often each candidate is the model's own choice on text where the model's choices are the text.

    Args:
        candidates: ``(N, T, steps, ranks)``: drafted at position t for t + first, t + first + 1, ...
        choices: ``(N, T)`` the model's arg-max at every position (its choice for t + 1).
        first: how far ahead of its position the first candidate lies.
        prompt: tokens at the beginning of each row that the model did not choose: what is drafted there is not counted, since
            the draft and the model would go on from different tokens.

    Returns:
        ``[step][rank]`` rates, and the hits ``(N, T', steps, ranks)`` that they are means of.
    """
    steps, length = candidates.shape[2], choices.shape[1]
    kept = length - (first - 2) - steps
    hits = torch.stack(
        [
            candidates[:, :kept, step] == choices[:, first - 1 + step : first - 1 + step + kept, None]
            for step in range(steps)
        ],
        dim=2,
    )
    hits = hits[:, max(0, prompt - 1) :]  # the first draft is made when the prompt has been read
    if not hits.numel():
        raise ValueError(
            f"rows of {length} tokens leave nothing to measure {steps} steps ahead behind {prompt} of prompt"
        )
    return hits.float().mean((0, 1)).tolist(), hits


def ends_of(paths: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of a batch, and the last node of each row's accepted path (the root, of a row that has stopped)."""
    last = torch.tensor([path[-1] if path else 0 for path in paths], device=device)
    return torch.arange(len(paths), device=device), last


class RankDrafter(TrainedDrafter):
    """A drafter of ranked candidates for some steps ahead, whose best combinations are a tree.

    Attributes:
        tree: the whole tree.
        drafted: the part of it that is verified, which `fit` sets when a generate begins.
        accuracies: ``[step][rank]``, as measured by the calibration; None without one.
        max_nodes: nodes below the root at most, or ``"auto"``.
    """

    steps: int
    tree: RankTree
    drafted: RankTree
    accuracies: list[list[float]] | None
    max_nodes: int | str
    _candidates: Tensor | None = None  # (B, steps, ranks) for the next draft; None before there are any

    def _start(self, steps: int, tree: RankPaths, accuracies: list[list[float]] | None, max_nodes: int | str) -> None:
        """The constructor's part of what a tree needs."""
        if max_nodes != "auto" and (isinstance(max_nodes, (str, bool)) or max_nodes < 0):
            raise ValueError(f"max_nodes must be 'auto' or a number of nodes from 0, got {max_nodes!r}")
        self.steps, self.accuracies, self.max_nodes = steps, accuracies, max_nodes
        self._fitted: tuple[Any, ...] = ()
        self.set_tree(tree)

    def set_tree(self, paths: RankPaths, accuracies: list[list[float]] | None = None) -> None:
        """Replaces the tree: nodes as paths of ranks; with ``accuracies`` it can be cut to what pays on a device.

        CUDA graphs that were captured keep the tree they were captured with: `heedful.decoding.release_graphs`.
        """
        self.tree = self.drafted = RankTree(paths, self.steps, RANKS)
        self.accuracies = accuracies if accuracies is not None else self.accuracies
        if isinstance(config := getattr(self, "_hub_mixin_config", None), dict):
            config["tree"] = [list(path) for path in self.tree.paths]
            config["accuracies"] = self.accuracies

    def fit(self, model: PreTrainedModel, batch_size: int) -> None:
        """Sets `drafted`: with ``max_nodes="auto"`` the part of the tree with the most expected tokens per second, or none where that is
        not clearly more than plain decoding (`_GAIN`).

        What a verification and a draft cost is timed once per model, device, dtype and engine (`heedful.decoding.sizing`), what a
        node brings is the product of the accuracies along its path. Without accuracies the whole tree is drafted.
        """
        place = (*setting(model, batch_size), self.max_nodes, id(self.tree))
        if place == self._fitted:
            return
        self._fitted, self.drafted = place, self.tree
        if self.accuracies is None or not len(self.tree.paths):
            if self.max_nodes != "auto":
                self.drafted = RankTree(self._first(int(self.max_nodes)), self.steps, RANKS)
            return
        chances = path_chances(self.tree.paths, self.accuracies)
        order = sorted(range(len(chances)), key=lambda node: -chances[node])  # a child never comes before its parent
        if self.max_nodes == "auto":
            count = self._best_size(model, batch_size, [chances[node] for node in order])
        else:
            count = min(int(self.max_nodes), len(order))
        self.drafted = RankTree([self.tree.paths[node] for node in order[:count]], self.steps, RANKS)

    def _first(self, count: int) -> RankPaths:
        return sorted(self.tree.paths, key=len)[:count]

    def _best_size(self, model: PreTrainedModel, batch_size: int, chances: Sequence[float]) -> int:
        seconds = self.step_seconds(model, batch_size, len(chances))
        expected, best, count = 1.0, 1.0 / seconds[0], 0
        for nodes, chance in enumerate(chances, start=1):
            expected += chance
            if expected / seconds[nodes] > best:
                best, count = expected / seconds[nodes], nodes
        return count if best > _GAIN / seconds[0] else 0

    def propose(self, roots: LongTensor, committed: list[LongTensor]) -> Sequence[DraftTree | None] | DraftTree:
        if self._candidates is None:
            return [None] * len(roots)
        tokens = self.drafted.fill(roots, self._candidates)
        return DraftTree(cast(LongTensor, tokens), cast(LongTensor, torch.tensor(self.drafted.parents)))

    @abstractmethod
    def step_seconds(self, model: PreTrainedModel, batch_size: int, nodes: int) -> Sequence[float]:
        """Seconds of a step with 0, 1, ... ``nodes`` drafted nodes: 0 is plain decoding."""
