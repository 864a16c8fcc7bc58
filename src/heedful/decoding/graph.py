"""The engine on a GPU: a step of fixed shapes, captured once as a CUDA graph and replayed.

A step is one forward over all trees, the walk, the commit and, for drafters that can (`Drafter.on_device`), the next draft;
all of it tensor operations on buffers that never move. The host launches it, reads back the emitted tokens (the only
synchronisation), and hands them on. Trees are padded to a bucket of nodes, so that a few graphs serve every tree; a drafter
on the device has one shape. With such a drafter the next step is launched before the last one's tokens are read: a row that
has ended moves nothing any more, so a step too many does no harm.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import torch
from torch import LongTensor, Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from heedful.attention import tree_attention
from heedful.decoding.cache import GraphCache
from heedful.decoding.device_walk import Settled, ancestors_of, place, settle
from heedful.decoding.drafter import DeviceDrafter, DeviceStep, Drafter, DraftingOutputs
from heedful.decoding.engine import Engine, _hidden_states
from heedful.decoding.selection import StopChecker
from heedful.decoding.sizing import in_graphs
from heedful.decoding.support import model_device, routes_heads
from heedful.decoding.tree import VerifiedTree, topology
from heedful.seam import AttentionCall, Kernel, Verification, attach

if TYPE_CHECKING:
    from heedful.decoding.move_rows import RowMover

#: Nodes that trees are padded to, the root included. Larger trees are cut to the last one.
BUCKETS = (1, 8, 16, 32, 64, 128)
#: The deepest node that a tree of a bucket may have; it sizes the tensors of a path.
DEEPEST = 32
#: Rows of the cache are made in multiples of this, so that the next prompt finds its graphs ready.
ROWS = 1024
_END_TOKENS = 8
#: Sessions are kept with their model, the latest ones, while their caches take less than this share of the device's memory.
KEPT_SHARE = 0.1
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_HEAD_SIZES = (64, 128, 256)

_ATTRIBUTE = "_heedful_graphs"
_models: WeakSet[PreTrainedModel] = WeakSet()


class _Sessions(OrderedDict[tuple[Any, ...], "Session"]):
    """A model's sessions, least recently used first. They refer to the model, so a registry of all would keep it alive: they
    are an attribute of the model, which leaves its copies and its files without them."""

    fixed: tuple[Any, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        #: Functions compiled for a batch size, capacity and number of nodes: sessions that differ by drafter share them.
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def still(self, fixed: tuple[Any, ...]) -> None:
        """Drops all sessions if what captured steps have fixed is no longer as it was."""
        if fixed != self.fixed:
            self.drop_all()
            self.fixed = fixed

    def drop_oldest(self) -> None:
        self.popitem(last=False)[1].close()

    def drop_all(self) -> None:
        while self:
            self.drop_oldest()
        self.compiled.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sessions:
        return _Sessions()

    def __reduce__(self) -> Any:
        return _Sessions, ()


def sessions_of(model: PreTrainedModel) -> _Sessions:
    """The sessions that are kept with a model."""
    if _ATTRIBUTE not in model.__dict__:
        model.__dict__[_ATTRIBUTE] = _Sessions()
        _models.add(model)
    return cast(_Sessions, model.__dict__[_ATTRIBUTE])


def unsupported(
    model: PreTrainedModel,
    drafter: Drafter | None,
    processors: LogitsProcessorList,
    stop: StopChecker,
    model_kwargs: Mapping[str, Any],
) -> str | None:
    """Why a generate has to run in the eager engine; None: it can run in CUDA graphs."""
    text = model.config.get_text_config(decoder=True)
    if model_device(model).type != "cuda":
        return "the model is not on a CUDA device"
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        return "the model is spread over several devices"
    if Verification(model).attached:
        return "parts are attached to the model"
    if routes_heads(text):
        return "its attention chooses heads (convert_to_moh), which the tree attention kernel would not"
    if drafter is not None and drafter.joins_forward and drafter.rows_per_node == 1:
        return f"{type(drafter).__name__} takes part in the model's forward"
    heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if heads not in _HEAD_SIZES:
        return f"heads of {heads} (the tree attention kernel has {', '.join(map(str, _HEAD_SIZES))})"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"} or getattr(text, "attention_chunk_size", None):
        return f"attention layers of the kinds {', '.join(sorted(kinds))}"
    if any("sinks" in name for name, _ in model.named_parameters()):
        return "attention with sink logits"
    if any(type(processor) not in _WARPERS for processor in processors):
        return "logits processors beyond temperature, top-k, top-p and min-p"
    if stop.others:
        return "stopping criteria beyond length and EOS"
    if stop.max_length is None:
        return "no maximum length: the cache cannot be sized"
    if len(stop.eos) > _END_TOKENS:
        return f"more than {_END_TOKENS} end-of-sequence tokens"
    if any(value is not None for name, value in model_kwargs.items() if name in ("token_type_ids", "pixel_values")):
        return "inputs of other modalities"
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.ndim > 2:
        return "positions with several axes"
    return None


def capacity_for(max_length: int, drafter: Drafter | None) -> int:
    """Rows of the cache for sequences of up to ``max_length`` tokens, and a tree behind them."""
    room = 1 if drafter is None else BUCKETS[-1] * drafter.rows_per_node
    return -(-(max_length + room) // ROWS) * ROWS


def release_graphs(model: PreTrainedModel | None = None) -> None:
    """Frees the captured graphs and caches of one model, or of all."""
    for one in list(_models) if model is None else [model]:
        one.__dict__.pop(_ATTRIBUTE, _Sessions()).drop_all()
        _models.discard(one)


def _fixed(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a captured step has fixed of its model: where the weights lie, the mode, and the adapters (PEFT) that are on."""
    tensors = tuple((id(x), x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))
    adapters = tuple(
        (id(m), tuple(m.active_adapters), bool(m.disable_adapters), bool(m.merged))  # type: ignore[arg-type]
        for m in model.modules()
        if hasattr(m, "active_adapters") and hasattr(m, "disable_adapters") and hasattr(m, "merged")
    )
    return tensors, adapters, model.training


def _make_room(known: _Sessions, device: torch.device) -> None:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 33
    while known and sum(session.cache.nbytes for session in known.values()) > KEPT_SHARE * memory:
        known.drop_oldest()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device, because cuBLAS keeps a workspace (32 MiB on a Hopper) for each stream. The stream that torch.cuda.graph
    captures on otherwise is of the device of the first capture."""
    return torch.cuda.Stream(device)


class TreeAttention(Kernel):
    """The attention of a verification: the text without a mask, the tree with its own; reads the session's buffers."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __call__(self, call: AttentionCall) -> Tensor:
        s = self.session
        return tree_attention(
            call.query,
            call.key,
            call.value,
            s.shown.mask(call.query.shape[2]),
            s.lengths,
            prefix_start=s.padding,
            window=call.keywords.get("sliding_window"),
            softcap=call.softcap,
            scale=call.scaling,
        )


class Plain(DeviceDrafter):
    """No draft: the tree is the root."""

    parents, num_nodes, max_depth = (-1,), 1, 0

    def advance(self, step: DeviceStep) -> Tensor:
        return step.roots[:, None]


def _advance(drafter: DeviceDrafter, step: DeviceStep) -> Tensor | tuple[Tensor, Tensor]:
    """A function, for `with_own_code`."""
    return drafter.advance(step)


class Trees:
    """The buffers of one bucket's trees."""

    def __init__(
        self, batch: int, nodes: int, device: torch.device, parents: Sequence[int] | None = None, depth: int = DEEPEST
    ) -> None:
        self.tokens = torch.zeros(batch, nodes, dtype=torch.long, device=device)
        self.parents = torch.full((batch, nodes), -1, device=device)
        self.ancestors = torch.eye(nodes, dtype=torch.bool, device=device).repeat(batch, 1, 1)
        self.path_length = min(nodes, depth + 1)
        if parents is not None:
            shape = topology(tuple(parents))
            self.parents[:] = torch.tensor(parents, device=device)
            self.ancestors[:] = shape.ancestors.to(device)
            self.path_length = shape.depth + 1
        self.batch, self.nodes = batch, nodes
        self._appended: dict[int, Tensor] = {}

    def mask(self, rows: int) -> Tensor:
        """Which rows see each other, ``(B, rows, rows)``: the nodes, and what a drafter has appended to them (`DeviceDrafter.joining`,
        with trees of one shape), each row below that of the step before."""
        if rows == self.nodes:
            return self.ancestors
        if rows not in self._appended:
            below = torch.arange(rows - self.nodes, device=self.parents.device).expand(self.batch, -1)
            self._appended[rows] = ancestors_of(torch.cat([self.parents, below], dim=1))
        return self._appended[rows]

    def write(self, tokens: Tensor, parents: Tensor) -> None:
        """Takes trees ``(B, n)`` that a drafter made on the device. Nodes that are not used carry the root's token: what a drafter
        learns from the root, which is always accepted, it learns last."""
        if parents.is_cuda:
            from heedful.decoding.draft_kernels import write_trees

            write_trees(tokens, parents, self.path_length - 1, self.tokens, self.parents, self.ancestors)
            return
        self.tokens.copy_(torch.where(parents >= 0, tokens, tokens[:, :1]))
        self.parents.copy_(parents)
        self.ancestors.copy_(ancestors_of(parents))

    def put(self, trees: Sequence[VerifiedTree | None]) -> None:
        """Uploads the host's trees; nodes past a tree's last one see themselves alone and follow nobody."""
        tokens = torch.zeros(self.batch, self.nodes, dtype=torch.long)
        parents = torch.full((self.batch, self.nodes), -1)
        ancestors = torch.eye(self.nodes, dtype=torch.bool).repeat(self.batch, 1, 1)
        for row, tree in enumerate(trees):
            if tree is not None:
                size = tree.shape.size
                tokens[row, :size] = torch.tensor(tree.tokens)
                parents[row, :size] = tree.shape.parent_tensor
                ancestors[row, :size, :size] = tree.shape.ancestors
        for buffer, value in ((self.tokens, tokens), (self.parents, parents), (self.ancestors, ancestors)):
            buffer.copy_(value.pin_memory() if buffer.is_cuda else value, non_blocking=True)


class Session:
    """Buffers and captured steps for one model, batch size, capacity and way of choosing tokens.

    Args:
        model: the target model.
        batch: rows.
        capacity: rows of the cache.
        drafter: drafts on the device, or None: trees come from the host, or there are none.
        requires, rows_per_node: of the drafter.
        processors: temperature, top-k, top-p and min-p.
        do_sample: draw instead of taking the arg-max.
        compiled: where compiled functions are kept that sessions share; None runs all without torch.compile.
        capture: capture steps as CUDA graphs; False runs the same operations one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        capacity: int,
        *,
        drafter: DeviceDrafter | None,
        requires: frozenset[str],
        rows_per_node: int,
        processors: LogitsProcessorList,
        do_sample: bool,
        compiled: dict[tuple[Any, ...], Callable[..., Any]] | None,
        capture: bool,
    ) -> None:
        self.model, self.batch, self.capacity = model, batch, capacity
        self.drafter, self.requires, self.do_sample = drafter, requires, do_sample
        self.rows_per_node = rows_per_node
        self.processors = processors
        self.compiled, self.capture = compiled, capture
        self.owner: Drafter | None = None  # kept, so that no other drafter gets the id by which this session is known
        self.cache = GraphCache(model, capacity)
        self.device = device = model_device(model)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=device)

        self.lengths, self.positions, self.remaining, self.padding, self.last = (zeros(batch) for _ in range(5))
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.end_tokens = torch.full((_END_TOKENS,), -1, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        # What the model's forward is given as a mask, or as one for each kind of layer: nothing reads it, and it keeps the model
        # from making one.
        none = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=device)
        kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
        self.no_mask: Any = none if kinds is None else dict.fromkeys(kinds, none)
        self.trees: dict[int, Trees] = {}
        self.shown: Trees
        self.steps: dict[int, CapturedStep] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None
        self.first: FirstDraft | None = None
        self.capture_seconds = 0.0
        self.graph_bytes = 0
        self.hidden: list[Tensor] = []
        self._drafting: Callable[..., Any] | None = None
        self.movers: list[RowMover] | None = None

    def _compiled(self, function: Callable[..., Any], *key: Any) -> Callable[..., Any]:
        """The function, compiled if the session compiles: for each key a code object, by which torch.compile keeps what it made."""
        if self.compiled is None:
            return function
        key = (function, self.batch, self.capacity, *key)
        if key not in self.compiled:
            from heedful.decoding import fused_linear

            own = fused_linear.with_own_code(function)
            forward = function is Session._forward
            self.compiled[key] = fused_linear.compile_forward(own) if forward else fused_linear.compile_other(own)
        return self.compiled[key]

    def close(self) -> None:
        """Lets go of the graphs and the cache at once: objects that refer to each other wait for the garbage collector."""
        self.steps.clear()
        self.trees.clear()
        self.movers = self.drafter = self.owner = self._drafting = self.first = None
        self.cache.close()

    def begin(self, engine: GraphEngine) -> None:
        """A generate begins: its numbers go into the buffers."""
        self.remaining.fill_(cast(int, engine.max_length) - engine.prompt_length - 1)
        self.finished[:] = torch.tensor([length is not None for length in engine.stopped], device=self.device)
        self.lengths.fill_(engine.prompt_length)
        self.positions.copy_(torch.tensor(engine.next_position))
        self.last.copy_(self.positions + self.remaining)
        self.padding.copy_(torch.tensor(engine.padding))
        self.end_tokens.copy_(torch.tensor([*engine.stop.eos, *[-1] * (_END_TOKENS - len(engine.stop.eos))]))

    def trees_of(self, nodes: int) -> Trees:
        if nodes not in self.trees:
            drafter = self.drafter
            shape = (None, DEEPEST) if drafter is None else (drafter.parents, drafter.max_depth)
            self.trees[nodes] = Trees(self.batch, nodes, self.device, *shape)
        return self.trees[nodes]

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model(
            input_ids=tokens,
            attention_mask=self.no_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits

    def choose(self, logits: Tensor) -> Tensor:
        """The token chosen after every node, ``(B, n, V)`` to ``(B, n)``.

        A draw for every node is as exact as one for each node of the walk: those the walk does not come to are not used.
        """
        if not self.do_sample:  # of the low precision itself: casting up keeps the order
            if logits.is_cuda and logits.dtype != torch.float64:
                from heedful.decoding.row_argmax import row_argmax

                return row_argmax(logits)
            return logits.argmax(-1)
        scores = logits.flatten(0, 1).float()
        for processor in self.processors:
            scores = processor(cast(LongTensor, None), scores)  # type: ignore[arg-type]
        # Gumbel's trick in the exponential form: one of the draws that torch.multinomial makes, without its checks.
        draw = (scores.softmax(-1) / torch.empty_like(scores).exponential_()).argmax(-1)
        return draw.view(logits.shape[:2])

    def verify(self, trees: Trees) -> tuple[DeviceStep, Tensor]:
        """Forward, walk, commit. Returns the step, and what the host reads, `Settled.report`."""
        self.shown = trees
        nodes = trees.nodes
        places, positions = self._compiled(place, nodes)(
            trees.ancestors, self.lengths, self.positions, self.last, self.capacity, self.rows_per_node
        )
        self.cache.verify_at(places)
        self.hidden.clear()
        logits = self._compiled(Session._forward, nodes, self.requires)(self, trees.tokens, positions)
        settled = self._settle(trees, self.choose(logits))
        if trees.path_length > 1:  # the root is where it belongs
            self._move(settled.sources, settled.targets)
        step = DeviceStep(
            tokens=trees.tokens,
            logits=logits,
            hidden_states=self.hidden[-1] if "hidden_states" in self.requires else None,
            path=settled.path,
            count=settled.count,
            roots=settled.roots,
            lengths=self.lengths,
            positions=self.positions,
            cache=self.cache,
        )
        return step, settled.report

    def _settle(self, trees: Trees, choices: Tensor) -> Settled:
        arguments = (
            trees.tokens, trees.parents, trees.ancestors, choices, trees.path_length,
            self.end_tokens, self.lengths, self.positions, self.remaining, self.finished, self.capacity,
        )  # fmt: skip
        if trees.tokens.is_cuda:
            from heedful.decoding.settle_rows import settle_rows

            return settle_rows(*arguments)
        return self._compiled(settle, trees.nodes, trees.path_length)(*arguments)

    def _move(self, sources: Tensor, targets: Tensor) -> None:
        """Keeps an accepted path: its rows of the cache, right behind the text."""
        if self.device.type != "cuda":
            self.cache.move(self.rows, sources, targets)
            return
        if self.movers is None:
            from heedful.decoding.move_rows import RowMover

            by_shape: dict[torch.Size, list[Tensor]] = {}
            for layer in self.cache.own_layers:
                for states in (cast(Tensor, layer.keys), cast(Tensor, layer.values)):
                    by_shape.setdefault(states.shape, []).append(states)
            self.movers = [RowMover(alike) for alike in by_shape.values()]
        for mover in self.movers:
            mover(sources, targets)

    def draft(self, step: DeviceStep, first: bool = False) -> None:
        """The drafter learns from a step and writes the next trees. ``first``: the step is the prompt's end, of other shapes."""
        assert self.drafter is not None
        trees = self.trees_of(self.drafter.num_nodes)
        advance = _advance
        if self.compiled is not None and not first and not isinstance(self.drafter, Plain):
            advance = self._compiled_advance()
        drafted = advance(self.drafter, step)
        if not isinstance(drafted, tuple):
            trees.tokens.copy_(drafted)
            return
        trees.write(*drafted)

    def _compiled_advance(self) -> Callable[..., Any]:
        """For each session anew: it is the drafter's code. A drafter need not be one graph."""
        if self._drafting is None:
            from heedful.decoding import fused_linear

            self._drafting = fused_linear.compile_other(fused_linear.with_own_code(_advance), fullgraph=False)
        return self._drafting

    @contextmanager
    def capturing(self) -> Iterator[Callable[[torch.cuda.CUDAGraph], torch.cuda.graph]]:
        """Counts the time and memory of what is captured inside; yields what captures into a graph."""
        began = perf_counter()
        torch.cuda.synchronize(self.device)
        held = torch.cuda.memory_reserved(self.device)
        stream = _capture_stream(self.device)
        with _no_collection():
            yield lambda graph: torch.cuda.graph(graph, pool=self.pool, stream=stream)
        self.capture_seconds += perf_counter() - began
        self.graph_bytes += torch.cuda.memory_reserved(self.device) - held

    def step_of(self, nodes: int) -> CapturedStep:
        if nodes not in self.steps:
            self.steps[nodes] = CapturedStep(self, self.trees_of(nodes))
        return self.steps[nodes]


class CapturedStep:
    """One bucket's step: the first two runs are eager (they compile what there is to compile), then it is captured."""

    def __init__(self, session: Session, trees: Trees) -> None:
        self.session, self.trees = session, trees
        self.runs = 0
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.step: DeviceStep
        self.report: Tensor
        cuda = session.device.type == "cuda"
        self.hosts = [
            torch.zeros(session.batch, trees.path_length + 3, dtype=torch.long, pin_memory=cuda) for _ in range(2)
        ]
        self.events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] if cuda else [] for _ in range(2)]

    def launch(self) -> int:
        """Starts one step; returns the slot to `read` it from."""
        session, slot = self.session, self.runs % 2
        events = self.events[slot]
        if events:
            events[0].record()
        if self.graphs:
            self.graphs[0].replay()
        elif session.capture and self.runs >= 2:
            self._capture()
            self.graphs[0].replay()
        else:
            with self._attached():
                self.step, self.report = session.verify(self.trees)
        if events:
            events[1].record()
        if session.drafter is not None:
            if len(self.graphs) > 1:
                self.graphs[1].replay()
            else:
                session.draft(self.step)
        self.hosts[slot].copy_(self.report, non_blocking=True)
        if events:
            events[2].record()
        self.runs += 1
        return slot

    def read(self, slot: int) -> tuple[list[list[int]], float, float]:
        """Waits for a step: its report, row by row; seconds of verify and draft."""
        verify = draft = 0.0
        if events := self.events[slot]:
            events[2].synchronize()
            verify, draft = (events[i].elapsed_time(events[i + 1]) / 1e3 for i in range(2))
        return self.hosts[slot].tolist(), verify, draft

    @contextmanager
    def _attached(self) -> Iterator[None]:
        part = TreeAttention(self.session)
        drafter, model = self.session.drafter, self.session.model
        joining = nullcontext() if drafter is None else drafter.joining(model)
        with attach(model, part), torch.no_grad(), _hidden_states_of(self.session), joining:
            yield

    def _capture(self) -> None:
        session = self.session
        graphs = [torch.cuda.CUDAGraph() for _ in range(1 if session.drafter is None else 2)]
        with session.capturing() as into:
            with self._attached(), into(graphs[0]):
                self.step, self.report = session.verify(self.trees)
            if session.drafter is not None:
                with torch.no_grad(), into(graphs[1]):
                    session.draft(self.step)
        self.graphs = graphs


class FirstDraft:
    """The draft behind a prompt, whose last tokens ``(B, 1)`` are the trees that count as verified: eager the first time, then
    captured, for a beam of several levels takes many launches."""

    def __init__(self, session: Session, logits: Tensor, hidden_states: Tensor | None) -> None:
        self.session = session
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ran = False
        ones = torch.ones(session.batch, dtype=torch.long, device=session.device)
        self.step = DeviceStep(
            tokens=torch.zeros_like(ones)[:, None],
            logits=torch.zeros_like(logits),
            hidden_states=None if hidden_states is None else torch.zeros_like(hidden_states),
            path=torch.zeros_like(ones)[:, None],
            count=ones,
            roots=torch.zeros_like(ones),
            lengths=session.lengths,
            positions=session.positions,
            cache=session.cache,
        )

    @torch.no_grad()
    def __call__(self, tokens: Tensor, logits: Tensor, hidden_states: Tensor | None, roots: Tensor) -> None:
        step, session = self.step, self.session
        step.tokens.copy_(tokens)
        step.logits.copy_(logits)
        step.roots.copy_(roots)
        if step.hidden_states is not None:
            step.hidden_states.copy_(cast(Tensor, hidden_states))
        if self.graph is None and session.capture and self.ran and not isinstance(session.drafter, Plain):
            graph = torch.cuda.CUDAGraph()
            with session.capturing() as into, into(graph):
                session.draft(step, first=True)
            self.graph = graph
        if self.graph is None:
            session.draft(step, first=True)
        else:
            self.graph.replay()
        self.ran = True


def replay_seconds(run: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """Seconds of one replay of what ``run`` launches, captured as a CUDA graph; the shortest of some."""
    graph = torch.cuda.CUDAGraph()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    with torch.cuda.device(device):
        run()  # what is compiled and allocated only once
        torch.cuda.synchronize(device)
        with _no_collection(), torch.cuda.graph(graph, stream=_capture_stream(device)):
            run()
        for _ in range(runs + 1):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
    return best


def verify_seconds(model: PreTrainedModel, sizes: Sequence[int], context: int) -> list[float]:
    """Seconds of a captured verification of so many nodes behind ``context`` tokens, at batch size 1."""
    session = Session(
        model, 1, -(-(context + max(sizes)) // ROWS) * ROWS, drafter=None, requires=frozenset(), rows_per_node=1,
        processors=LogitsProcessorList(), do_sample=False, compiled=None, capture=True,
    )  # fmt: skip
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or session.capacity
    times = []
    with torch.cuda.device(session.device):
        session.lengths.fill_(context)
        session.positions.fill_(min(context, longest - 1))
        session.last.fill_(longest - 1)
        session.finished.fill_(True)  # nothing is accepted, so that every step is the same
        for nodes in sizes:
            step = session.step_of(nodes)
            times.append(min(step.read(step.launch())[1] for _ in range(8)))  # two eager, one that captures, the others
    session.close()
    return times


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector out of a capture, which another graph's end would break. Nothing is collected here: that
    takes a good part of a second in a large program."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _hidden_states_of(session: Session) -> Iterator[None]:
    if "hidden_states" not in session.requires:
        yield
        return
    with _hidden_states(session.model, session.requires, session.hidden):
        yield


class GraphEngine(Engine):
    """`Engine` with the steps of a `Session`. Takes what `unsupported` lets through; batch, padding and drafters alike."""

    def __init__(self, *arguments: Any, compile: bool = False, capture: bool = True, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        drafter = self.drafter
        if drafter is not None:
            with in_graphs() if model_device(self.model).type == "cuda" else nullcontext():
                drafter.begin(self.model, self.batch)
        capacity = capacity_for(cast(int, self.max_length), drafter)
        sampler = tuple((type(p).__name__, repr(sorted(vars(p).items(), key=str))) for p in self.select.processors)
        key = (self.batch, capacity, None if drafter is None else id(drafter), self.config.do_sample, sampler,
               compile, capture, self.model.dtype, model_device(self.model))  # fmt: skip
        known = sessions_of(self.model)
        known.still(_fixed(self.model))
        if key in known:
            known.move_to_end(key)
        else:
            _make_room(known, model_device(self.model))
            known[key] = Session(
                self.model,
                self.batch,
                capacity,
                drafter=self._on_device(capacity),
                requires=self.requires,
                rows_per_node=1 if drafter is None else drafter.rows_per_node,
                processors=copy.deepcopy(self.select.processors),
                do_sample=bool(self.config.do_sample),
                compiled=known.compiled if compile else None,
                capture=capture,
            )
            known[key].owner = drafter
        self.session = known[key]
        self.session.cache.restart()
        self.cache = cast(Any, self.session.cache)

    def _on_device(self, capacity: int) -> DeviceDrafter | None:
        """The drafter for the captured step; None: it has no such form, or trees that must be cut to the room there is."""
        if self.drafter is None:
            return Plain()
        drafter = self.drafter.on_device(self.model, self.batch, capacity)
        return None if drafter is not None and drafter.num_nodes > BUCKETS[-1] else drafter

    def run(self) -> tuple[LongTensor, Any]:
        device = self.session.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # launches and captures go there
            return self._run()

    def _run(self) -> tuple[LongTensor, Any]:
        if self.session.drafter is not None:
            self.session.drafter.begin()
        capturing = self.session.capture_seconds
        with _hidden_states(self.model, self.requires) as hidden:
            started = perf_counter()
            self.read_prompt(hidden)
            self._first_draft(hidden)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.stats.prefill_seconds = perf_counter() - started - (self.session.capture_seconds - capturing)
        if self.session.drafter is not None:
            self._run_ahead()
        else:
            while active := self.active_rows():
                self._step_from_host(active)
        self.stats.capture_seconds = self.session.capture_seconds - capturing
        self.stats.graph_bytes = self.session.graph_bytes + self.session.cache.nbytes
        if self.streamer is not None:
            self.streamer.end()
        self.session.cache.restart()
        return self.finish()

    def prefill_drafter(self, outputs: DraftingOutputs) -> None:
        assert self.drafter is not None
        (self.session.drafter or self.drafter).prefill(self.input_ids, outputs)

    def _first_draft(self, hidden: list[Tensor]) -> None:
        self.session.begin(self)
        if self.session.drafter is None:
            return
        logits, states = self.last_logits[:, None], hidden[-1][:, -1:] if hidden else None
        if self.session.first is None:
            self.session.first = FirstDraft(self.session, logits, states)
        self.session.first(self.input_ids[:, -1:], logits, states, self.roots())

    def _run_ahead(self) -> None:
        """Without a host in the loop: the next step starts before the last one is read."""
        session = self.session
        step = session.step_of(cast(DeviceDrafter, session.drafter).num_nodes)
        waiting: list[int] = []
        clock = perf_counter()
        while self.active_rows():
            waiting.append(step.launch())
            if len(waiting) == 2 or not session.capture:
                clock = self._take(step, waiting.pop(0), None, clock)
        for slot in waiting:  # a step too many, in which nothing happened
            step.read(slot)

    def _step_from_host(self, active: list[int]) -> None:
        began = perf_counter()
        trees = [self._fit(tree) for tree in self.draft(active)]
        nodes = max(tree.shape.size for tree in trees if tree is not None)
        step = self.session.step_of(next(bucket for bucket in BUCKETS if bucket >= nodes))
        step.trees.put(trees)
        slot = step.launch()
        self._take(step, slot, trees, began)

    @staticmethod
    def _fit(tree: VerifiedTree | None) -> VerifiedTree | None:
        return None if tree is None else tree.limit(DEEPEST, BUCKETS[-1])

    def _take(self, step: CapturedStep, slot: int, trees: Sequence[VerifiedTree | None] | None, began: float) -> float:
        """Reads a step and hands its tokens on; returns the time."""
        asked = perf_counter()
        rows, verify, draft = step.read(slot)
        came = perf_counter()
        paths: list[list[int]] = []
        for row, (*emitted, depth, count, _) in enumerate(rows):
            if self.stopped[row] is not None:
                paths.append([])
                continue
            for token in emitted[:count]:
                self.emit(row, token)
            length = len(self.tokens[row])
            self.cached[row] += count
            if self.stop.simple(self.tokens[row][-1], length):
                self.stopped[row] = length
            self.emitted[row].append(count)
            path = [0] * count
            if trees is not None and (tree := trees[row]) is not None:
                path = self._nodes(tree, emitted[:count])
                self._count(tree, path)
            else:
                self._count_depth(depth, count)
            paths.append(path)
        if trees is not None and self.learns and self.drafter is not None:
            self.drafter.update(
                [None if tree is None else tree.source for tree in trees],
                DraftingOutputs(
                    logits=step.step.logits if "logits" in self.requires else None,
                    hidden_states=step.step.hidden_states,
                    cache=self.cache if "cache" in self.requires else None,
                ),
                paths,
                self.roots(),
            )
        done = perf_counter()
        self.stats.steps += 1
        if verify == 0.0:
            verify = came - asked
        self.stats.verify_seconds += verify
        if trees is None:
            self.stats.draft_seconds += draft
            self.stats.commit_seconds += max(0.0, done - began - verify - draft)
        else:  # the host drafts
            self.stats.draft_seconds += max(0.0, done - began - verify)
        return done

    @staticmethod
    def _nodes(tree: VerifiedTree, emitted: list[int]) -> list[int]:
        """The nodes along which the tokens were emitted."""
        path = [0]
        for token in emitted[:-1]:
            child = tree.child(path[-1], token)
            assert child is not None
            path.append(child)
        return path

    def _count_depth(self, depth: int, count: int) -> None:
        missing = max(0, depth - len(self.offered))
        self.offered += [0] * missing
        self.reached += [0] * missing
        for level in range(depth):
            self.offered[level] += 1
            self.reached[level] += level < count - 1
