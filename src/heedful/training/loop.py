"""The steps of a training, whatever is trained: rates, processes, a log, and checkpoints that a killed run goes on from.

A recipe computes the gradients of a step; `Loop` does what comes before and after:

    for step in loop:
        loss = objective(rows.batch(step, loop.places))
        loop.backward(loss)
        loop.take({"loss": loss}, tokens)
    if not loop.complete:  # stop_after
        return out
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear warm-up over a share of the steps, then half a cosine to zero."""
    begin = max(1, round(warmup * steps))
    if step < begin:
        return (step + 1) / begin
    return 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1, steps - begin)))


def accelerator_for(steps: int, batch_size: int, micro_batch_size: int = 1) -> Accelerator:
    """The processes that share a batch: those of ``accelerate launch``, or this one.

    It computes in the parameters' own dtype; recipes lower it with `torch.autocast`, since one process may train a model on a GPU
    and then another on a CPU.

    Raises:
        ValueError: no steps, or a batch that the processes cannot share.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if micro_batch_size < 1 or batch_size < 1 or batch_size % (accelerator.num_processes * micro_batch_size):
        micro = "" if micro_batch_size == 1 else f" times micro_batch_size={micro_batch_size}"
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of the {accelerator.num_processes} processes{micro}"
        )
    return accelerator


class Loop:
    """The steps that are left, one optimiser step each; they begin at the checkpoint of a run with the same arguments.

    Before a step the rates are set, and torch's generator: by the seed and the step, so that noise is the same in every process
    and after a resume.

    Attributes:
        places: this process's rows of a batch.
        done: steps taken, in earlier calls too. tokens: that they learnt from.
        complete: whether all are.

    Args:
        accelerator: of `accelerator_for`.
        out: result folder; ``out/training`` holds ``checkpoint.pt`` and ``log.jsonl``.
        optimiser: prepared; its groups' ``lr`` are the highest rates.
        mark: arguments that a checkpoint must agree in.
        steps, batch_size, seed, clip: of the training.
        rate: factor on the rates of a step.
        checkpoint_every: steps between checkpoints. resume: go on from one if it is there. progress: a bar on stderr.
        stop_after: leave, with a checkpoint, after that step.

    Raises:
        ValueError: the checkpoint is of a run with other arguments, or of other sizes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        out: Path,
        optimiser: Any,
        mark: dict[str, Any],
        *,
        steps: int,
        batch_size: int,
        rate: Callable[[int], float],
        seed: int = 0,
        clip: float = 1.0,
        checkpoint_every: int = 200,
        resume: bool = True,
        progress: bool = True,
        stop_after: int | None = None,
    ) -> None:
        self.accelerator, self.optimiser, self.mark = accelerator, optimiser, mark
        self.steps, self.rate, self.seed, self.clip = steps, rate, seed, clip
        self.checkpoint_every, self.progress = checkpoint_every, progress
        self.last = steps if stop_after is None else min(steps, stop_after)
        self.places = range(accelerator.process_index, batch_size, accelerator.num_processes)
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self._highest = [group["lr"] for group in optimiser.param_groups]
        self._work = out / "training"
        self._checkpoint = self._work / "checkpoint.pt"
        self.done = self.tokens = 0
        if resume and self._checkpoint.exists():
            self._restore()
        if accelerator.is_main_process:
            self._work.mkdir(parents=True, exist_ok=True)
            self._cut_log()
        accelerator.wait_for_everyone()  # nobody writes a checkpoint that another has yet to read
        self._began, self._before = time.perf_counter(), self.tokens
        self._bar: Any = None

    @property
    def complete(self) -> bool:
        return self.done >= self.steps

    @property
    def share(self) -> float:
        """Share of the steps that are taken."""
        return self.done / self.steps

    def __iter__(self) -> Iterator[int]:
        from tqdm import tqdm

        shown = self.progress and self.accelerator.is_main_process
        options: dict[str, Any] = {"file": sys.stderr, "desc": "training", "unit": "step", "disable": not shown}
        with tqdm(total=self.steps, initial=self.done, **options) as self._bar:
            while self.done < self.last:
                for group, highest in zip(self.optimiser.param_groups, self._highest, strict=True):
                    group["lr"] = highest * self.rate(self.done)
                torch.manual_seed(1_000_003 * self.seed + self.done)
                yield self.done

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def take(self, figures: dict[str, Tensor], tokens: int) -> None:
        """Takes the step whose gradients are there.

        Args:
            figures: scalars of this process for the log, which holds their means over the processes.
            tokens: that all processes learnt from in this step.
        """
        self.accelerator.clip_grad_norm_(self.parameters, self.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        step, self.done, self.tokens = self.done, self.done + 1, self.tokens + tokens
        if step % 10 == 0 or self.done == self.steps:
            self._log(step, figures)
        self._bar.update(1)
        if (self.done % self.checkpoint_every == 0 and not self.complete) or self.done == self.last < self.steps:
            self.save()

    def finish(self, *results: Any) -> None:
        """Ends a complete run: the main process writes the results (by ``save_pretrained``) to `out`, and the checkpoint goes."""
        if self.accelerator.is_main_process:
            for result in results:
                result.save_pretrained(self._work.parent)
            self._checkpoint.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Writes a checkpoint; a kill leaves the old one or the new one, never half of one."""
        if self.accelerator.is_main_process:
            state = {
                "mark": self.mark, "step": self.done, "tokens": self.tokens, "parameters": [p.detach() for p in self.parameters],
                "optimiser": self.optimiser.state_dict(),
            }  # fmt: skip
            part = self._checkpoint.with_suffix(".tmp")
            torch.save(state, part)
            part.replace(self._checkpoint)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        state = torch.load(self._checkpoint, map_location=self.parameters[0].device, weights_only=True)
        another = "give another `out`, or resume=False"
        if state["mark"] != self.mark:
            raise ValueError(f"{self._checkpoint} is of a run with {state['mark']}: {another}")
        if [p.shape for p in state["parameters"]] != [p.shape for p in self.parameters]:
            raise ValueError(f"{self._checkpoint} is of parameters of other sizes: {another}")
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        self.done, self.tokens = state["step"], state["tokens"]

    def _log(self, step: int, figures: dict[str, Tensor]) -> None:
        values = torch.stack([value.detach().float() for value in figures.values()])
        values = self.accelerator.reduce(values, "mean")  # type: ignore[assignment]
        if not self.accelerator.is_main_process:
            return
        spent = time.perf_counter() - self._began
        entry = {"step": step, **dict(zip(figures, values.tolist(), strict=True))}
        entry |= {"lr": self.optimiser.param_groups[0]["lr"], "tokens": self.tokens, "seconds": round(spent, 3)}
        entry["tokens_per_second"] = (self.tokens - self._before) / spent
        with (self._work / "log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")

    def _cut_log(self) -> None:
        """Leaves the entries of the steps that are done: those behind the checkpoint will be taken again."""
        file = self._work / "log.jsonl"
        if file.exists():
            entries = [line for line in file.read_text().splitlines() if json.loads(line)["step"] < self.done]
            file.write_text("".join(f"{line}\n" for line in entries))
