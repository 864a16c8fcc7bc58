"""Medusa: a few heads on the last hidden state, each of which guesses one token further ahead."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from heedful.decoding.drafter import DeviceDrafter, DeviceStep, DraftingOutputs
from heedful.decoding.sizing import forward_costs, seconds_of
from heedful.decoding.support import model_device
from heedful.decoding.trained import (
    RANKS,
    RankDrafter,
    best_tree,
    ends_of,
    expected_length,
    model_logits,
    output_weight,
    rank_accuracies,
)
from heedful.decoding.tree import DraftTree

#: The reference's default tree (mc_sim_7b_63) by child counts: 63 nodes, levels of 10 / 28 / 23 / 2.
_CHILDREN: dict[tuple[int, ...], int] = {
    (): 10,
    **{(0,): 10, (1,): 7, (2,): 3, (3,): 2, **{(rank,): 1 for rank in range(4, 10)}},
    **{(0, 0): 10, (0, 1): 3, (0, 2): 2, **{(0, rank): 1 for rank in range(3, 8)}, (1, 0): 2, (2, 0): 1},
    (0, 0, 0): 2,
}
MC_SIM_7B_63: tuple[tuple[int, ...], ...] = tuple(
    (*path, rank) for path, count in _CHILDREN.items() for rank in range(count)
)


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``, the identity before training."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Medusa(RankDrafter):
    """Drafts with K residual heads on the model's last hidden state; a static tree of their best tokens is verified.

    Head k reads the hidden state at the last accepted token t (after the final norm) and predicts token t + k + 1; the
    model's own head predicts t + 1, the root. A node's token is the r-th best of its depth's head, independent of its parent.
    After a verification the heads read the accepted node's row: a draft costs no forward of the model.

    Example:
        >>> import heedful
        >>> from heedful.decoding import Medusa
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> drafter = Medusa.from_pretrained(heedful.zoo.path("classics-20m-medusa"))
        >>> ids = tokenizer("It was the best of times,", return_tensors="pt").input_ids
        >>> result = heedful.generate(model, ids, drafter, max_new_tokens=64, do_sample=False)

    Args:
        hidden_size: H of the target model.
        vocab_size: V of its output head.
        num_heads: K. Default 4.
        num_layers: residual blocks of a head. Default 1.
        share_lm_head: the heads end in the model's own output head, and only the residual blocks are this drafter's. False:
            each head has an output matrix of its own, ``K V H`` parameters more and a little more accurate. Default True.
        tree: nodes as paths of ranks; None: the reference's 63-node tree, as deep as there are heads. See `calibrate`.
        accuracies: ``[head][rank]``, as `calibrate` measured them; kept with the drafter.
        max_nodes: nodes drafted a step at most. ``"auto"`` drafts, of a calibrated tree, the nodes with the most expected tokens
            per second on this device (it times the model's forward once), on a slow one perhaps none. Default ``"auto"``.

    Raises:
        ValueError: a tree with a missing parent, deeper than the heads, or with ranks outside the ten best; a target of
            other sizes.

    Cost:
        ``K H (H + 1)`` parameters (0.6 M for H = 384, K = 4), or ``K (H (H + 1) + V H)`` without ``share_lm_head``. A step
        reads the output head K times over (one product), and verifies as many rows as the tree has nodes.

    When not to use:
        Where no training is possible (`TokenRecycling`), at large batch sizes, and at vocabularies of 100,000 and more without
        ``share_lm_head``.

    Paper:
        "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", Cai, Li, Geng, Peng, Lee, Chen,
        Dao, ICML 2024, arXiv 2401.10774. Where we differ from the released code: biases begin at zero, so that a head is the
        model's own head before training; blocks of a head are distinct; a padded path never matches; sampling is exact.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        num_heads: int = 4,
        num_layers: int = 1,
        share_lm_head: bool = True,
        tree: list[list[int]] | None = None,
        accuracies: list[list[float]] | None = None,
        max_nodes: int | str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or num_layers < 1:
            raise ValueError(f"num_heads and num_layers must be at least 1, got {num_heads} and {num_layers}")
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_heads, self.num_layers, self.share_lm_head = num_heads, num_layers, share_lm_head
        self.requires = frozenset({"hidden_states"})
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(hidden_size) for _ in range(num_layers))) for _ in range(num_heads)
        )
        self.outputs = nn.ModuleList(
            nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(0 if share_lm_head else num_heads)
        )
        default = [path for path in MC_SIM_7B_63 if len(path) <= num_heads]
        self._start(num_heads, default if tree is None else tree, accuracies, max_nodes)
        #: Loss of the heads: "decay" is ``scale * sum_k 0.8^k CE_k`` with k from 1, "equal" the plain sum.
        self.weighting, self.scale = "decay", 0.2

    @classmethod
    def for_model(cls, model: PreTrainedModel, **options: Any) -> Medusa:
        """Untrained heads for a model: each gives the model's own logits
        (without the head's bias or scale, with ``share_lm_head=False``). ``options``: as for the constructor."""
        weight = output_weight(model)
        drafter = cls(hidden_size=weight.shape[1], vocab_size=weight.shape[0], **options)
        for output in drafter.outputs:
            cast(nn.Linear, output).weight.data.copy_(weight.data)
        return drafter.to(model_device(model))

    def sizes(self, model: PreTrainedModel) -> dict[str, int]:
        weight = output_weight(model)
        return {"hidden_size": weight.shape[1], "vocab_size": weight.shape[0]}

    def step_seconds(self, model: PreTrainedModel, batch_size: int, nodes: int) -> Sequence[float]:
        hidden = torch.zeros(batch_size, self.hidden_size, device=model_device(model), dtype=model.dtype)
        heads = seconds_of(lambda: self.candidates(hidden), hidden.device)
        costs = forward_costs(model, batch_size, nodes + 1)
        return [costs[0], *(costs[1:] + heads)]

    # The heads ----------------------------------------------------------------------------------------------------------

    def forward(self, hidden: Tensor, lm_head: nn.Module | None = None) -> Tensor:
        """Logits ``(..., K, V)`` of the heads for hidden states ``(..., H)``; ``lm_head`` is the model's, where it is shared."""
        states = [block(hidden) for block in self.blocks]
        if self.share_lm_head:
            assert lm_head is not None
            return cast(Tensor, lm_head(torch.stack(states, dim=-2)))
        return torch.stack([output(state) for output, state in zip(self.outputs, states, strict=True)], dim=-2)

    def candidates(self, hidden: Tensor) -> Tensor:
        """The best tokens of every head ``(..., K, ranks)``, as many ranks as the tree has."""
        logits = self(hidden, self.target.get_output_embeddings() if self.share_lm_head else None)
        vocabulary = self.target.config.get_text_config(decoder=True).vocab_size
        return logits[..., :vocabulary].topk(min(self.tree.ranks, vocabulary), dim=-1).indices

    def loss(
        self, model: PreTrainedModel, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of head k at t with the text's token t + k + 1, weighted by ``weighting``; the model is frozen."""
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head_loss(model, hidden, input_ids, labels)

    def head_loss(
        self, model: PreTrainedModel, hidden: Tensor, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on given hidden states ``(B, T, H)`` of the model; labels of -100 are not counted."""
        labels = input_ids if labels is None else labels
        total: Tensor = hidden.new_zeros((), dtype=torch.float32)
        figures: dict[str, Tensor] = {}
        for k, block in enumerate(self.blocks, start=1):
            state = block(hidden[:, : -k - 1])
            logits = model_logits(model, state) if self.share_lm_head else self.outputs[k - 1](state)
            wanted = labels[:, k + 1 :]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
            loss = loss / (wanted != -100).sum().clamp(min=1)
            total = total + loss * (self.scale * 0.8**k if self.weighting == "decay" else 1.0)
            with torch.no_grad():
                figures[f"head_{k}_loss"] = loss.detach()
                figures[f"head_{k}_accuracy"] = (logits.argmax(-1) == wanted)[wanted != -100].float().mean()
        return total, figures

    # The tree -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, model: PreTrainedModel, rows: Tensor, max_nodes: int = 63, prompt: int = 0) -> dict[str, float]:
        """Builds the sparse tree from measured accuracies, in place, and keeps them with the drafter.

        The rows should be the model's own greedy continuations (`heedful.training.own_text`): a candidate counts as right
        when it is what the model itself chooses there.

        Args:
            model: the target.
            rows: ``(N, T)`` token ids.
            max_nodes: nodes below the root.
            prompt: tokens at the beginning of each row that the model did not choose, and that are not counted.

        Returns:
            Expected tokens a step: ``"expected"`` by products of the heads' accuracies, ``"empirical"`` as counted on the
            rows (successes are correlated, so the two differ), and ``"default_tree"`` for the reference's tree, by products.
        """
        self.bind(model)
        self.set_tree([(rank,) for rank in range(RANKS)])  # all ranks are measured
        found, chosen = [], []
        for batch in rows.to(model_device(model)).split(8):
            hidden = model.get_decoder()(input_ids=batch, use_cache=False).last_hidden_state
            found.append(self.candidates(hidden))
            chosen.append(model_logits(model, hidden).argmax(-1))
        accuracies, hits = rank_accuracies(torch.cat(found), torch.cat(chosen), prompt=prompt)
        self.set_tree(best_tree(accuracies, max_nodes), accuracies)
        empirical = torch.ones(())
        for path in self.tree.paths:
            right = torch.stack([hits[:, :, step, rank] for step, rank in enumerate(path)]).all(0)
            empirical = empirical + right.float().mean().cpu()
        default = [path for path in MC_SIM_7B_63 if len(path) <= self.num_heads][:max_nodes]
        return {
            "expected": expected_length(self.tree.paths, accuracies),
            "empirical": float(empirical),
            "default_tree": expected_length(default, accuracies),
        }

    # Drafter ------------------------------------------------------------------------------------------------------------

    def begin(self, model: PreTrainedModel, batch_size: int) -> None:
        self.bind(model)
        self.fit(model, batch_size)
        self._candidates = None

    @torch.no_grad()
    def prefill(self, tokens: LongTensor, outputs: DraftingOutputs) -> None:
        assert outputs.hidden_states is not None
        if self.drafted.paths:
            self._candidates = self.candidates(outputs.hidden_states[:, -1]).cpu()

    @torch.no_grad()
    def update(
        self,
        trees: list[DraftTree | None],
        outputs: DraftingOutputs,
        paths: list[list[int]],
        new_roots: LongTensor,
    ) -> None:
        assert outputs.hidden_states is not None
        if not self.drafted.paths:
            return
        rows, last = ends_of(paths, outputs.hidden_states.device)
        self._candidates = self.candidates(outputs.hidden_states[rows, last]).cpu()

    def on_device(self, model: PreTrainedModel, batch_size: int, capacity: int) -> DeviceDrafter:
        return _MedusaOnDevice(self)

    # Published heads ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, path: str | PathLike[str], model: PreTrainedModel, **options: Any) -> Medusa:
        """Loads published heads: ``medusa_lm_head.pt`` or ``.safetensors``, the file or its folder.

        Nothing but tensors is unpickled. How many heads and blocks there are is read off the keys: published ``config.json`` files
        tell other numbers than their weights have.

        Args:
            path: the file, or the folder that holds it.
            model: the target model.
            **options: as for the constructor, ``tree`` for instance.

        Raises:
            ValueError: there is no such file, it holds more than tensors, or its keys and sizes are not those of Medusa heads for this model.
        """
        path = Path(path)
        files = [path] if path.is_file() else [path / f"medusa_lm_head.{kind}" for kind in ("safetensors", "pt")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ValueError(f"{path} holds no medusa_lm_head.pt or medusa_lm_head.safetensors")
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(str(file))
        else:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, EOFError, RuntimeError):
                raise ValueError(
                    f"{file} holds more than tensors, or none: only weights are read, so save the heads' state dict alone"
                ) from None
        none = ValueError(f"{file} holds no Medusa heads: keys like '0.0.linear.weight' are expected")
        if not isinstance(state, dict):
            raise none
        state = {key.removeprefix("medusa_head."): value for key, value in state.items()}
        blocks = [key.split(".")[:2] for key in state if key.endswith(".linear.weight")]
        if not blocks or not all(part.isdigit() for place in blocks for part in place):
            raise none
        heads, layers = (1 + max(int(place[i]) for place in blocks) for i in range(2))
        own = f"0.{layers}.weight" in state
        drafter = cls.for_model(model, num_heads=heads, num_layers=layers, share_lm_head=not own, **options)
        renamed = {}
        for head in range(heads):
            for layer in range(layers):
                for part in ("weight", "bias"):
                    renamed[f"blocks.{head}.{layer}.linear.{part}"] = state.get(f"{head}.{layer}.linear.{part}")
            if own:
                renamed[f"outputs.{head}.weight"] = state.get(f"{head}.{layers}.weight")
        expected = drafter.state_dict()
        for key, value in renamed.items():
            if value is None or value.shape != expected[key].shape:
                shape = None if value is None else tuple(value.shape)
                raise ValueError(
                    f"{file}: {key} has shape {shape}, {type(model).__name__} needs {tuple(expected[key].shape)}"
                )
        drafter.load_state_dict(cast(dict[str, Tensor], renamed))
        return drafter


class _MedusaOnDevice(DeviceDrafter):
    def __init__(self, medusa: Medusa) -> None:
        self.medusa = medusa
        self.tree = medusa.drafted
        self.parents: Sequence[int] = self.tree.parents  # type: ignore[assignment]
        self.num_nodes, self.max_depth = len(self.tree), self.tree.depth
        self.tree.places = self.tree.places.to(model_device(medusa.target))

    def advance(self, step: DeviceStep) -> Tensor:
        if not self.tree.paths:
            return step.roots[:, None]
        assert step.hidden_states is not None
        last = step.path.gather(1, step.count[:, None] - 1)[:, :, None]
        hidden = step.hidden_states.gather(1, last.expand(-1, -1, step.hidden_states.shape[-1]))[:, 0]
        return self.tree.fill(step.roots, self.medusa.candidates(hidden))
