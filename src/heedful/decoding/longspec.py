"""LongSpec: one small transformer block that reads the target's own key-value cache drafts a beam tree."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from heedful.attention import tree_attention
from heedful.decoding.cache import GraphCache, put_rows
from heedful.decoding.drafter import DeviceDrafter, DeviceStep, DraftingOutputs
from heedful.decoding.sizing import forward_costs, seconds_of, setting
from heedful.decoding.support import model_device
from heedful.decoding.trained import TrainedDrafter, mean_where, output_weight
from heedful.decoding.tree import DraftTree

#: The longest text for which training moves positions apart, and how far.
ANCHORED_LENGTH, LARGEST_OFFSET, MOST_ANCHORS, MOST_LAG = 1200, 30_000, 4, 4
#: Shapes of trees that `LongSpec.calibrate` measures, from a chain to the paper's.
SHAPES = ((1, 1), (1, 1, 1, 1), (2, 4), (4, 8, 8, 8), (4, 16, 16, 16, 16))
_ALONE = torch.tensor([-1])


class LongSpec(TrainedDrafter):
    """Drafts with one transformer block: its own attention over the last 512 tokens, and cross-attention to the target's cache.

    The block embeds tokens with the target's embedding, attends to its own keys within a window, then to the keys and values
    that the target's last full-attention layer has cached, and ends in the target's output head (without a final norm). Its own
    keys and values depend on token ids and positions alone, so they live in memory of constant size and need no roll-back.
    A draft is a beam tree: each level keeps the nodes with the largest cumulative log-probability.

    While it drafts, the target's cache stops before the root: a node of depth j sees the target's keys with a lag of j + 1.
    Training imitates this with random lags.

    Example:
        >>> import heedful
        >>> from heedful.decoding import LongSpec
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> drafter = LongSpec.from_pretrained(heedful.zoo.path("classics-20m-longspec"))
        >>> ids = tokenizer("It was the best of times,", return_tensors="pt").input_ids
        >>> result = heedful.generate(model, ids, drafter, max_new_tokens=64, do_sample=False)

    Args:
        hidden_size, num_attention_heads, num_key_value_heads, head_dim, intermediate_size: as the target has them.
        attention_bias: biases of query, key and value (the target's convention). Default False.
        rms_norm_eps: of the norms. Default 1e-5.
        initializer_range: standard deviation of the initial weights. Default 0.02.
        window: tokens that the block's own attention reaches back. Default 512.
        tree_shape: nodes of each level. Default (4, 16, 16, 16, 16): 68 nodes; ``(1, 1, 1, 1)`` is a greedy chain.
        measured: shapes, each with the tokens a step that `calibrate` counted for it; kept with the drafter.
        fit_device: where shapes were measured, draft with the one that promises most tokens per second on this device (it times
            the model's forward and a draft once), on a slow one perhaps with none. False: always ``tree_shape``. Default True.

    Raises:
        ValueError: for a target of other sizes, or one whose cached keys are not rotated over the whole head (partial rotary,
            other rotations, ALiBi, latent attention), when it is bound to it.

    Cost:
        One block of the target's width (1.9 M parameters at H = 384); a draft is as many forwards of it as the tree has
        levels, one after the other, and reads one layer of the target's cache in each. Its own keys and values take
        ``2 Hkv D (2 window + nodes)`` numbers a row, however long the context is.

    When not to use:
        Where the target is so small that five forwards of one block are not cheap beside it.

    Paper:
        "LongSpec: Long-Context Lossless Speculative Decoding with Efficient Drafting and Verification", Yang, Du, Zhang, Wang,
        Pang, Du, An, arXiv 2502.17421. Where we differ from the released code: memory is really constant; windows
        count along a node's own path; sampling is exact; all layers' accepted rows are moved instead of computed again.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        intermediate_size: int,
        attention_bias: bool = False,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        window: int = 512,
        tree_shape: list[int] | tuple[int, ...] = (4, 16, 16, 16, 16),
        measured: list[tuple[list[int], float]] | None = None,
        fit_device: bool = True,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in tree_shape):
            raise ValueError(f"tree_shape: every level has at least one node, got {tuple(tree_shape)}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.window, self.tree_shape = window, tuple(tree_shape)
        self.measured, self.fit_device = measured, fit_device
        self._fitted: tuple[Any, ...] = ()
        self.requires = frozenset({"cache"})
        queries, keys = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.RMSNorm(hidden_size, eps=rms_norm_eps) for _ in range(3))
        self.q_proj = nn.Linear(hidden_size, queries, bias=attention_bias)
        self.k_proj = nn.Linear(hidden_size, keys, bias=attention_bias)
        self.v_proj = nn.Linear(hidden_size, keys, bias=attention_bias)
        self.o_proj = nn.Linear(queries, hidden_size, bias=False)
        self.cross_q_proj = nn.Linear(hidden_size, queries, bias=attention_bias)
        self.cross_o_proj = nn.Linear(queries, hidden_size, bias=False)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        #: What training draws: lags from 1 to ``most_lag``, and offsets up to ``largest_offset`` (0: positions stay).
        self.most_lag, self.largest_offset = MOST_LAG, LARGEST_OFFSET
        self._state: _State | None = None
        self._cache: Cache | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, **options: Any) -> LongSpec:
        """An untrained block with the sizes of a model. ``options``: as for the constructor."""
        text = model.config.get_text_config(decoder=True)
        _check_rotation(model)
        attention = _attention(model)
        sizes = {name: getattr(text, name) for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
        sizes["num_key_value_heads"] = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        sizes["head_dim"] = _head_dim(text)
        bias = getattr(getattr(attention, "q_proj", None), "bias", None) is not None
        defaults = {"attention_bias": bias, "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-5)}
        defaults["initializer_range"] = getattr(text, "initializer_range", 0.02)
        return cls(**(sizes | defaults | options)).to(model_device(model))

    def sizes(self, model: PreTrainedModel) -> dict[str, int]:
        text = model.config.get_text_config(decoder=True)
        return {
            "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            "head_dim": _head_dim(text),
        }

    def bind(self, model: PreTrainedModel) -> None:
        if getattr(self, "_target", None) != (model,):  # looks at numbers: not in every generate
            _check_rotation(model)
        super().bind(model)
        self.layer = _memory_layer(model)

    # The block ----------------------------------------------------------------------------------------------------------

    def keys_values(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The normed input, and rotated keys and values ``(B, Hkv, T, D)`` of embedded tokens ``(B, T, H)``."""
        normed = self.self_norm(x)
        keys, values = (_heads(projected, self.head_dim) for projected in (self.k_proj(normed), self.v_proj(normed)))
        return normed, _rotate(keys, rotation), values

    def own_query(self, normed: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return _rotate(_heads(self.q_proj(normed), self.head_dim), rotation)

    def after_own(self, x: Tensor, read: Tensor) -> Tensor:
        """``x`` plus what the block's own attention read ``(B, Hq, T, D)``."""
        return x + self.o_proj(read.transpose(1, 2).flatten(2))

    def cross_query(self, h: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return _rotate(_heads(self.cross_q_proj(self.cross_norm(h)), self.head_dim), rotation)

    def finish(self, h: Tensor, read: Tensor) -> Tensor:
        """``h`` plus what the cross-attention read ``(B, Hq, T, D)``, then the MLP."""
        h = h + self.cross_o_proj(read.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(h)
        return h + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))

    # Training -------------------------------------------------------------------------------------------------------------

    def loss(
        self, model: PreTrainedModel, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the text's next tokens, with a random lag of the target's cache and moved positions (module text).

        A query at i sees the target's keys 0..i - lag, lag drawn from 1 to 4; the first ``lag`` queries see none. For texts
        of up to 1,200 tokens the first 0 to 4 positions stay and all others are moved up by a random offset, so that large
        distances occur.
        """
        lag = int(torch.randint(1, self.most_lag + 1, ()))
        positions = self.anchored_positions(model, input_ids.shape[1]).to(input_ids.device)
        logits = self.logits(model, input_ids, lag, positions.expand_as(input_ids))[:, :-1].float()
        wanted = (input_ids if labels is None else labels)[:, 1:]
        loss = mean_where(F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"), wanted)
        with torch.no_grad():
            accuracy = mean_where((logits.argmax(-1) == wanted).float(), wanted)
        return loss, {"accuracy": accuracy}

    def anchored_positions(self, model: PreTrainedModel, length: int) -> Tensor:
        """Positions ``(length,)`` with a random number of anchors and a random offset behind them."""
        positions = torch.arange(length)
        if length <= ANCHORED_LENGTH:
            longest = model.config.get_text_config(decoder=True).max_position_embeddings
            reach = max(min(self.largest_offset, longest - 1000) - length, 0)
            anchors, offset = int(torch.randint(0, MOST_ANCHORS + 1, ())), int(torch.randint(0, reach + 1, ()))
            positions[anchors:] += offset
        return positions

    def logits(self, model: PreTrainedModel, input_ids: Tensor, lag: int, positions: Tensor) -> Tensor:
        """Teacher-forced logits ``(B, T, V)`` at one lag; ``positions``: ``(B, T)`` for target and draft alike."""
        with torch.no_grad():
            cache = DynamicCache()  # every key is kept, windows are the mask's matter
            model.get_decoder()(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=positions,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            memory: Any = cache.layers[_memory_layer(model)]
            keys, values = cast(Tensor, memory.keys), cast(Tensor, memory.values)
            x = model.get_input_embeddings()(input_ids)
        rotation = _rotation(model, positions)
        normed, own_keys, own_values = self.keys_values(x, rotation)
        h = self.after_own(x, _windowed(self.own_query(normed, rotation), own_keys, own_values, self.window))
        query = self.cross_query(h, rotation)[:, :, lag:]
        dtype = query.dtype
        read = F.scaled_dot_product_attention(
            query, keys[:, :, :-lag].to(dtype), values[:, :, :-lag].to(dtype), is_causal=True, enable_gqa=True
        )
        h = self.finish(h, F.pad(read, (0, 0, lag, 0)))
        return F.linear(h, output_weight(model).detach())

    # The tree's shape -----------------------------------------------------------------------------------------------------

    def calibrate(
        self, model: PreTrainedModel, rows: Tensor, shapes: Sequence[Sequence[int]] | None = None, new_tokens: int = 32
    ) -> list[tuple[list[int], float]]:
        """Counts the tokens a step of some shapes, and keeps them with the drafter.

        Args:
            model: the target.
            rows: ``(N, T)`` prompts, which are continued greedily, all at once.
            shapes: default `SHAPES`.
            new_tokens: of each continuation.
        """
        from heedful.decoding.generate import generate

        own, fit = self.tree_shape, self.fit_device
        self.fit_device, found = False, []
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
        options["pad_token_id"] = model.config.get_text_config(decoder=True).pad_token_id or 0
        prompts = cast(LongTensor, rows.to(model_device(model)))
        ones = torch.ones_like(prompts)  # a token of the text may be the one that pads
        for shape in SHAPES if shapes is None else shapes:
            self.tree_shape = tuple(shape)
            # No graphs: each shape would be captured for a few steps.
            result = generate(model, prompts, self, engine="eager", attention_mask=ones, **options)
            entries = [emitted for row in result.stats.accepted for emitted in row]
            found.append((list(shape), sum(entries) / max(1, len(entries))))
        self.tree_shape, self.fit_device, self.measured, self._fitted = own, fit, found, ()
        if isinstance(config := getattr(self, "_hub_mixin_config", None), dict):
            config["measured"] = found
        return found

    def fit(self, model: PreTrainedModel, batch_size: int) -> None:
        """Sets `shape`, the shape that is drafted: ``tree_shape``, or of those measured the one that pays on this device."""
        if not self.fit_device or not self.measured:
            self.shape = self.tree_shape
            return
        place = setting(model, batch_size)
        if place == self._fitted:
            return
        self._fitted = place
        costs = forward_costs(model, batch_size, 1 + max(sum(shape) for shape, _ in self.measured))
        self.shape, best = (), 1.0 / costs[0]
        for shape, tokens in self.measured:
            speed = tokens / (costs[sum(shape)] + self._draft_seconds(tuple(shape), batch_size))
            if speed > best:
                self.shape, best = tuple(shape), speed

    @torch.no_grad()
    def _draft_seconds(self, shape: tuple[int, ...], batch: int) -> float:
        """A draft behind 512 tokens, and what has become text before it."""
        model, length = self.target, 512
        device = model_device(model)
        cache = GraphCache(model, 2 * length)
        memory = torch.zeros(batch, self.num_key_value_heads, 1, self.head_dim, device=device, dtype=model.dtype)
        cast(Any, cache.layers[self.layer]).update(memory, memory)
        state = _State(self, batch, shape)
        at = torch.full((batch,), length, device=device)
        zeros = torch.zeros_like(at)
        news = torch.zeros(batch, 1 + len(shape), dtype=torch.long, device=device)

        def run() -> object:
            state.write(news, news)
            return state.draft(zeros, at, cache, at, zeros)

        return seconds_of(run, device)

    # Drafter ------------------------------------------------------------------------------------------------------------

    def begin(self, model: PreTrainedModel, batch_size: int) -> None:
        self.bind(model)
        self.fit(model, batch_size)
        self._state = _State(self, batch_size)
        self._seen = [0] * batch_size

    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        mask = outputs.attention_mask
        device = model_device(self.target)
        padding = torch.zeros(tokens.shape[0], dtype=torch.long) if mask is None else mask.int().argmax(-1).cpu()
        self._cache, self._padding = outputs.cache, padding.to(device)

    @torch.no_grad()
    def propose(self, roots: LongTensor, committed: list[LongTensor]) -> list[DraftTree]:
        assert self._state is not None
        assert self._cache is not None
        device, batch = model_device(self.target), len(committed)
        if not self._state.shape:
            return [DraftTree(root[None], _ALONE) for root in cast(list[LongTensor], list(roots))]  # type: ignore[arg-type]
        # What has become text since the last draft, of a prompt its last tokens alone.
        news = [row[max(seen, len(row) - self.window) :] for seen, row in zip(self._seen, committed, strict=True)]
        widest = max(map(len, news))
        tokens = torch.zeros(batch, widest, dtype=torch.long)
        positions = torch.full((batch, widest), -1)
        for row, new in enumerate(news):
            tokens[row, : len(new)] = new
            positions[row, : len(new)] = torch.arange(len(committed[row]) - len(new), len(committed[row]))
        self._seen = [len(row) for row in committed]
        if widest:
            self._state.write(tokens.to(device), positions.to(device))
        lengths = torch.tensor(self._seen, device=device)
        drafted, parents = self._state.draft(
            roots.to(device), lengths, self._cache, lengths + self._padding, self._padding
        )
        return [
            DraftTree(cast(LongTensor, t), cast(LongTensor, p))
            for t, p in zip(drafted.cpu(), parents.cpu(), strict=True)
        ]

    def on_device(self, model: PreTrainedModel, batch_size: int, capacity: int) -> DeviceDrafter:
        return _LongSpecOnDevice(self, batch_size)


class _State:
    """The block's own keys and values, in tensors of constant size: those of the last W = ``window`` tokens, a tree behind them.

    Token t lies in the rows t % W and W + t % W. So the window behind a text of L tokens is one piece, the W rows before row
    W + L % W, and the tree can have the rows behind it, as `tree_attention` wants it. What it overwrites there are second copies
    of tokens that leave the window before these would be read. The last row takes what is not kept.
    """

    def __init__(self, block: LongSpec, batch: int, shape: tuple[int, ...] | None = None) -> None:
        model = block.target
        self.block, self.model, self.batch = block, model, batch
        self.shape = block.shape if shape is None else shape  # a captured graph keeps the shape it was captured with
        device, dtype = model_device(model), model.dtype
        self.inner = 1 + sum(self.shape[:-1])  # nodes that the block runs on: the root, and all levels but the last
        room = (batch, block.num_key_value_heads, 2 * block.window + self.inner, block.head_dim)
        self.keys, self.values = (torch.zeros(room, device=device, dtype=dtype) for _ in range(2))
        self.nothing = torch.zeros(self.inner, self.inner, dtype=torch.bool, device=device)
        self.themselves = torch.eye(self.inner, dtype=torch.bool, device=device).repeat(batch, 1, 1)
        self.head = output_weight(model).detach()
        self.vocabulary = min(self.head.shape[0], model.config.get_text_config(decoder=True).vocab_size)

    def write(self, tokens: Tensor, positions: Tensor) -> None:
        """Keeps tokens ``(B, m)`` at positions ``(B, m)``, m <= window; -1: none."""
        x = self.model.get_input_embeddings()(tokens)
        _, keys, values = self.block.keys_values(x, _rotation(self.model, positions.clamp(min=0)))
        last, row = self.keys.shape[2] - 1, positions % self.block.window
        for copy in (row, row + self.block.window):
            put_rows(self.keys, self.values, keys, values, torch.where(positions >= 0, copy, last))

    def draft(
        self, roots: Tensor, positions: Tensor, cache: Cache, lengths: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The beam tree below ``roots (B,)`` at ``positions (B,)``: tokens and parents ``(B, n)``.

        Args:
            cache: the target's; row b's text lies in rows ``padding[b]`` to ``lengths[b] - 1``.
        """
        block, window = self.block, self.block.window
        memory = cache.layers[block.layer]
        tokens = roots.new_zeros(self.batch, 1 + sum(self.shape))
        parents = torch.full_like(tokens, -1)
        tokens[:, 0] = roots
        seen, scores = self.themselves.clone(), torch.zeros(self.batch, 1, device=roots.device)
        behind = positions % window + window  # the window: where the tree lies
        first = behind - positions.clamp(max=window)
        at = positions[:, None] + torch.arange(len(self.shape), device=roots.device)  # of each level
        places = behind[:, None] + torch.arange(self.inner, device=roots.device)
        cos, sin = _rotation(self.model, at)
        queries: list[Tensor] = []
        begin, end = 0, 1  # of the last level
        for depth, width in enumerate(self.shape):
            x = self.model.get_input_embeddings()(tokens[:, begin:end])
            rotation = cos[:, depth : depth + 1], sin[:, depth : depth + 1]
            normed, keys, values = block.keys_values(x, rotation)
            put_rows(self.keys, self.values, keys, values, places[:, begin:end])
            # The nodes above are asked again: a tree is read as a whole.
            queries.append(block.own_query(normed, rotation))
            own = tree_attention(
                torch.cat(queries, dim=2), self.keys, self.values, seen[:, :end, :end], behind,
                prefix_start=first, window=window + 1,
            )  # fmt: skip
            h = block.after_own(x, own[:, :, begin:])
            read = _read(block.cross_query(h, rotation), memory, lengths, padding, self.nothing)
            logits = F.linear(block.finish(h, read), self.head[: self.vocabulary])
            scores = _grow(logits, scores, tokens, parents, seen, begin, width)
            begin, end = end, end + width
        return tokens, parents


def _grow(
    logits: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, seen: Tensor, begin: int, width: int
) -> Tensor:
    """Adds a level to the trees: of all tokens behind the last level's nodes those with the largest cumulative log-probability.

    Args:
        logits: ``(B, n, V)`` of the last level's n nodes, which begin at node ``begin``.
        scores: ``(B, n)``, their cumulative log-probabilities.
        tokens, parents: ``(B, nodes)``, written behind the last level.
        seen: bool ``(B, m, m)``, which of the first m nodes see each other: written as far as it goes.
        width: nodes of the new level.

    Returns:
        The new level's cumulative log-probabilities ``(B, width)``, in falling order.
    """
    if logits.is_cuda:
        from heedful.decoding.beam_kernels import grow

        with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(logits):
            return grow(logits, scores, tokens, parents, seen, begin, width)
    grown = scores[:, :, None] + logits.float().log_softmax(-1)
    best = grown.flatten(1).topk(width, dim=1)
    above, end = begin + best.indices // logits.shape[2], begin + logits.shape[1]
    new = slice(end, end + width)
    tokens[:, new], parents[:, new] = best.indices % logits.shape[2], above
    if new.stop <= seen.shape[1]:
        seen[:, new] |= seen.gather(1, above[:, :, None].expand(-1, -1, seen.shape[2]))
    return best.values


class _LongSpecOnDevice(DeviceDrafter):
    parents = None

    def __init__(self, block: LongSpec, batch: int) -> None:
        self.state = _State(block, batch)
        self.num_nodes, self.max_depth = 1 + sum(block.shape), len(block.shape)
        self.padding = torch.zeros(batch, dtype=torch.long, device=self.state.keys.device)

    @torch.no_grad()
    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        length, window = tokens.shape[1], self.state.block.window
        mask = outputs.attention_mask
        self.padding.zero_()
        if mask is not None:
            self.padding.copy_(mask.int().argmax(-1))
        positions = torch.arange(length, device=self.padding.device) - self.padding[:, None]
        positions = torch.where(positions >= 0, positions, -1)
        last = slice(max(0, length - 1 - window), length - 1)  # the last token comes with the first step
        if length > 1:
            self.state.write(tokens[:, last].to(self.padding.device), positions[:, last])

    @torch.no_grad()
    def advance(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        order = torch.arange(step.path.shape[1], device=step.path.device)
        positions = (step.positions - step.count)[:, None] + order
        # Of a path longer than the window its end alone: there is one place for each of its tokens.
        kept = (order < step.count[:, None]) & (order >= step.count[:, None] - self.state.block.window)
        self.state.write(step.tokens.gather(1, step.path), torch.where(kept, positions, -1))
        return self.state.draft(step.roots, step.positions, step.cache, step.lengths, self.padding)


def _read(query: Tensor, memory: Any, lengths: Tensor, padding: Tensor, nothing: Tensor) -> Tensor:
    """Cross-attention of ``(B, Hq, n, D)`` to the target's cached keys and values, as far as each row's text goes; ``nothing``: bool
    ``(n or more, n or more)``, all False."""
    keys, values, nodes = memory.keys, memory.values, query.shape[2]
    if query.is_cuda and type(memory).__name__ == "GraphLayer":
        return tree_attention(query, keys, values, nothing[:nodes, :nodes], lengths, prefix_start=padding)
    at = torch.arange(keys.shape[2], device=query.device)
    seen = (at < lengths[:, None]) & (at >= padding[:, None])
    out = F.scaled_dot_product_attention(query, keys, values, seen[:, None, None], enable_gqa=True)
    return torch.where((lengths > padding)[:, None, None, None], out, 0.0)  # an empty memory


def _windowed(query: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Causal attention ``(B, heads, T, D)`` of every row to itself and the ``window`` rows before it.

    Blocks of ``window`` rows, each of which reads its own block and the one before: time and memory grow with T, not T T.
    """
    length = query.shape[2]
    if length <= window + 1:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    blocks = -(-length // window)

    def split(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window))

    def with_the_block_before(x: Tensor) -> Tensor:
        x = split(x)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3).transpose(1, 2).flatten(0, 1)

    row, key = (
        torch.arange(window, device=query.device)[:, None],
        torch.arange(2 * window, device=query.device) - window,
    )
    near = ((key <= row) & (key >= row - window)).expand(blocks, -1, -1)
    near = near & (
        (key >= 0) | (torch.arange(blocks, device=query.device) > 0)[:, None, None]
    )  # before the first: nothing
    out = F.scaled_dot_product_attention(
        split(query).transpose(1, 2).flatten(0, 1), with_the_block_before(keys), with_the_block_before(values),
        near.repeat(query.shape[0], 1, 1)[:, None], enable_gqa=True,
    )  # fmt: skip
    return out.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """``(B, T, heads * D)`` to ``(B, heads, T, D)``."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of ``(B, heads, T, D)``, halves rotated against each other, in the precision of the `_turns`."""
    if x.is_cuda and not torch.compiler.is_compiling():  # which makes one kernel of it itself
        from heedful.decoding import beam_kernels

        if beam_kernels.takes(x):
            with torch.cuda.device_of(x):
                return beam_kernels.rotate(x, *rotation)
    cos, sin = (part[:, None] for part in rotation)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def _turns(angles: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos, and sin with the first half's sign turned, ``(..., D)``, for angles ``(..., D / 2)``."""
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _rotation(model: PreTrainedModel, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The `_turns` ``(B, T, D)`` of the target's full-attention layers, in float32 (float64 for models in float64)."""
    frequencies, scaling = _frequencies(model)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    with torch.autocast(positions.device.type, enabled=False):
        angles = positions.to(wide)[..., None] * frequencies.to(device=positions.device, dtype=wide)
        return _turns(angles, scaling)


def _frequencies(model: PreTrainedModel) -> tuple[Tensor, float]:
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    for prefix in ("", "full_attention_"):
        frequencies = getattr(rotary, f"{prefix}inv_freq", None)
        if frequencies is not None:
            return frequencies, float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    raise ValueError(
        f"LongSpec reads rotated keys out of the cache, and {type(model).__name__} has no rotary embedding; use Medusa instead"
    )


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _memory_layer(model: PreTrainedModel) -> int:
    """The last layer with full attention: its cache holds the whole context."""
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    return full[-1] if full else text.num_hidden_layers - 1


def _attention(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    attention = getattr(layers[_memory_layer(model)], "self_attn", None) if layers is not None else None
    if attention is None:
        raise ValueError(
            f"LongSpec finds no decoder layers with self_attn in {type(model).__name__}; use Medusa instead"
        )
    return attention


def _check_rotation(model: PreTrainedModel) -> None:
    """ValueError unless the target rotates whole heads the way `_rotate` does."""
    text = model.config.get_text_config(decoder=True)
    frequencies, _ = _frequencies(model)
    dim = _head_dim(text)
    apply = getattr(sys.modules[type(_attention(model)).__module__], "apply_rotary_pos_emb", None)
    name = type(model).__name__
    if 2 * frequencies.numel() != dim or apply is None or getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"LongSpec reads whole rotated keys out of the cache, and {name} rotates {2 * frequencies.numel()} of {dim} "
            f"numbers of a head or keeps something else there; use Medusa instead"
        )
    x = torch.linspace(-1, 1, 3 * dim).view(1, 1, 3, dim)
    angles = torch.arange(3.0)[None, :, None] * frequencies.float().cpu()
    ours = _rotate(x, _turns(angles))
    if not any(
        theirs.shape == x.shape and torch.allclose(theirs, ours, atol=1e-5) for theirs in _rotated(apply, x, angles)
    ):
        raise ValueError(f"LongSpec does not know the rotation of {name}'s keys; use Medusa instead")


def _rotated(apply: Any, x: Tensor, angles: Tensor) -> Iterator[Tensor]:
    """What a model's function makes of ``x``, called in the ways there are: both tensors or one (Gemma 4), and an angle for
    each number of a head or for each pair (GPT-OSS)."""
    for each in (torch.cat([angles, angles], -1), angles):
        for tensors in ((x, x), (x,)):
            with suppress(TypeError, RuntimeError):
                theirs = apply(*tensors, each.cos(), each.sin())
                yield theirs[0] if isinstance(theirs, tuple) else theirs
