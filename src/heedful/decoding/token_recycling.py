"""Token Recycling: the candidates the model computed and threw away become the drafts of later steps.

An adjacency matrix holds, for every token of the vocabulary, the k tokens that the model last found most likely after it.
A step reads a tree out of it, from the last token down, along a fixed template; one forward verifies the tree; and every
verified node, accepted or rejected, writes its own top-k back into the matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import LongTensor, Tensor
from transformers import PreTrainedModel

from heedful.decoding.drafter import DeviceDrafter, Drafter, DraftingOutputs
from heedful.decoding.sizing import captured, forward_costs
from heedful.decoding.support import model_device, vocabulary_size
from heedful.decoding.tree import DraftTree

if TYPE_CHECKING:
    from heedful.decoding.on_device import RecyclingOnDevice

#: The paper's template: how many children each node has. A node is the path of candidate ranks that leads to it.
_CHILDREN: dict[tuple[int, ...], int] = {
    (): 8,
    **{(0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1},
    **{(0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1},
    **{(1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1},
    **{(0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1},
    **{(0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1},
    **{(0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1},
    **{(0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1},
}
#: The paper's 80 nodes as paths of ranks, level by level: 8 / 21 / 25 / 15 / 8 / 3.
PAPER_TEMPLATE: tuple[tuple[int, ...], ...] = tuple(
    sorted(((*path, rank) for path, count in _CHILDREN.items() for rank in range(count)), key=lambda p: (len(p), p))
)

#: Nodes of a tree on a GPU, the root included: there that many rows cost about as much as one.
NODES_ON_DEVICE = 64
_UNSEEN = -1
# What an acceptance rate is measured for: how well drafting goes right now; what last followed the two tokens before the
# candidate (nothing known, the candidate, another token); what became of the node that wrote the candidate (rejected;
# accepted, but another token followed; this one followed), the candidate's rank, and its share of the probability.
_PACES = np.array([1.25, 1.75, 2.5, 3.5, 5.0])  # bounds of the recent tokens per step
_NOTHING, _THIS, _ANOTHER = range(3)
_FATES, _BUCKETS = 3, 8
_PAIRS = 1 << 16  # size of the table of what followed two tokens
_PRIOR = 8.0  # observations that a prior counts for
_MEMORY = 0.99  # decay per step of the tokens per second that a larger tree has to beat
_FLOOR = 0.02  # nodes less likely than this are worth no row at any price, so their children are not looked up


class TokenRecycling(Drafter):
    """Drafts from an adjacency matrix of the model's own recent top-k candidates. No training and no second model.

    The matrix holds ``num_candidates`` successors of every token, as the model last ranked them. A draft is a tree of
    successors of successors, in the shape of the paper's 80-node template; of it the ``max_nodes`` nodes that are most
    likely to be accepted are verified. That likelihood is the product, along a node's path, of acceptance rates measured
    while decoding: by a candidate's rank and probability, and by whether it followed when its token, or its token and the
    one before, last occurred in the text. After a step every verified node writes its top candidates back. The matrix outlives a generate, so later prompts start warm; `clear` forgets it.

    Example:
        >>> import heedful
        >>> from heedful.decoding import TokenRecycling
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> drafter = TokenRecycling()
        >>> ids = tokenizer("It was the best of times,", return_tensors="pt").input_ids
        >>> result = heedful.generate(model, ids, drafter, max_new_tokens=64, do_sample=False)
        >>> result.stats.tokens_per_step  # 1.0 is plain decoding

    Args:
        num_candidates: k, successors kept of each token. Default 8.
        tree_template: the tree's nodes as paths of candidate ranks, ``[(0,), (1,), (0, 0), ...]``; every node's parent must
            be there too. ``[]`` is plain decoding. Default None: the paper's 80 nodes.
        max_nodes: drafted nodes a step at most, the root not counted. ``"auto"`` times the model's forward at 1 to 81 rows,
            once per model, device and dtype (about a second), and verifies in each step the number of nodes with the
            highest expected tokens per second. Default ``"auto"``.
        share_rows: one matrix for all rows of a batch; False keeps one for each row, so that no row's drafts (never its
            output, but its speed) depend on another's text. Default True.
        update_from_prompt: also write the top candidates of every prompt token, which makes the prefill compute logits for
            the whole prompt. Default False, as in the paper.

    Attributes:
        matrices: one `AdjacencyMatrix`, or one a row.

    Cost:
        ``5 V k`` bytes of host memory (330 kB for V = 8192, k = 8) and 260 kB for what followed pairs of tokens. A step reads the draft in about 0.1 ms and takes a top-k
        over the verified rows, 0.1 ms for 8 rows of V = 8192 on a CPU. The verification itself is a forward of up to 81 rows,
        which ``max_nodes`` bounds: on a GPU it costs about as much as one row, on a CPU 8 rows cost 1.5.

    When not to use:
        At large batch sizes, where the device has no idle compute for additional rows. Where outputs copy long passages of
        the prompt, `PromptLookup` drafts longer. The matrix shared over requests shows, through timing, which tokens followed
        which for other users: use ``clear()`` or one drafter per tenant.

    Paper:
        "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling", Luo, Wang, Zhu,
        Zhang, Zhang, Yang, Xu, Che, ACL 2025, arXiv 2408.08696. Where we differ: unseen tokens have no children (the paper
        drafts token 0), processors act on the verifier only, the tree is cut to the nodes that pay on the device, and of
        several nodes with the same token an accepted one writes last.
    """

    def __init__(
        self,
        num_candidates: int = 8,
        tree_template: Sequence[Sequence[int]] | None = None,
        max_nodes: int | str = "auto",
        share_rows: bool = True,
        update_from_prompt: bool = False,
    ) -> None:
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
        if max_nodes != "auto" and (isinstance(max_nodes, (str, bool)) or max_nodes < 0):
            raise ValueError(f"max_nodes must be 'auto' or a number of nodes from 0, got {max_nodes!r}")
        self.num_candidates, self.max_nodes = num_candidates, max_nodes
        self.share_rows, self.update_from_prompt = share_rows, update_from_prompt
        if tree_template is None:
            paths = [path for path in PAPER_TEMPLATE if max(path) < num_candidates]
        else:
            paths = [tuple(path) for path in tree_template]
        self.template = TreeTemplate(paths, num_candidates)
        self.requires = frozenset({"logits", "prompt_logits"} if update_from_prompt else {"logits"})
        self.matrices: list[AdjacencyMatrix] = []
        self._costs: np.ndarray | None = None
        self._pace: np.ndarray
        self._noted: list[int] = []
        self._on_device: RecyclingOnDevice | None = None
        self._corpus: AdjacencyMatrix | None = None  # what every row begins with
        self.clear()

    # Drafter ----------------------------------------------------------------------------------------------------------

    def begin(self, model: PreTrainedModel, batch_size: int) -> None:
        vocabulary = _tokens_with_logits(model)
        if self.matrices and self.matrices[0].vocabulary != vocabulary:
            raise ValueError(
                f"this TokenRecycling has learned {self.matrices[0].vocabulary} tokens, but {type(model).__name__} has "
                f"{vocabulary}; call clear() first, or use one drafter per model"
            )
        while len(self.matrices) < (1 if self.share_rows else batch_size):
            new = copy.deepcopy(self._corpus) or AdjacencyMatrix(vocabulary, self.num_candidates)
            self.matrices.append(new)
        for matrix in self.matrices:
            matrix.set_rates()
        self._recent = np.full(batch_size, 2.0)
        self._noted = [0] * batch_size
        self._previous = np.full(batch_size, _UNSEEN)
        self._costs = None
        if self.max_nodes == "auto" and len(self.template) and not captured():
            self._costs = forward_costs(model, batch_size, len(self.template) + 1) / batch_size

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        if not self.update_from_prompt or outputs.logits is None:
            return
        for row in range(tokens.shape[0]):
            matrix = self._matrix(row)
            start = 0 if outputs.attention_mask is None else int(outputs.attention_mask[row].int().argmax())
            for at in range(start, tokens.shape[1], 256):  # in pieces: logits of a whole prompt are large in float32
                chunk = slice(at, at + 256)
                followers = np.append(tokens[row, at + 1 : at + 257].cpu().numpy(), _UNSEEN)[: len(tokens[row, chunk])]
                candidates, shares = matrix.candidates(outputs.logits[row, chunk])
                matrix.write(tokens[row, chunk].cpu().numpy(), candidates, shares, followers)

    def propose(self, roots: LongTensor, committed: list[LongTensor]) -> list[DraftTree | None]:
        for row, root in enumerate(roots.tolist()):
            text = committed[row][max(0, self._noted[row] - 2) :].numpy()
            self._matrix(row).note(np.append(text, root))
            self._noted[row] = len(committed[row]) + 1
            self._previous[row] = text[-1] if len(text) else _UNSEEN
        return [self._read(row, root) for row, root in enumerate(roots.tolist())]

    def update(
        self,
        trees: list[DraftTree | None],
        outputs: DraftingOutputs,
        paths: list[list[int]],
        new_roots: LongTensor,
    ) -> None:
        assert outputs.logits is not None
        candidates, shares = self.matrices[0].candidates(outputs.logits)
        for row, tree in enumerate(trees):
            if tree is None:
                continue
            matrix, path = self._matrix(row), paths[row]
            tokens = tree.tokens.numpy()
            followers = np.full(len(tokens), _UNSEEN)
            followers[path] = np.append(tokens[path[1:]], int(new_roots[row]))
            before = np.append(self._previous[row], tokens[path[:-1]])
            matrix.learn_rates(before, tokens[path], followers[path], self._recent[row])
            # Where a token stands in several nodes, the last one written stays: let that be an accepted one.
            order = np.argsort(followers != _UNSEEN, kind="stable")
            matrix.write(tokens[order], candidates[row][order], shares[row][order], followers[order])
            self._recent[row] += 0.5 * (len(path) - self._recent[row])
            if self._costs is not None:
                self._pace = _MEMORY * self._pace + np.array([len(path), self._costs[len(tokens) - 1]])

    def on_device(self, model: PreTrainedModel, batch_size: int, capacity: int) -> DeviceDrafter | None:
        """One matrix on the model's device, for all graphs of this drafter; None with a matrix for each row."""
        from heedful.decoding.on_device import RecyclingOnDevice

        if not self.share_rows or not len(self.template) or self.max_nodes == 0:
            return None
        device, vocabulary = model_device(model), _tokens_with_logits(model)
        nodes = NODES_ON_DEVICE if self.max_nodes == "auto" else int(self.max_nodes) + 1
        fresh = RecyclingOnDevice(self.template, vocabulary, self.num_candidates, nodes, device)
        if self._on_device is not None and self._on_device.tokens.shape == fresh.tokens.shape:
            fresh.tokens, fresh.shares = self._on_device.tokens, self._on_device.shares
        elif self.matrices:
            fresh.tokens.copy_(torch.from_numpy(self.matrices[0].tokens))
            fresh.shares.copy_(torch.from_numpy(self.matrices[0].shares()))
        self._on_device = fresh
        return fresh

    def _from_device(self) -> None:
        """Brings what was learned on the device into the host's matrix."""
        if self._on_device is None:
            return
        tokens, shares = self._on_device.tokens.cpu().numpy(), self._on_device.shares.cpu().numpy()
        if not self.matrices:
            self.matrices = [AdjacencyMatrix(tokens.shape[0], self.num_candidates)]
        seen = np.flatnonzero(tokens[:, 0] != _UNSEEN)
        self.matrices[0].write(seen, tokens[seen], shares[seen], np.full(len(seen), _UNSEEN))

    # State ------------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forgets the matrix and the measured acceptance rates."""
        self.matrices, self._corpus = [], None
        if self._on_device is not None:  # in place: captured graphs read it
            self._on_device.tokens.fill_(_UNSEEN)
            self._on_device.shares.zero_()
        self._costs = None
        self._pace = np.zeros(2)  # decayed tokens and seconds: what a larger tree has to beat
        self._recent = np.zeros(0)  # tokens per step of each row lately
        self._noted = []  # tokens of each row's text whose pairs are known
        self._previous = np.zeros(0, dtype=np.int64)  # the token before each row's root

    def save(self, path: str | PathLike[str]) -> None:
        """Writes what was learned as safetensors: ``tokens`` int32 ``(rows, V, k)``, -1 where nothing is known yet.

        Raises:
            ValueError: nothing has been learned yet.
        """
        self._from_device()
        if not self.matrices:
            raise ValueError("there is nothing to save: this TokenRecycling has not been used in a generate yet")
        arrays = [matrix.state() for matrix in self.matrices]
        save_file({name: np.stack([state[name] for state in arrays]) for name in arrays[0]}, str(path))

    def load(self, path: str | PathLike[str]) -> TokenRecycling:
        """Reads what `save` wrote, in place of what was learned; returns the drafter itself.

        With a matrix for each row, a file of one matrix is what every row begins with.

        Raises:
            ValueError: the file was written with another ``num_candidates``, or by something else.
        """
        try:
            arrays = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is no file of TokenRecycling.save: {error}") from None
        if set(arrays) != set(AdjacencyMatrix.STATE) or arrays["tokens"].ndim != 3:
            raise ValueError(f"{path} is no file of TokenRecycling.save: it holds {sorted(arrays)}")
        _, vocabulary, k = arrays["tokens"].shape
        if k != self.num_candidates:
            raise ValueError(f"{path} was saved with num_candidates={k}, this drafter has {self.num_candidates}")
        self.clear()
        for row in range(1 if self.share_rows else len(arrays["tokens"])):
            matrix = AdjacencyMatrix(vocabulary, k)
            matrix.restore({name: array[row] for name, array in arrays.items()})
            self.matrices.append(matrix)
        if len(arrays["tokens"]) == 1:
            self._corpus = copy.deepcopy(self.matrices[0])
        if self._on_device is not None:
            if self._on_device.tokens.shape != self.matrices[0].tokens.shape:
                raise ValueError(f"{path} holds {vocabulary} tokens, this drafter is in use with another vocabulary")
            self._on_device.tokens.copy_(torch.from_numpy(self.matrices[0].tokens))
            self._on_device.shares.copy_(torch.from_numpy(self.matrices[0].shares()))
        return self

    def warm(
        self, tokens: LongTensor, model: PreTrainedModel, batch_size: int = 8, length: int = 512
    ) -> TokenRecycling:
        """Fills the matrix from a corpus, so that the first prompt finds it warm; returns the drafter itself.

        With a matrix for each row, all rows are warmed, those of later batches too.

        Args:
            tokens: ``(n,)`` token ids of text like that to come. A few ten thousand cover most of what is frequent.
            model: the model that will decode.
            batch_size: rows of a forward.
            length: tokens of a row.
        """
        self.begin(model, 1)
        rows = tokens.flatten()[: len(tokens.flatten()) // length * length].view(-1, length)
        if len(rows) == 0:
            raise ValueError(f"warm needs at least {length} tokens (or a smaller length), got {len(tokens.flatten())}")
        self._corpus = self._corpus or AdjacencyMatrix(self.matrices[0].vocabulary, self.num_candidates)
        with torch.no_grad():
            for batch in rows.split(batch_size):
                logits = model(input_ids=batch.to(model_device(model)), use_cache=False).logits
                for row, row_logits in zip(batch.cpu().numpy(), logits, strict=True):
                    candidates, shares = self._corpus.candidates(row_logits)
                    for matrix in (self._corpus, *self.matrices):
                        matrix.write(row, candidates, shares, np.append(row[1:], _UNSEEN))
                        matrix.note(row)
        if self._on_device is not None:
            self._on_device.tokens.copy_(torch.from_numpy(self.matrices[0].tokens))
            self._on_device.shares.copy_(torch.from_numpy(self.matrices[0].shares()))
        return self

    # Reading a draft --------------------------------------------------------------------------------------------------

    def _matrix(self, row: int) -> AdjacencyMatrix:
        return self.matrices[0 if self.share_rows else row]

    def _read(self, row: int, root: int) -> DraftTree | None:
        matrix = self._matrix(row)
        if not len(self.template) or self.max_nodes == 0 or root >= matrix.vocabulary:
            return None
        floor = 0.0 if self._costs is None else _FLOOR
        tokens, scores = self.template.read(matrix, self._previous[row], root, self._recent[row], floor)
        # A node never scores above its parent, and comes after it when equal: the first nodes are a tree.
        order = np.argsort(-scores, kind="stable")
        known = int(np.count_nonzero(scores))
        if self._costs is None:
            count = min(known, NODES_ON_DEVICE if self.max_nodes == "auto" else int(self.max_nodes) + 1)
        else:
            count = self._best_size(scores[order[:known]])
        if count == 1:
            return None
        nodes = np.sort(order[:count])
        renumbered = np.full(len(scores), -1)
        renumbered[nodes] = np.arange(count)
        parents = renumbered[self.template.parents[nodes]]
        parents[0] = -1
        return DraftTree(torch.from_numpy(tokens[nodes]), torch.from_numpy(parents))  # type: ignore[arg-type]

    def _best_size(self, scores: np.ndarray) -> int:
        """How many of the best nodes to verify, root included, for the most tokens per second over time.

        A node is worth its cost if it brings more tokens than the same time brings on average: maximise
        ``tokens(n) - pace * seconds(n)``. Without a history, maximise the ratio.
        """
        assert self._costs is not None
        expected, seconds = np.cumsum(scores), self._costs[: len(scores)]
        if self._pace[1] == 0.0:
            return int(np.argmax(expected / seconds)) + 1
        return int(np.argmax(expected - self._pace[0] / self._pace[1] * seconds)) + 1


class TreeTemplate:
    """A tree of candidate ranks, in depth-first order: the likeliest path lies in consecutive rows, which commit for free.

    Args:
        paths: the nodes as paths of ranks from the root, without the root itself.
        num_candidates: ranks lie below this.
    """

    def __init__(self, paths: Sequence[tuple[int, ...]], num_candidates: int) -> None:
        nodes = [(), *sorted(set(paths))]
        index = {path: node for node, path in enumerate(nodes)}
        for path in paths:
            if not path or path[:-1] not in index:
                raise ValueError(f"tree_template: the node {path} needs its parent {path[:-1]} in the template too")
            if not 0 <= path[-1] < num_candidates:
                raise ValueError(
                    f"tree_template: the node {path} has a rank outside [0, {num_candidates}), num_candidates"
                )
        self.parents = np.array([-1, *(index[path[:-1]] for path in nodes[1:])])
        ranks = np.array([0, *(path[-1] for path in nodes[1:])])
        depths = np.array([len(path) for path in nodes])
        #: ``(n, depth)``: the nodes as ranks from the root, -1 behind a path's end.
        self.paths = np.array([[*path, *[-1] * (int(depths.max()) - len(path))] for path in nodes], dtype=np.int64)
        #: Level by level: the nodes, their parents, their parents' parents (-1: what comes before the root), their ranks.
        self.levels = [
            (at, self.parents[at], self.parents[self.parents[at]], ranks[at])
            for at in (np.flatnonzero(depths == depth) for depth in range(1, int(depths.max()) + 1))
        ]

    def __len__(self) -> int:
        """The nodes beside the root."""
        return len(self.parents) - 1

    def read(
        self, matrix: AdjacencyMatrix, previous: int, root: int, recent: float, floor: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``(n,)`` int64 and acceptance probabilities ``(n,)``, 0 where the matrix knows no successor.

        Args:
            matrix: what is read.
            previous: the token before the root, -1 for none.
            root: the root's token.
            recent: tokens per step lately, which the rates depend on.
            floor: below a level whose nodes are all less likely than this, nothing is looked up.
        """
        nodes = len(self.parents)
        tokens = np.zeros(nodes + 1, dtype=np.int64)  # the last place is that of the token before the root
        scores = np.zeros(nodes)
        tokens[0], tokens[-1], scores[0] = root, previous, 1.0
        rates = matrix.rates[np.searchsorted(_PACES, recent)].reshape(-1)
        for level, parents, grandparents, ranks in self.levels:
            parent = tokens[parents]
            at = parent * matrix.num_candidates + ranks  # of an unseen parent: some entry, with score 0
            tokens[level] = candidates = matrix.flat_tokens.take(at, mode="wrap")
            kinds = matrix.flat_codes.take(at, mode="wrap") + matrix.kinds * matrix.agreement(
                tokens[grandparents], parent, candidates
            )
            scores[level] = probabilities = scores[parents] * rates.take(kinds) * (candidates >= 0)
            if probabilities.max() <= floor:
                break
        return tokens[:-1], scores


class AdjacencyMatrix:
    """The k likeliest successors of every token, as the model last saw them, and how often such successors come true.

    Attributes:
        tokens: int32 ``(V, k)``, by falling probability; -1 where nothing is known yet.
        codes: ``(V, k)``: each entry's kind, by fate, rank and probability.
        pairs: int32 ``(65536,)``: the token that last followed two tokens, by their hash (a collision costs speed only).
        rates: float64 ``(6, 3, kinds)``: the measured acceptance rates, by pace, by what followed the pair, and by kind.
    """

    STATE = ("tokens", "codes", "pairs", "hits", "seen")

    def __init__(self, vocabulary: int, num_candidates: int) -> None:
        self.vocabulary, self.num_candidates = vocabulary, num_candidates
        self.kinds = _FATES * num_candidates * _BUCKETS
        self.tokens = np.full((vocabulary, num_candidates), _UNSEEN, dtype=np.int32)
        self.codes = np.zeros((vocabulary, num_candidates), dtype=np.uint8 if self.kinds <= 256 else np.uint16)
        self.pairs = np.full(_PAIRS, _UNSEEN, dtype=np.int32)
        self.hits, self.seen = np.zeros((2, len(_PACES) + 1, 3, self.kinds))
        self._ranks = np.arange(num_candidates) * _BUCKETS
        # Before anything is measured, a candidate comes true as often as its probability says, or its pair does.
        share = np.tile((np.arange(_BUCKETS) + 0.5) / _BUCKETS, _FATES * num_candidates)
        self._prior = np.stack([share, np.maximum(share, 0.7), 0.4 * share])
        self.set_rates()

    @property
    def flat_tokens(self) -> np.ndarray:
        return self.tokens.reshape(-1)

    @property
    def flat_codes(self) -> np.ndarray:
        return self.codes.reshape(-1)

    def candidates(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The top k of raw logits ``(..., V)``, without the head's padding: tokens and shares of the top k's probability."""
        logits = logits[..., : self.vocabulary].float()
        top, tokens = logits.topk(min(self.num_candidates, logits.shape[-1]), dim=-1)
        return tokens.cpu().numpy(), top.softmax(-1).cpu().numpy()

    def shares(self) -> np.ndarray:
        """Each entry's share of its token's top-k probability ``(V, k)`` float32, as finely as it is kept."""
        shares = ((self.codes % _BUCKETS) + 0.5) / _BUCKETS * (self.tokens != _UNSEEN)
        return shares.astype(np.float32)

    def write(self, tokens: np.ndarray, candidates: np.ndarray, shares: np.ndarray, followers: np.ndarray) -> None:
        """Sets the successors of ``tokens (n,)``; of a token that occurs twice, the last one stays.

        Args:
            tokens: the tokens whose successors are set.
            candidates: their successors ``(n, k)``, likeliest first.
            shares: the successors' shares of the probability ``(n, k)``.
            followers: the token that did follow, -1 in rejected nodes.
        """
        width = candidates.shape[-1]
        buckets = np.minimum((shares * _BUCKETS).astype(np.int64), _BUCKETS - 1)
        fates = np.where(followers[:, None] == _UNSEEN, 0, np.where(candidates == followers[:, None], 2, 1))
        self.tokens[tokens, :width] = candidates
        self.codes[tokens, :width] = buckets + self._ranks[:width] + fates * (self.num_candidates * _BUCKETS)

    def note(self, text: np.ndarray) -> None:
        """Remembers what followed each two tokens of ``text (n,)``."""
        if len(text) > 2:
            self.pairs[_hash(text[:-2], text[1:-1])] = text[2:]

    def agreement(self, before: np.ndarray, tokens: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """What last followed ``before`` and ``tokens``: nothing known (0), the candidate (1), or another token (2)."""
        last = self.pairs[_hash(before, tokens)]
        return np.where(last == _UNSEEN, _NOTHING, np.where(last == candidates, _THIS, _ANOTHER))

    def learn_rates(self, before: np.ndarray, tokens: np.ndarray, followers: np.ndarray, recent: float) -> None:
        """Counts which of the known successors of ``tokens (m,)`` came true. ``before``, ``followers``: the tokens around."""
        pace, candidates = np.searchsorted(_PACES, recent), self.tokens[tokens]
        known = candidates != _UNSEEN
        where = (self.agreement(before[:, None], tokens[:, None], candidates)[known], self.codes[tokens][known])
        np.add.at(self.seen[pace], where, 1.0)
        np.add.at(self.hits[pace], where, (candidates == followers[:, None])[known])
        self._news += 1
        if self._news == 8:  # rates move slowly
            self.set_rates()

    def set_rates(self) -> None:
        """Works out the rates from what was counted.

        As long as little is measured, a pace's rates lean on those over all paces, and these on the probabilities.
        """
        self._news = 0
        overall = (self.hits.sum(0) + _PRIOR * self._prior) / (self.seen.sum(0) + _PRIOR)
        self.rates = np.maximum((self.hits + _PRIOR * overall) / (self.seen + _PRIOR), 1e-9)

    def state(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name].copy())
        self.set_rates()


def _hash(before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return (before * 40503 + tokens * 9973) & (_PAIRS - 1)


def _tokens_with_logits(model: PreTrainedModel) -> int:
    """Tokens that can be read and predicted: without the padding of the embedding or of the output head."""
    sizes = [vocabulary_size(model), model.config.get_text_config(decoder=True).vocab_size]
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "weight", None), Tensor):
        sizes.append(head.weight.shape[0])
    return int(min(sizes))
