"""The decoding loop: read the prompt, then draft, verify, walk, commit, until every row has ended.

Between steps each row holds its committed tokens in the cache and a *root*: the last token chosen, not read yet. One
forward reads the root and all drafted nodes; the walk then goes down the tree with generate's own choice at every node:
a child that carries the chosen token continues it, otherwise the token is the new root. Every token of the walk is thus
the token that plain decoding would have chosen, whatever the tree was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import utils as generation_utils

from heedful.decoding.cache import TreeCache
from heedful.decoding.drafter import Drafter, DraftingOutputs
from heedful.decoding.masks import MaskBuilder
from heedful.decoding.selection import StopChecker, TokenSelector
from heedful.decoding.stats import DecodingStats
from heedful.decoding.support import model_device, vocabulary_size, without_cudnn_attention
from heedful.decoding.tree import DraftTree, VerifiedTree, topology
from heedful.seam import Verification

#: Rows of a static cache beyond the longest sequence: room for the nodes of a last tree. Larger trees are cut there.
STATIC_ROOM = 128
#: Rows * layers * hidden size * tokens ** 2 of a prompt from which on cuDNN's attention may build its plan for that length: a plan
#: takes 40 ms, and flash attention about 3 ms more for every 1e12 of these (H200, reproductions/results/cudnn-plans-h200.json).
PLAN_PAYS_FROM = 1.3e13
_REQUIREMENTS = frozenset({"logits", "hidden_states", "prompt_logits", "prompt_hidden_states", "cache"})
_OWN_KWARGS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "input_ids")
_PREFILL_ONLY = tuple(getattr(generation_utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ()))
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class Engine:
    """One generate of one batch; `run` does it.

    Args:
        model: the target model.
        input_ids: ``(B, T)``, left-padded where ``model_kwargs["attention_mask"]`` says so.
        drafter: proposes the trees; None decodes token by token.
        processors: generate's prepared logits processors.
        criteria: generate's prepared stopping criteria.
        config: generate's prepared generation config.
        model_kwargs: what generate hands to the forward: attention mask, position ids, inputs of other modalities.
        streamer: gets the prompt and then every token, at batch size 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        *,
        drafter: Drafter | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: Mapping[str, Any],
        streamer: Any = None,
    ) -> None:
        self.model, self.drafter, self.streamer, self.config = model, drafter, streamer, config
        self.model_kwargs = dict(model_kwargs)
        #: What goes into every forward; inputs of other modalities go into the prefill alone.
        self._step_kwargs = {
            name: value
            for name, value in self.model_kwargs.items()
            if name not in (*_OWN_KWARGS, *_TOKEN_TYPES, *_PREFILL_ONLY) and value is not None
        }
        self.requires = frozenset() if drafter is None else frozenset(drafter.requires)
        if unknown := self.requires - _REQUIREMENTS:
            raise ValueError(
                f"{type(drafter).__name__}.requires has {sorted(unknown)}; known are {sorted(_REQUIREMENTS)}"
            )
        if drafter is not None and drafter.joins_forward and config.cache_implementation == "static":
            raise ValueError(
                f"{type(drafter).__name__} adds rows to the model's forward, which a static cache has no room for; leave cache_implementation out"
            )
        self.learns = drafter is not None and getattr(drafter.update, "__func__", None) is not Drafter.update
        self.input_ids = input_ids
        self.device = input_ids.device
        self.batch, self.prompt_length = input_ids.shape
        self.vocabulary = vocabulary_size(model)
        self.select = TokenSelector(processors, bool(config.do_sample), self.batch)
        self.stop = StopChecker(criteria, self.batch)
        self.pad = None if config._pad_token_tensor is None else int(config._pad_token_tensor)

        self.max_length = self.stop.max_length
        text = model.config.get_text_config(decoder=True)
        #: Learned positions end here, and a drafted node must not lie past them before generate itself would.
        self.max_positions: int | None = getattr(text, "max_position_embeddings", None)
        static = config.cache_implementation == "static"
        if static and self.max_length is None:
            raise ValueError("cache_implementation='static' needs a maximum length: pass max_new_tokens or max_length")
        self.cache = TreeCache(model, cast(int, self.max_length) + STATIC_ROOM if static else None)
        mask = self.model_kwargs.get("attention_mask")
        if mask is not None and bool((mask == 1).all()):  # as newer versions of generate do: no padding, no mask
            mask = None
        self.prompt_mask: Tensor | None = mask
        self.masks = MaskBuilder(text, mask, model.dtype, model_device(model), self.cache.capacity)
        self.verification = Verification(model) if drafter is not None else None

        self.padding = [0] * self.batch if mask is None else mask.int().argmax(-1).tolist()
        self.tokens: list[list[int]] = input_ids.tolist()  # every row's sequence, padding included
        # Tensors of the same: `host` for drafters; `ids` on the prompt's device, for processors and criteria.
        self.host = input_ids.cpu()
        self._writable = self.host.numpy()  # the same memory: a token is written in no time
        self.ids = input_ids if self.device.type != "cpu" else self.host
        self.stopped: list[int | None] = [None] * self.batch  # length at which each row ended
        self.emitted: list[list[int]] = [[] for _ in range(self.batch)]
        self.reached: list[int] = []  # by depth - 1: trees whose path came to a node of that depth, and trees with one
        self.offered: list[int] = []
        self.stats = DecodingStats(accepted=self.emitted)

    # The loop ---------------------------------------------------------------------------------------------------------

    def run(self) -> tuple[LongTensor, DecodingStats]:
        """Decodes; returns ``(B, length)`` sequences, as generate does, and the statistics."""
        if self.drafter is not None:
            self.drafter.begin(self.model, self.batch)
        with _hidden_states(self.model, self.requires) as hidden:
            started = perf_counter()
            self.read_prompt(hidden)
            self.stats.prefill_seconds = perf_counter() - started
            with _decode_optimizations(self.model), without_cudnn_attention(model_device(self.model)):
                while active := self.active_rows():
                    self.step(active, hidden)
        if self.streamer is not None:
            self.streamer.end()
        return self.finish()

    def step(self, active: list[int], hidden: list[Tensor]) -> None:
        began = perf_counter()
        trees = self.draft(active)
        drafted = perf_counter()
        logits = self.verify(trees, hidden)
        choices = self.select.nodes(logits) if self.select.at_once else None
        if choices is None and logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # else the walk would be billed for the forward
        verified = perf_counter()
        paths = self.walk(trees, logits, choices)
        self.commit(trees, paths)
        committed = perf_counter()
        if self.drafter is not None and self.learns:
            self.drafter.update(
                [None if tree is None else tree.source for tree in trees],
                DraftingOutputs(
                    logits=logits if "logits" in self.requires else None,
                    hidden_states=hidden[-1] if "hidden_states" in self.requires else None,
                    cache=self.cache if "cache" in self.requires else None,
                ),
                paths,
                self.roots(),
            )
        self.stats.steps += 1
        self.stats.draft_seconds += drafted - began + perf_counter() - committed
        self.stats.verify_seconds += verified - drafted
        self.stats.commit_seconds += committed - verified

    # Prompt -----------------------------------------------------------------------------------------------------------

    def read_prompt(self, hidden: list[Tensor]) -> None:
        """The prefill: fills the cache, chooses each row's first token, and shows the prompt to the drafter."""
        if self.streamer is not None:
            self.streamer.put(self.input_ids.cpu())
        whole_logits = "prompt_logits" in self.requires
        logits: list[Tensor] = []
        hidden.clear()
        text = self.model.config.get_text_config(decoder=True)
        short = self.batch * text.num_hidden_layers * text.hidden_size * self.prompt_length**2 < PLAN_PAYS_FROM
        with without_cudnn_attention(model_device(self.model)) if short else nullcontext():
            for inputs in self._prompt_chunks(whole_logits):
                logits.append(self.model(**inputs, return_dict=True).logits)
        if self.drafter is not None:
            self.prompt_outputs = DraftingOutputs(
                logits=torch.cat(logits, dim=1) if whole_logits else None,
                hidden_states=self._prompt_states(hidden),
                cache=self.cache if "cache" in self.requires else None,
                attention_mask=self.prompt_mask,
            )
            self.prefill_drafter(self.prompt_outputs)
        self.last_logits = logits[-1][:, -1]
        first = self.select.batch(self.input_ids, self.last_logits).tolist()
        positions = self.model_kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(self.prompt_length, device=self.device)[None]
        #: Position of the last prompt token: (B or 1, 1), or (planes, B, 1) where positions have several axes.
        self.last_position = positions[..., -1:].to(model_device(self.model))
        self.next_position = (
            self.last_position.reshape(-1, self.last_position.shape[-2], 1).amax(0)[:, 0] + 1
        ).tolist()
        self.next_position *= self.batch // len(self.next_position)
        self.cached = [self.prompt_length] * self.batch  # rows of the cache that belong to each row of the batch
        self.width = self.prompt_length  # rows of the cache in use
        for row, token in enumerate(first):
            self.emit(row, token)
            if self.stop.row(row, self._sequence(row), token, len(self.tokens[row])):
                self.stopped[row] = len(self.tokens[row])

    def _prompt_states(self, hidden: list[Tensor]) -> Tensor | None:
        if "prompt_hidden_states" in self.requires:
            return torch.cat(hidden, dim=1)
        return hidden[-1][:, -1:] if "hidden_states" in self.requires else None

    def prefill_drafter(self, outputs: DraftingOutputs) -> None:
        assert self.drafter is not None
        self.drafter.prefill(self.input_ids, outputs)

    def _prompt_chunks(self, whole_logits: bool) -> Iterator[dict[str, Any]]:
        """The forward's arguments for the prompt, in one piece or in ``prefill_chunk_size`` pieces."""
        kwargs = {name: value for name, value in self.model_kwargs.items() if name != "input_ids"}
        kwargs |= {"past_key_values": self.cache, "use_cache": True}
        if whole_logits:
            kwargs.pop("logits_to_keep", None)
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        types = {name: kwargs.pop(name) for name in _TOKEN_TYPES if kwargs.get(name) is not None}
        size = self.config.prefill_chunk_size or self.prompt_length
        for start in range(0, self.prompt_length, size):
            end = min(start + size, self.prompt_length)
            chunk = cast(LongTensor, self.input_ids[:, start:end])
            yield cast(Any, self.model).prepare_inputs_for_generation(
                chunk,
                is_first_iteration=True,
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if positions is None else positions[..., start:end],
                **{name: value[..., :end] for name, value in types.items()},
                **kwargs,
            )

    # One step ---------------------------------------------------------------------------------------------------------

    def active_rows(self) -> list[int]:
        """Rows that still need tokens. Without an EOS, rows that have ended go on until the last one does."""
        if all(length is not None for length in self.stopped):
            if self.stop.pads:
                return []
            final = max(cast(list[int], self.stopped))
            return [row for row in range(self.batch) if len(self.tokens[row]) < final]
        if self.stop.pads:
            return [row for row in range(self.batch) if self.stopped[row] is None]
        return [row for row in range(self.batch) if len(self.tokens[row]) != self.max_length]

    def draft(self, active: list[int]) -> list[VerifiedTree | None]:
        """Each active row's tree, checked, without the nodes there is no room for."""
        proposal: Sequence[DraftTree | None] | DraftTree | None = None
        if self.drafter is not None:
            proposal = self.drafter.propose(self.roots(), [self.committed(row) for row in range(self.batch)])
        if isinstance(proposal, DraftTree):
            shared = proposal
            if shared.tokens.ndim != 2 or shared.tokens.shape[0] != self.batch:
                raise ValueError(
                    f"one draft tree for all rows has tokens ({self.batch}, n), got {tuple(shared.tokens.shape)}; return a list "
                    f"of {self.batch} trees otherwise"
                )
            proposal = [DraftTree(cast(LongTensor, tokens), shared.parents) for tokens in shared.tokens]
        if proposal is not None and len(proposal) != self.batch:
            raise ValueError(f"{type(self.drafter).__name__}.propose gave {len(proposal)} trees for {self.batch} rows")
        trees: list[VerifiedTree | None] = [None] * self.batch
        for row in active:
            root = self.tokens[row][-1]
            tree = None if proposal is None else proposal[row]
            if tree is None:
                trees[row] = VerifiedTree([root], topology((-1,)))
                continue
            checked = VerifiedTree.check(tree, root, self.vocabulary, row)
            trees[row] = checked.limit(*self._room(row))
        return trees

    def _room(self, row: int) -> tuple[int, int]:
        """The deepest node that can still be emitted and placed, and the number of nodes the cache has rows for."""
        depth = nodes = 1 << 30
        if self.max_length is not None:
            depth = self.max_length - len(self.tokens[row]) - 1
        if self.max_positions is not None:
            depth = min(depth, self.max_positions - 1 - self._position(row))
        if self.cache.capacity is not None:
            nodes = self.cache.capacity - max(self.cached)
        return depth, nodes

    def _position(self, row: int) -> int:
        """The position of a row's root."""
        return int(self.next_position[row]) + self.cached[row] - self.prompt_length

    def verify(self, trees: list[VerifiedTree | None], hidden: list[Tensor]) -> Tensor:
        """One forward over all trees; returns the logits ``(B, n, V)``, row i is node i."""
        nodes = max(tree.shape.size for tree in trees if tree is not None)
        start = max(self.cached[row] for row, tree in enumerate(trees) if tree is not None)
        if start != self.width:  # the longest rows have ended
            self.cache.commit(None, None, start)
            self.width = start
        root = [0] * nodes
        tokens = [root if tree is None else tree.tokens + [0] * (nodes - tree.shape.size) for tree in trees]
        depths = [
            (root if tree is None else tree.shape.depths + [0] * (nodes - tree.shape.size), cached - self.prompt_length)
            for tree, cached in zip(trees, self.cached, strict=True)
        ]
        offsets = torch.tensor([[1 + since + depth for depth in row] for row, since in depths])
        device = self.last_position.device
        hidden.clear()
        inputs = {
            "input_ids": torch.tensor(tokens, device=device),
            "attention_mask": self.masks.build(trees, self.cached, start, nodes),
            "position_ids": self.last_position + offsets.to(device),
            "past_key_values": self.cache,
            "use_cache": True,
            **self._step_kwargs,
        }
        if self.verification is None or not self.verification.attached:
            if self.drafter is None or not self.drafter.joins_forward:
                return self.model(**inputs, return_dict=True).logits
            with self.drafter.joining(self.model):
                return self.model(**inputs, return_dict=True).logits
        steps = torch.full((self.batch, nodes), -1)
        for row, tree in enumerate(trees):
            if tree is not None:
                steps[row, : tree.shape.size] = tree.shape.depth_tensor + self.cached[row] - self.prompt_length
        with self.verification.rows(
            steps, prompt_length=self.prompt_length, lengths=torch.tensor(self.cached), start=start
        ):
            return self.model(**inputs, return_dict=True).logits

    def walk(
        self, trees: list[VerifiedTree | None], logits: Tensor, choices: list[list[int]] | None
    ) -> list[list[int]]:
        """Goes down every tree, emits the tokens, and returns each row's accepted nodes."""
        paths: list[list[int]] = []
        for row, tree in enumerate(trees):
            path: list[int] = []
            node: int | None = None if tree is None else 0
            while node is not None:
                assert tree is not None
                path.append(node)
                if choices is not None:
                    token = choices[row][node]
                else:
                    token = self.select.row(row, self._sequence(row), logits[row, node])
                self.emit(row, token)
                if self._has_ended(row, token):
                    break
                node = tree.child(node, token)
            if tree is not None:
                self._count(tree, path)
                self.emitted[row].append(len(path))
            paths.append(path)
        return paths

    def commit(self, trees: list[VerifiedTree | None], paths: list[list[int]]) -> None:
        """Keeps the accepted rows of the cache: row b's path moves from ``width + path`` to right behind its own tokens."""
        if self.verification is not None and self.verification.attached:
            self.verification.accept(paths)
        start = self.width
        longest = max(len(path) for path in paths)
        moves = False
        sources, targets = [], []
        for row, path in enumerate(paths):
            path = path or [0]
            own = self.cached[row] if trees[row] is not None else start
            source = [start + node for node in path]
            target = list(range(own, own + len(path)))
            moves = moves or source != target
            spare = longest - len(path)  # repeats the first move: the same value to the same row
            sources.append(source + source[:1] * spare)
            targets.append(target + target[:1] * spare)
            if trees[row] is not None:
                self.cached[row] = own + len(path)
        self.width = max(self.cached[row] for row, tree in enumerate(trees) if tree is not None)
        if moves:
            self.cache.commit(torch.tensor(sources), torch.tensor(targets), self.width)
        else:
            self.cache.commit(None, None, self.width)

    # Sequences --------------------------------------------------------------------------------------------------------

    def emit(self, row: int, token: int) -> None:
        """Appends a token to a row's sequence, and streams it."""
        at = len(self.tokens[row])
        if at >= self.host.shape[1]:
            spare = self.host.new_zeros((self.batch, max(64, at // 2)))
            self.host = torch.cat([self.host, spare], dim=1)  # type: ignore[assignment]
            self._writable = self.host.numpy()
            self.ids = self.host if self.device.type == "cpu" else torch.cat([self.ids, spare.to(self.device)], dim=1)  # type: ignore[assignment]
        self.tokens[row].append(token)
        self._writable[row, at] = token
        if self.device.type != "cpu" and (self.select.processors or self.stop.others):
            self.ids[row, at] = token
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))

    def _has_ended(self, row: int, token: int) -> bool:
        """Whether the walk of this row ends with this token, because of a criterion or because nothing more is needed."""
        length = len(self.tokens[row])
        if self.stopped[row] is not None:  # a row without EOS that goes on until the last one ends
            return length == self.max_length
        ended = (
            self.stop.row(row, self._sequence(row), token, length)
            if self.stop.others
            else self.stop.simple(token, length)
        )
        if ended:
            self.stopped[row] = length
        return ended and (self.stop.pads or self.batch == 1 or length == self.max_length)

    def _sequence(self, row: int) -> LongTensor:
        """A row's sequence so far, ``(1, length)``, as generate hands it to processors and criteria."""
        return cast(LongTensor, self.ids[row : row + 1, : len(self.tokens[row])].clone())

    def committed(self, row: int) -> LongTensor:
        return cast(LongTensor, self.host[row, self.padding[row] : len(self.tokens[row]) - 1])

    def roots(self) -> LongTensor:
        return cast(LongTensor, torch.tensor([tokens[-1] for tokens in self.tokens]))

    def _count(self, tree: VerifiedTree, path: list[int]) -> None:
        missing = max(0, tree.shape.depth - len(self.offered))
        self.offered += [0] * missing
        self.reached += [0] * missing
        for depth in range(tree.shape.depth):
            self.offered[depth] += 1
            self.reached[depth] += depth < len(path) - 1

    def finish(self) -> tuple[LongTensor, DecodingStats]:
        """The sequences as generate returns them: as long as the longest row, ended rows padded (with an EOS) or trimmed."""
        final = max(cast(list[int], self.stopped))
        for row, tokens in enumerate(self.tokens):
            surplus = len(tokens) - final
            del tokens[final:]
            while surplus > 0 and self.emitted[row]:  # tokens past the end, of rows that went on without an EOS
                last = self.emitted[row].pop()
                if last > surplus:
                    self.emitted[row].append(last - surplus)
                surplus -= last
        self.stats.new_tokens = [len(tokens) - self.prompt_length for tokens in self.tokens]
        self.stats.acceptance_by_depth = [r / o for r, o in zip(self.reached, self.offered, strict=True)]
        rows = [tokens + [cast(int, self.pad)] * (final - len(tokens)) for tokens in self.tokens]
        return cast(LongTensor, torch.tensor(rows, dtype=self.input_ids.dtype, device=self.device)), self.stats


@contextmanager
def _hidden_states(
    model: PreTrainedModel, requires: frozenset[str], into: list[Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Collects the decoder's last hidden states (after the final norm) of every forward, if anybody asks for them."""
    collected: list[Tensor] = [] if into is None else into
    if not requires & {"hidden_states", "prompt_hidden_states"}:
        yield collected
        return

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        collected.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = model.get_decoder().register_forward_hook(keep)
    try:
        yield collected
    finally:
        handle.remove()


@contextmanager
def _decode_optimizations(model: PreTrainedModel) -> Iterator[None]:
    """generate's own switch for decoding (the experts of mixture models, on a GPU), where transformers has it."""
    switch = getattr(model, "_optimize_model_for_decode", nullcontext)
    with switch():
        yield
