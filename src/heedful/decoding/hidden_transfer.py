"""Hidden Transfer: the guess is made in the middle of the network, and the layers above refine it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from heedful.decoding.drafter import DeviceDrafter, DeviceStep, DraftingOutputs
from heedful.decoding.graph import BUCKETS
from heedful.decoding.medusa import MC_SIM_7B_63
from heedful.decoding.sizing import forward_costs, seconds_of
from heedful.decoding.support import model_device
from heedful.decoding.trained import (
    RANKS,
    RankDrafter,
    best_tree,
    ends_of,
    mean_where,
    model_logits,
    rank_accuracies,
)
from heedful.decoding.tree import DraftTree
from heedful.seam import AttentionCall, Kernel, Verification, attach

_BLOCK = 128  # anchors whose attention is worked out at once in training


class HiddenTransfer(RankDrafter):
    """Drafts with pseudo hidden states: linear maps of a token's state in the middle of the model, refined by the layers above.

    Step i maps the state of token n that enters layer ``transfer_layers[i - 1]`` to a pseudo state at position n + i. From
    there on it is one more row of the forward: it attends to the tokens up to n and to the pseudo states of steps 1 to i of
    the same token, and leaves through the model's own norm and output head as the draft for token n + i + 1. In a verification
    every node of the tree spawns its pseudo states, so the accepted node's draft is there after the same forward. Real rows
    never see pseudo rows, and the cache never keeps them.

    Example:
        >>> import heedful
        >>> from heedful.decoding import HiddenTransfer
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> drafter = HiddenTransfer.from_pretrained(heedful.zoo.path("classics-20m-hidden-transfer"))
        >>> ids = tokenizer("It was the best of times,", return_tensors="pt").input_ids
        >>> result = heedful.generate(model, ids, drafter, max_new_tokens=64, do_sample=False)

    Args:
        hidden_size: H of the target.
        num_hidden_layers: L of the target.
        num_transfer_steps: k. Default 3.
        transfer_layers: for each step the layer whose input is mapped, 0 (the embedding) to L (after the last layer), never
            falling. Default None: L/2 and two layers higher up, L/8 apart.
        source: "anchor": every step maps the real token's state; "previous": step i maps the pseudo state of step i - 1.
        share_projection: one matrix for all steps. bias: with a bias. norm: an RMS norm in front of the map.
        tree: nodes as paths of ranks, at most k deep; None: the first 24 nodes of Medusa's default tree.
        accuracies: ``[step][rank]``, as `calibrate` measured them; kept with the drafter.
        max_nodes: nodes drafted a step at most; ``"auto"`` as for `Medusa`. Default ``"auto"``.

    Raises:
        ValueError: arguments that contradict each other; a target of other sizes, without decoder layers in ``layers``, or with
            attached parts (they would read the pseudo rows).

    Cost:
        ``k H (H + 1)`` parameters. A verification of n rows runs ``n (1 + live steps)`` rows in the layers from the first
        transfer on.

    When not to use:
        Where rows are not nearly free: a tree of 25 nodes is 100 rows in the upper layers. With ``compile=True``, which is
        refused.

    Paper:
        "Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration", Wu, Liu, Gong, Wang, Li, Wang,
        Cai, Zhao, arXiv 2404.12022. There is no public code; what the abstract leaves open (source, sharing, bias, norm, layers)
        are arguments.
    """

    joins_forward = True

    def __init__(
        self,
        hidden_size: int,
        num_hidden_layers: int,
        num_transfer_steps: int = 3,
        transfer_layers: list[int] | None = None,
        source: str = "anchor",
        share_projection: bool = False,
        bias: bool = True,
        norm: bool = False,
        tree: list[list[int]] | None = None,
        accuracies: list[list[float]] | None = None,
        max_nodes: int | str = "auto",
    ) -> None:
        super().__init__()
        if source not in ("anchor", "previous"):
            raise ValueError(f"source must be 'anchor' or 'previous', got {source!r}")
        if num_transfer_steps < 0:
            raise ValueError(f"num_transfer_steps must be at least 0, got {num_transfer_steps}")
        if transfer_layers is None:
            apart = max(1, num_hidden_layers // 8)
            transfer_layers = [
                min(num_hidden_layers, num_hidden_layers // 2 + i * apart) for i in range(num_transfer_steps)
            ]
        layers = tuple(transfer_layers)
        if len(layers) != num_transfer_steps or list(layers) != sorted(layers):
            raise ValueError(f"transfer_layers needs {num_transfer_steps} layers that never fall, got {list(layers)}")
        if layers and not 0 <= layers[0] <= layers[-1] <= num_hidden_layers:
            raise ValueError(f"transfer_layers lie between 0 and {num_hidden_layers}, got {list(layers)}")
        self.hidden_size, self.num_hidden_layers, self.num_transfer_steps = (
            hidden_size,
            num_hidden_layers,
            num_transfer_steps,
        )
        self.transfer_layers, self.source = layers, source
        self.requires = frozenset()
        maps = [
            nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(1 if share_projection else num_transfer_steps)
        ]
        self.maps = nn.ModuleList(maps[: max(0, num_transfer_steps)])
        for map_ in self.maps:
            nn.init.eye_(cast(nn.Linear, map_).weight)
            if bias:
                nn.init.zeros_(cast(nn.Linear, map_).bias)
        self.norm = nn.RMSNorm(hidden_size) if norm else nn.Identity()
        default = [path for path in MC_SIM_7B_63 if len(path) <= num_transfer_steps][:24] if tree is None else tree
        self._start(num_transfer_steps, default, accuracies, max_nodes)
        self.hard_labels = False

    @classmethod
    def for_model(cls, model: PreTrainedModel, **options: Any) -> HiddenTransfer:
        """Identity maps for a model. ``options``: as for the constructor."""
        text = model.config.get_text_config(decoder=True)
        _layers(model)
        drafter = cls(hidden_size=text.hidden_size, num_hidden_layers=text.num_hidden_layers, **options)
        return drafter.to(model_device(model))

    def sizes(self, model: PreTrainedModel) -> dict[str, int]:
        text = model.config.get_text_config(decoder=True)
        return {"hidden_size": text.hidden_size, "num_hidden_layers": text.num_hidden_layers}

    def step_seconds(self, model: PreTrainedModel, batch_size: int, nodes: int) -> Sequence[float]:
        live, lower = len(self.transfer_layers), self.transfer_layers[0] / self.num_hidden_layers
        costs = forward_costs(model, batch_size, (nodes + 1) * (1 + live))
        upper = costs[live :: 1 + live]  # every node brings its pseudo rows
        pseudo = torch.zeros(
            batch_size, self.num_transfer_steps, self.hidden_size, device=model_device(model), dtype=model.dtype
        )
        draft = seconds_of(lambda: self.best(pseudo), pseudo.device)
        return [costs[0], *(lower * costs[1 : nodes + 1] + (1 - lower) * upper[1 : nodes + 1] + draft)]

    def transfer(self, step: int, state: Tensor) -> Tensor:
        """The pseudo states of a step (from 0) for states ``(..., H)``."""
        map_ = self.maps[min(step, len(self.maps) - 1)]
        return map_(self.norm(state).to(cast(nn.Linear, map_).weight.dtype)).to(state.dtype)

    # The verification's forward ---------------------------------------------------------------------------------------------

    @property
    def rows_per_node(self) -> int:  # type: ignore[override]
        return 1 + self.num_transfer_steps if len(self.tree) <= BUCKETS[-1] else 1

    @contextmanager
    def joining(self, model: PreTrainedModel) -> Iterator[None]:
        if not self.drafted.paths:
            yield
            return
        with self.pseudo_rows(model) as run:
            yield
        self._pseudo = run.pseudo

    @contextmanager
    def pseudo_rows(self, model: PreTrainedModel, masks: bool = True) -> Iterator[_Joined]:
        """Around one forward of n rows: pseudo rows are appended in the chosen layers and taken off before the final norm.

        Appended rows are ordered by step, then by anchor; their keys come behind those of the real rows.

        Args:
            model: the target.
            masks: extend the forward's masks to them; False where the attention knows of them (`DeviceDrafter.joining`).
        """
        decoder, layers = model.get_decoder(), _layers(model)
        run = _Joined(self, masks)
        with ExitStack() as hooks:
            rotations = hooks.enter_context(_Rotations(decoder))
            for index, layer in enumerate(layers):
                if self.transfer_layers and index >= self.transfer_layers[0]:
                    handle = layer.register_forward_pre_hook(run.before_layer(index, rotations), with_kwargs=True)
                    hooks.callback(handle.remove)
            handle = decoder.norm.register_forward_pre_hook(run.before_norm)
            hooks.callback(handle.remove)
            yield run

    def read_out(self, pseudo: Tensor) -> Tensor:
        """Logits ``(..., V)`` of last-layer pseudo states, by the model's own norm and head."""
        hidden = self.target.get_decoder().norm(pseudo)
        head = self.target.get_output_embeddings()
        return head(hidden)  # caps and scales of a model's logits keep their order

    # Drafter ------------------------------------------------------------------------------------------------------------

    def begin(self, model: PreTrainedModel, batch_size: int) -> None:
        self.bind(model)
        _layers(model)
        if Verification(model).attached:
            raise ValueError(
                "HiddenTransfer adds rows to the model's forward, which attached parts would take for tokens; detach them, or use another drafter"
            )
        self.fit(model, batch_size)
        self._candidates = None

    @torch.no_grad()
    def update(
        self,
        trees: list[DraftTree | None],
        outputs: DraftingOutputs,
        paths: list[list[int]],
        new_roots: LongTensor,
    ) -> None:
        if not self.drafted.paths:
            return
        rows, last = ends_of(paths, self._pseudo.device)
        self._candidates = self.best(self._pseudo[rows, :, last]).cpu()

    def on_device(self, model: PreTrainedModel, batch_size: int, capacity: int) -> DeviceDrafter:
        return _TransfersOnDevice(self)

    def best(self, pseudo: Tensor) -> Tensor:
        """The candidates ``(..., ranks)``, best first, of last-layer pseudo states ``(..., H)``."""
        logits = self.read_out(pseudo)[..., : self.target.config.get_text_config(decoder=True).vocab_size]
        return logits.topk(min(RANKS, logits.shape[-1]), dim=-1).indices

    # Training -------------------------------------------------------------------------------------------------------------

    def loss(
        self, model: PreTrainedModel, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Divergence of each step's distribution from the model's own, given the true tokens (or, with ``hard_labels``,
        cross-entropy of the text); summed over the steps."""
        pseudo, hidden = self.pseudo_states(model, input_ids)
        norm = model.get_decoder().norm
        total: Tensor = hidden.new_zeros((), dtype=torch.float32)
        figures: dict[str, Tensor] = {}
        labels = input_ids if labels is None else labels
        with torch.no_grad():
            teacher = model_logits(model, hidden)
        for step in range(1, self.num_transfer_steps + 1):
            logits = model_logits(model, norm(pseudo[:, step - 1, : -step - 1])).float()
            wanted, learnt = teacher[:, step:-1].float(), labels[:, step + 1 :]
            if self.hard_labels:
                losses = F.cross_entropy(logits.transpose(1, 2), learnt, reduction="none")
            else:
                losses = F.kl_div(
                    logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
                ).sum(-1)
            loss = mean_where(losses, learnt)
            total = total + loss
            with torch.no_grad():
                figures[f"step_{step}_loss"] = loss.detach()
                figures[f"step_{step}_agreement"] = mean_where((logits.argmax(-1) == wanted.argmax(-1)).float(), learnt)
        return total, figures

    def pseudo_states(self, model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Last-layer pseudo states ``(B, k, T, H)`` of every token at once, and the real hidden states after the final norm.

        The real rows run once, without gradient; the pseudo rows then run through the model's own upper layers, whose attention
        is handed the real rows' keys and values: row (n, i) reads keys 0..n and the pseudo keys (n, 1..i).
        """
        decoder, layers = model.get_decoder(), _layers(model)
        batch, length = input_ids.shape
        inputs: dict[int, tuple[Tensor, dict[str, Any]]] = {}

        def note(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs[index] = (args[0] if args else kwargs["hidden_states"], kwargs)

            return hook

        positions = torch.arange(length, device=input_ids.device)[None].expand(batch, -1)
        with ExitStack() as hooks, torch.no_grad():
            rotations = hooks.enter_context(_Rotations(decoder))
            for index, layer in enumerate(layers):
                hooks.callback(layer.register_forward_pre_hook(note(index), with_kwargs=True).remove)
            ends: list[Tensor] = []
            hooks.callback(decoder.norm.register_forward_pre_hook(lambda m, a: ends.append(a[0])).remove)
            cache = DynamicCache()
            hidden = decoder(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=positions,
                past_key_values=cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
        pseudo: Tensor | None = None
        kernel = _PseudoAttention(cache, length)
        with (
            attach(model, kernel, layers=range(self.transfer_layers[0], len(layers))) if self._refines else ExitStack()
        ):
            for index in range(self.transfer_layers[0] if self.transfer_layers else len(layers), len(layers) + 1):
                state = (ends[0] if index == len(layers) else inputs[index][0]).detach()
                for step, at in enumerate(self.transfer_layers):
                    if at == index:
                        source = state if self.source == "anchor" or pseudo is None else pseudo[:, -1]
                        new = self.transfer(step, source)[:, None]
                        pseudo = new if pseudo is None else torch.cat([pseudo, new], dim=1)
                if index == len(layers):
                    break
                assert pseudo is not None
                steps = pseudo.shape[1]
                ahead = torch.arange(1, steps + 1, device=positions.device)[None, :, None]
                moved = (positions[:, None] + ahead).flatten(1)
                kwargs = {
                    k: v
                    for k, v in inputs[index][1].items()
                    if k not in ("hidden_states", "past_key_values", "past_key_value")
                }
                kwargs |= {"attention_mask": None, "position_ids": moved, "use_cache": False}
                if kwargs.get("position_embeddings") is not None:
                    kwargs["position_embeddings"] = rotations.moved(kwargs["position_embeddings"], moved)
                out = layers[index](pseudo.flatten(1, 2), **kwargs)
                out = out[0] if isinstance(out, tuple) else out
                pseudo = out.view(batch, steps, length, -1)
        assert pseudo is not None
        return pseudo, hidden

    @property
    def _refines(self) -> bool:
        return bool(self.transfer_layers) and self.transfer_layers[0] < self.num_hidden_layers

    @torch.no_grad()
    def calibrate(
        self, model: PreTrainedModel, rows: Tensor, max_nodes: int = 24, prompt: int = 0
    ) -> list[list[float]]:
        """Builds the sparse tree from accuracies measured on the model's own text ``(N, T)``, in place; returns them.

        ``prompt``: tokens at the beginning of each row that the model did not choose, and that are not counted."""
        self.bind(model)
        found, chosen = [], []
        for batch in rows.to(model_device(model)).split(8):
            pseudo, hidden = self.pseudo_states(model, batch)
            found.append(self.best(pseudo.transpose(1, 2)))
            chosen.append(model_logits(model, hidden).argmax(-1))
        accuracies, _ = rank_accuracies(torch.cat(found), torch.cat(chosen), prompt=prompt)
        self.set_tree(best_tree(accuracies, max_nodes), accuracies)
        return accuracies


class _TransfersOnDevice(DeviceDrafter):
    """The same in the captured step. The prompt's forward spawns nothing: the first draft repeats the root."""

    def __init__(self, drafter: HiddenTransfer) -> None:
        self.drafter, self.tree = drafter, drafter.drafted
        self.parents, self.num_nodes, self.max_depth = self.tree.parents, len(self.tree), self.tree.depth
        self.tree.places = self.tree.places.to(model_device(drafter.target))
        self.pseudo: Tensor

    @contextmanager
    def joining(self, model: PreTrainedModel) -> Iterator[None]:
        if not self.tree.paths:
            yield
            return
        with self.drafter.pseudo_rows(model, masks=False) as run:
            yield
        self.pseudo = run.pseudo

    def advance(self, step: DeviceStep) -> Tensor:
        if step.tokens.shape[1] < self.num_nodes or not self.tree.paths:
            return step.roots[:, None].expand(-1, self.num_nodes)
        last = step.path.gather(1, step.count[:, None] - 1)[:, None, :, None]
        pseudo = self.pseudo.gather(2, last.expand(-1, self.pseudo.shape[1], -1, self.pseudo.shape[3]))[:, :, 0]
        return self.tree.fill(step.roots, self.drafter.best(pseudo))


class _Joined:
    """One forward with pseudo rows: what the hooks share."""

    def __init__(self, drafter: HiddenTransfer, masks: bool) -> None:
        self.drafter, self.extends_masks = drafter, masks
        self.nodes: int | None = None
        self.live = 0
        self.pseudo: Tensor
        self.windows = _windows(drafter.target)
        self.masks: dict[tuple[int, int, int | None], Tensor] = {}

    def _append(self, index: int, hidden: Tensor) -> Tensor:
        if self.nodes is None:
            self.nodes = hidden.shape[1]
        for step, at in enumerate(self.drafter.transfer_layers):
            if at == index:
                last = self.drafter.source == "anchor" or self.live == 0
                source = hidden[:, : self.nodes] if last else hidden[:, -self.nodes :]
                hidden = torch.cat([hidden, self.drafter.transfer(step, source)], dim=1)
                self.live += 1
        return hidden

    def before_layer(self, index: int, rotations: _Rotations) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kwargs = dict(kwargs)
            hidden = self._append(index, args[0] if args else kwargs.pop("hidden_states"))
            nodes, live = cast(int, self.nodes), self.live
            if self.extends_masks:
                cache: Any = kwargs.get("past_key_values", kwargs.get("past_key_value"))
                keys = cache.get_seq_length(index) + nodes
                kwargs["attention_mask"] = self.mask(kwargs.get("attention_mask"), hidden, keys, self.windows[index])
            positions = kwargs.get("position_ids")
            if positions is not None:
                ahead = torch.arange(live + 1, device=positions.device)[:, None]
                moved = (positions[:, None] + ahead).flatten(1).expand(hidden.shape[0], -1)
                kwargs["position_ids"] = moved
                if kwargs.get("position_embeddings") is not None:
                    kwargs["position_embeddings"] = rotations.moved(kwargs["position_embeddings"], moved)
            return (hidden, *args[1:]), kwargs

        return hook

    def mask(self, base: Tensor | None, hidden: Tensor, keys: int, window: int | None) -> Tensor:
        """The additive mask of n real rows and their pseudo rows: a pseudo row sees what its anchor sees, and its own steps.

        In a layer with a window a pseudo row of step i is i positions further on, so that the i keys furthest back go.
        """
        place = (id(base), self.live, window)
        if place not in self.masks:
            nodes, live, hide = cast(int, self.nodes), self.live, torch.finfo(hidden.dtype).min
            if base is None:
                base = hidden.new_zeros((hidden.shape[0], 1, nodes, keys))
            elif base.dtype == torch.bool:
                base = torch.zeros_like(base, dtype=hidden.dtype).masked_fill(~base, hide)
            step = torch.arange(live, device=hidden.device)
            own = step[None, :] <= step[:, None]
            left = [base]
            if window is None:
                left += [base] * live
            else:
                own = own & (step[None, :] > step[:, None] - window)
                # What an anchor sees lies in the columns by rising position, so its n-th visible column is the n-th in place.
                order = (base == 0).cumsum(-1)
                visible = order[..., -1:]
                left += [base.masked_fill(order <= visible - (window - 1 - i), hide) for i in range(live)]
            own = torch.kron(own.float(), torch.eye(nodes, device=hidden.device)) > 0
            right = torch.cat([torch.zeros_like(own[:nodes]), own])
            right_mask = torch.zeros(right.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~right, hide)
            rows = torch.cat(left, dim=2)
            self.masks[place] = torch.cat([rows, right_mask.expand(*rows.shape[:2], -1, -1)], dim=-1)
        return self.masks[place]

    def before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = self._append(self.drafter.num_hidden_layers, args[0])
        nodes = cast(int, self.nodes)
        self.pseudo = hidden[:, nodes:].unflatten(1, (self.live, nodes)) if self.live else hidden[:, :0]
        return (hidden[:, :nodes], *args[1:])


class _Rotations:
    """Remembers which rotary module made which (cos, sin), to make them again for other positions."""

    def __init__(self, decoder: nn.Module) -> None:
        self.modules = [module for name, module in decoder.named_modules() if "rotary_emb" in name.rpartition(".")[2]]
        self.made: dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = {}
        self.again: dict[tuple[int, int], Any] = {}

    def __enter__(self) -> _Rotations:
        self.handles = [module.register_forward_hook(self._note, with_kwargs=True) for module in self.modules]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.made[id(output[0])] = (module, args, kwargs, output)

    def moved(self, embeddings: Any, positions: Tensor) -> Any:
        """The same module's (cos, sin) at ``positions``."""
        place = (id(embeddings[0]), positions.shape[1])
        if place not in self.again:
            module, args, kwargs, _ = self.made[id(embeddings[0])]
            if "position_ids" in kwargs:
                self.again[place] = module.forward(*args, **(kwargs | {"position_ids": positions}))
            else:
                self.again[place] = module.forward(args[0], positions, *args[2:], **kwargs)
        return self.again[place]


class _PseudoAttention(Kernel):
    """Training: the rows of a call are pseudo rows, step by step; keys and values of the real rows come from the cache."""

    def __init__(self, cache: DynamicCache, length: int) -> None:
        super().__init__()
        self.cache, self.length = cache, length

    def __call__(self, call: AttentionCall) -> Tensor:
        memory: Any = self.cache.layers[call.module.layer_idx]  # type: ignore[index]
        batch, heads, rows, dim = call.query.shape
        steps, length = rows // self.length, self.length
        if memory.keys.shape[1:2] + memory.keys.shape[3:] != call.key.shape[1:2] + call.key.shape[3:]:
            raise ValueError(
                f"HiddenTransfer is trained against keys in the cache as they are attended to, and {type(call.module).__name__} "
                f"keeps them compressed; use Medusa instead"
            )
        query = call.query.view(batch, -1, call.groups, steps, length, dim)
        keys, values = cast(Tensor, memory.keys).to(query.dtype), cast(Tensor, memory.values).to(query.dtype)
        own_keys, own_values = (x.view(batch, -1, steps, length, x.shape[-1]) for x in (call.key, call.value))
        window = call.keywords.get("sliding_window")
        out = []
        for start in range(0, length, _BLOCK):  # blocks of anchors: no scores of all rows with all keys are ever there
            block = slice(start, start + _BLOCK)
            arguments = (
                query[:, :, :, :, block], keys[:, :, : start + _BLOCK], values[:, :, : start + _BLOCK],
                own_keys[:, :, :, block], own_values[:, :, :, block], start, call.scaling, call.softcap, window, call.sinks,
            )  # fmt: skip
            if torch.is_grad_enabled() and query.requires_grad:
                out.append(cast(Tensor, checkpoint(_attend, *arguments, use_reentrant=False)))
            else:
                out.append(_attend(*arguments))
        return torch.cat(out, dim=4).reshape(batch, heads, rows, -1)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, start: int, scaling: float,
    softcap: float | None, window: int | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of the pseudo rows ``(B, Hkv, G, steps, n, D)`` of anchors ``start`` to ``start + n - 1``.

    Keys and values ``(B, Hkv, m, D)`` of the real rows, ``(B, Hkv, steps, n, D)`` of the pseudo rows (values may have
    another D: latent attention). The row of step s
    (from 0) stands at position anchor + s + 1, and windows are counted from there.
    """
    steps, count = query.shape[3], query.shape[4]
    real = torch.einsum("bhgsnd,bhmd->bhgsnm", query, keys) * scaling
    own = torch.einsum("bhgsnd,bhtnd->bhgsnt", query, own_keys) * scaling
    if softcap is not None:
        real, own = (softcap * torch.tanh(x / softcap) for x in (real, own))
    anchor = torch.arange(start, start + count, device=query.device)[:, None]
    step = torch.arange(steps, device=query.device)
    key = torch.arange(keys.shape[2], device=query.device)
    seen = (key <= anchor).expand(steps, -1, -1)
    own_seen = step[None, :] <= step[:, None]
    if window is not None:
        seen = seen & (key > anchor + step[:, None, None] + 1 - window)
        own_seen = own_seen & (step[None, :] > step[:, None] - window)
    scores = torch.cat([real.masked_fill(~seen, -torch.inf), own.masked_fill(~own_seen[:, None], -torch.inf)], dim=-1)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    weights = scores.softmax(-1)
    if sinks is not None:  # one more logit in the sum, without a value
        share = torch.sigmoid(scores.logsumexp(-1) - sinks.to(scores.dtype).view(*query.shape[1:3], 1, 1))
        weights = weights * share[..., None]
    weights = weights.to(values.dtype)
    out = torch.einsum("bhgsnm,bhmd->bhgsnd", weights[..., : keys.shape[2]], values)
    return out + torch.einsum("bhgsnt,bhtnd->bhgsnd", weights[..., keys.shape[2] :], own_values)


def _windows(model: PreTrainedModel) -> list[int | None]:
    """The window of each layer, None where a layer has none."""
    text = model.config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None or not hasattr(decoder, "norm"):
        raise ValueError(
            f"HiddenTransfer looks for decoder layers in `layers` and a final `norm`, which {type(model).__name__} does not have; "
            f"use Medusa instead"
        )
    return cast(Sequence[nn.Module], layers)
