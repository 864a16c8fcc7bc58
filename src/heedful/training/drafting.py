"""The training loop of drafters: packed rows of text, one loss, Accelerate for devices and processes, resumable.

Recipes (`train_medusa`, `train_hidden_transfer`, `train_longspec`) have the signature ``(model, tokenizer, data, out, *, steps,
batch_size, length, lr, seed, ..., device)`` and end in `train_drafter`.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.decoding.trained import TrainedDrafter

#: A document in pieces, each with whether a drafter learns from it.
Pieces = list[tuple[str, bool]]
_AT_ONCE = 64  # texts that are encoded together


def read_documents(data: str | Path) -> list[str]:
    """The documents of a ``.txt`` file (one) or a ``.jsonl`` file (one a line), as text: see `read_pieces`."""
    return ["".join(text for text, _ in pieces) for pieces in read_pieces(data)]


def read_pieces(data: str | Path) -> list[Pieces]:
    """The documents of a ``.txt`` file (one) or a ``.jsonl`` file (one a line).

    A line may have ``text``, or ``question`` and ``answer``, or ``turns``, or ``messages`` / ``conversations`` (a list of
    ``{content}`` or ``{value}``), or ``prompt`` and ``answer``, of which only the answer is learnt from (`self_distill`
    writes these).

    Raises:
        ValueError: there is no such file, it is empty, or a line has none of these.
    """
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"no training text {path}: give a .txt or .jsonl file")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        documents: list[Pieces] = [[(text, True)]]
    else:
        documents = [
            _document(line, f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    documents = [pieces for pieces in documents if any(learnt and text.strip() for text, learnt in pieces)]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def _document(line: str, where: str) -> Pieces:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if isinstance(item.get("text"), str):
        return [(item["text"], True)]
    if isinstance(item.get("prompt"), str) and isinstance(item.get("answer"), str):
        return [(item["prompt"], False), (item["answer"], True)]
    if "question" in item and "answer" in item:
        return [(f"Question: {item['question']}\nAnswer: {item['answer']}\n", True)]
    turns = item.get("turns") or item.get("messages") or item.get("conversations")
    if isinstance(turns, list) and turns:
        said = "\n".join(t if isinstance(t, str) else str(t.get("content", t.get("value", ""))) for t in turns)
        return [(said, True)]
    raise ValueError(
        f"{where}: no 'text', 'question' and 'answer', 'prompt' and 'answer', 'turns', 'messages' or 'conversations'"
    )


class PackedRows:
    """Rows of ``length`` tokens out of one stream of documents with an EOS after each; a BOS first where the tokenizer has one.

    A row is a pure function of ``(seed, step, place in the batch)``: a resumed run, or one on more processes, reads the same.
    """

    def __init__(
        self, documents: Iterable[str | Pieces], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
    ) -> None:
        pieces: list[tuple[str, bool, bool]] = []  # a text, whether it is learnt, whether its document ends with it
        for document in documents:
            parts = [(document, True)] if isinstance(document, str) else document
            pieces += [(text, counts, i + 1 == len(parts)) for i, (text, counts) in enumerate(parts)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream: list[np.ndarray] = []
        learnt: list[np.ndarray] = []
        for ids, (_, counts, last) in zip(_encoded(tokenizer, [text for text, *_ in pieces]), pieces, strict=True):
            stream.append(np.array([*ids, *end] if last else ids, dtype=np.int64))
            learnt.append(np.full(len(ids), counts))
            learnt.append(np.full(len(end) if last else 0, True))
        self.first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.stream = np.concatenate([np.zeros(0, dtype=np.int64), *stream])
        self.learnt = np.concatenate([np.zeros(0, dtype=bool), *learnt])
        self._cut(length, seed)

    def _cut(self, length: int, seed: int) -> None:
        self.size, self.seed = length - len(self.first), seed
        if len(self.stream) <= self.size:
            raise ValueError(
                f"the text has {len(self.stream)} tokens, too few for rows of {length}: give more text or a smaller length"
            )

    def of(self, length: int, seed: int) -> PackedRows:
        """Other rows of the same text, which is not encoded again."""
        rows = copy.copy(self)
        rows._cut(length, seed)
        return rows

    def batch(self, step: int, places: Iterable[int]) -> Tensor:
        """Token ids ``(places, length)``."""
        return self.with_labels(step, places)[0]

    def with_labels(self, step: int, places: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Token ids ``(places, length)``, and the same with -100 where nothing is to be learnt."""
        rows, labels = [], []
        for place in places:
            start = int(np.random.default_rng([self.seed, step, place]).integers(len(self.stream) - self.size))
            there = slice(start, start + self.size)
            rows.append([*self.first, *self.stream[there].tolist()])
            labels.append([*self.first, *np.where(self.learnt[there], self.stream[there], -100).tolist()])
        return torch.tensor(rows), torch.tensor(labels)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    """The token ids of each text. Fast tokenizers take many at once, on all cores; some at a time, since lists are large."""
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    if not getattr(tokenizer, "is_fast", False):
        yield from (cast(list[int], tokenizer(text, **options)["input_ids"]) for text in texts)
        return
    for start in range(0, len(texts), _AT_ONCE):
        yield from cast(list[list[int]], tokenizer(list(texts[start : start + _AT_ONCE]), **options)["input_ids"])


class _Objective(nn.Module):
    """What DistributedDataParallel wraps: the drafter's parameters, and the model's where they are trained too."""

    def __init__(self, drafter: TrainedDrafter, model: PreTrainedModel, joint: bool) -> None:
        super().__init__()
        self.drafter = drafter
        self.joint = model if joint else None
        self.frozen = (model,)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.drafter.loss(self.frozen[0], input_ids, labels)


def rows_of(data: str | Path | PackedRows, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> PackedRows:
    """Rows of a file's text, or of a text that has been encoded already."""
    if isinstance(data, PackedRows):
        return data.of(length, seed)
    return PackedRows(read_pieces(data), tokenizer, length, seed)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear warm-up over a share of the steps, then half a cosine to zero."""
    begin = max(1, round(warmup * steps))
    if step < begin:
        return (step + 1) / begin
    return 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1, steps - begin)))


def train_drafter(
    drafter: TrainedDrafter,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | PackedRows,
    out: str | Path,
    *,
    steps: int = 1000,
    batch_size: int = 16,
    length: int = 512,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
    joint_groups: list[dict[str, Any]] | None = None,
    checkpoint_every: int = 200,
    resume: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
    finish: Callable[[], None] | None = None,
) -> Path:
    """Trains a drafter on text and writes a folder that its ``from_pretrained`` loads.

    Under ``accelerate launch`` the rows of each batch are shared among the processes: the losses are those of one process. A
    run that was killed goes on from its last checkpoint when called again with the same arguments.

    Example:
        >>> import heedful
        >>> from heedful.decoding import Medusa
        >>> from heedful.training import train_drafter
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> drafter = Medusa.for_model(model, num_heads=3)
        >>> train_drafter(drafter, model, tokenizer, "text.txt", "runs/heads", steps=300)  # doctest: +SKIP

    Args:
        drafter: what is trained, by its `loss`; in float32 (a GPU computes in bfloat16 by autocast).
        model: the target; frozen, unless ``joint_groups``.
        tokenizer: the target's.
        data: a file for `read_pieces`, or its `PackedRows` (whose length and seed do not matter).
        out: result folder; ``out/training`` holds the checkpoint and ``log.jsonl``.
        steps: optimiser steps. batch_size: rows of a step, over all processes. length: tokens of a row.
        lr, betas, weight_decay, warmup, clip: of AdamW; warm-up as a share of the steps, then a cosine to zero.
        joint_groups: parameter groups of the model that are trained as well (Medusa-2).
        checkpoint_every: steps between checkpoints. resume: go on from one if it is there.
        progress: a bar on stderr. stop_after: leave, with a checkpoint, after that step.
        finish: called when all steps are done and before the drafter is written, to calibrate it for instance; a run that is
            killed in it goes on from the last step.

    Returns:
        ``out``.

    Raises:
        ValueError: no text, rows longer than the text, ``batch_size`` not a multiple of the processes, or a checkpoint of a
            run with other arguments.
    """
    from accelerate import Accelerator

    lower = (
        model.device.type == "cuda" or model.dtype != torch.float32
    )  # a model in bfloat16 meets a drafter in float32
    accelerator = Accelerator(mixed_precision="bf16" if lower else "no")
    if batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size={batch_size} is not a multiple of the {accelerator.num_processes} processes")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    out, work = Path(out), Path(out) / "training"
    rows = rows_of(data, tokenizer, length, seed)
    if accelerator.is_main_process:
        work.mkdir(parents=True, exist_ok=True)
    trained = {id(p) for group in joint_groups or [] for p in group["params"]}
    if not joint_groups:
        model.requires_grad_(False)
    if model.device.type != "cpu":  # each process has its own device
        model.to(accelerator.device)  # type: ignore[arg-type]
    drafter.to(device=model.device, dtype=torch.float32).train()
    groups: list[dict[str, Any]] = [{"params": [p for p in drafter.parameters() if p.requires_grad], "lr": lr}]
    groups += joint_groups or []
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay)
    base = [group["lr"] for group in optimiser.param_groups]
    objective = _Objective(drafter, model, bool(trained))
    device_placement = model.device.type != "cpu"
    objective, optimiser = accelerator.prepare(objective, optimiser, device_placement=[device_placement] * 2)

    mark = {
        "steps": steps, "batch_size": batch_size, "length": length, "seed": seed, "lr": lr, "drafter": type(drafter).__name__,
    }  # fmt: skip
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    checkpoint = work / "checkpoint.pt"
    done = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=drafter_device(drafter), weights_only=True)
        if state["mark"] != mark:
            raise ValueError(f"{checkpoint} is of a run with {state['mark']}: give another `out`, or resume=False")
        if [p.shape for p in state["parameters"]] != [p.shape for p in parameters]:
            raise ValueError(f"{checkpoint} is of a drafter of other sizes: give another `out`, or resume=False")
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimiser.load_state_dict(state["optimiser"])
        done = state["step"]
    if accelerator.is_main_process:
        _cut_log(work / "log.jsonl", done)

    def save_checkpoint(step: int) -> None:
        if accelerator.is_main_process:
            state = {
                "mark": mark, "step": step, "parameters": [p.detach() for p in parameters], "optimiser": optimiser.state_dict(),
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        accelerator.wait_for_everyone()

    if stop_after is not None and done >= stop_after:
        return out

    places = range(accelerator.process_index, batch_size, accelerator.num_processes)
    began = time.perf_counter()
    with _bar(steps, done, progress and accelerator.is_main_process) as bar:
        for step in range(done, steps):
            for group, rate in zip(optimiser.param_groups, base, strict=True):
                group["lr"] = rate * schedule(step, steps, warmup)
            torch.manual_seed(
                1_000_003 * seed + step
            )  # noise of the loss: the same in every process, and after a resume
            batch, labels = (x.to(drafter_device(drafter)) for x in rows.with_labels(step, places))
            drafter.trained_share = step / steps
            with accelerator.autocast():
                loss, figures = objective(batch, labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, clip)
            optimiser.step()
            optimiser.zero_grad()
            if step % 10 == 0 or step + 1 == steps:
                names = ["loss", *figures]
                values = torch.stack([loss.detach().float(), *(figures[name].float() for name in figures)])
                values = accelerator.reduce(values, "mean")
                if accelerator.is_main_process:
                    now = time.perf_counter()
                    entry = {
                        "step": step,
                        **dict(zip(names, values.tolist(), strict=True)),
                        "lr": optimiser.param_groups[0]["lr"],
                    }
                    entry["tokens_per_second"] = batch_size * length * (step + 1 - done) / (now - began)
                    with (work / "log.jsonl").open("a") as log:
                        log.write(json.dumps(entry) + "\n")
            bar.update(1)
            if (step + 1) % checkpoint_every == 0 or step + 1 == stop_after:
                save_checkpoint(step + 1)
            if step + 1 == stop_after:
                return out
    drafter.eval()
    if finish is not None:
        if done < steps:
            save_checkpoint(steps)
        finish()
    if accelerator.is_main_process:
        drafter.float().save_pretrained(out)
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return out


def _cut_log(file: Path, done: int) -> None:
    """Leaves the entries of the steps that are done: those behind the checkpoint will be taken again."""
    if file.exists():
        entries = [line for line in file.read_text().splitlines() if json.loads(line)["step"] < done]
        file.write_text("".join(f"{line}\n" for line in entries))


def is_main_process() -> bool:
    """Whether this process is the one that writes results (under ``accelerate launch`` there are several)."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def drafter_device(drafter: nn.Module) -> torch.device:
    """The device of a drafter's parameters."""
    return next(drafter.parameters()).device


def _bar(steps: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, disable=not shown, file=sys.stderr, desc="training", unit="step")


@torch.no_grad()
def own_text(model: PreTrainedModel, rows: Tensor, new_tokens: int = 64, prompt: int = 64) -> Tensor:
    """The model's own greedy continuations ``(N, prompt + new_tokens)`` of the first ``prompt`` tokens of each row: what drafters
    are calibrated on."""
    return cast(Any, model).generate(
        rows[:, :prompt].to(model.device), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        pad_token_id=model.config.pad_token_id or 0,
    )  # fmt: skip
