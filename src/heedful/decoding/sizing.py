"""How much a forward costs by the number of rows it verifies: what decides how large a tree should be.

In CUDA graphs it costs another time than launched one kernel at a time, and rows other shares of it; `in_graphs` says which
is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from heedful.decoding.cache import TreeCache
from heedful.decoding.masks import MaskBuilder
from heedful.decoding.support import model_device
from heedful.decoding.tree import VerifiedTree, topology
from heedful.seam import Verification

#: Rows of a forward, the root included, that are timed.
ROWS = (1, 2, 4, 8, 16, 32, 64, 81)
_ROWS_IN_GRAPHS = (1, 16, 64, 128)
_CONTEXT = 256  # tokens in the cache while timing
_SECONDS, _MOST_RUNS = 1.2, 20  # spent on all sizes at least, unless each has been timed so often; and twice at least
# Relative costs where timing is not possible: measured with a 19 M model on 2 cores; on a GPU small trees are nearly free.
_USUAL = {"cpu": (1.0, 1.2, 1.35, 1.5, 2.0, 2.6, 3.2, 3.6), "cuda": (1.0, 1.02, 1.04, 1.06, 1.08, 1.1, 1.2, 1.25)}

_measured: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], np.ndarray]] = WeakKeyDictionary()
_captured: ContextVar[bool] = ContextVar("_captured", default=False)


@contextmanager
def in_graphs() -> Iterator[None]:
    """Within it captured CUDA graphs are timed: the engine that decodes in them begins its drafters there."""
    token = _captured.set(True)
    try:
        yield
    finally:
        _captured.reset(token)


def captured() -> bool:
    """Whether `in_graphs` is around."""
    return _captured.get()


def setting(model: PreTrainedModel, batch_size: int) -> tuple[Any, ...]:
    """What a fit to the device holds for."""
    return id(model), model.dtype, model_device(model), torch.get_num_threads(), batch_size, captured()


def forward_costs(model: PreTrainedModel, batch_size: int = 1, max_rows: int = ROWS[-1]) -> np.ndarray:
    """Seconds of one forward that verifies 1, 2, ..., ``max_rows`` rows in each row of a batch.

    Some sizes are timed once per model, device, dtype and number of threads, on `_CONTEXT` tokens; what lies between is
    interpolated, and what lies beyond extrapolated. A model with attached parts is not timed, since its parts would take
    those forwards for text: the usual relative costs are returned then (in units of a forward of one row).

    Returns:
        ``(max_rows,)`` float64, never decreasing; entry n - 1 is the cost of n rows.
    """
    device = model_device(model)
    sizes = _ROWS_IN_GRAPHS if captured() else ROWS
    key = (device, model.dtype, torch.get_num_threads(), captured())
    times = _measured.get(model, {}).get(key)
    if times is None:
        if _attached(model):
            times = np.interp(sizes, ROWS, _USUAL.get(device.type, _USUAL["cuda"]))
        else:
            times = _time_graphs(model) if captured() else _time(model, device)
            _measured.setdefault(model, {})[key] = times
    rows = np.arange(1, max_rows + 1) * batch_size
    slope = max(0.0, (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]))
    return np.interp(rows, sizes, times) + slope * np.maximum(0, rows - sizes[-1])


@torch.no_grad()
def seconds_of(run: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """Seconds of one call, the shortest of some, after one that does not count."""
    if captured():
        from heedful.decoding.graph import replay_seconds

        return replay_seconds(run, device, runs)
    best = float("inf")
    for number in range(runs + 1):
        _wait(device)
        began = perf_counter()
        run()
        _wait(device)
        best = min(best, perf_counter() - began) if number else best
    return best


def _attached(model: PreTrainedModel) -> bool:
    try:
        return Verification(model).attached
    except ValueError:  # a kernel that cannot verify trees
        return True


def _time_graphs(model: PreTrainedModel) -> np.ndarray:
    from heedful.decoding.graph import verify_seconds

    return np.maximum.accumulate(verify_seconds(model, _ROWS_IN_GRAPHS, _CONTEXT))


@torch.no_grad()
def _time(model: PreTrainedModel, device: torch.device) -> np.ndarray:
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or 1 << 30
    context = max(1, min(_CONTEXT, longest - ROWS[-1]))
    # The class's own forward: hooks and wrappers on the instance are not meant for timing, except those that place weights.
    forward = model if hasattr(model, "_hf_hook") else lambda **inputs: type(model).forward(model, **inputs)
    sizes = [rows for rows in ROWS if context + rows <= longest]
    best, spent, runs = dict.fromkeys(sizes, float("inf")), 0.0, 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=model.training):
        cache = TreeCache(model)
        masks = MaskBuilder(config, None, model.dtype, device, None)
        tokens = torch.zeros((1, max(context, ROWS[-1])), dtype=torch.long, device=device)
        forward(input_ids=tokens[:, :context], past_key_values=cache, use_cache=True, return_dict=True)
        # In turn, so that what else the machine does in the meantime falls on all sizes alike.
        while runs < 2 or (runs < _MOST_RUNS and spent < _SECONDS):
            for rows in sizes:
                shape = topology(tuple(range(-1, rows - 1)))
                mask = masks.build([VerifiedTree([0] * rows, shape)], [context], context, rows)
                _wait(device)
                began = perf_counter()
                forward(
                    input_ids=tokens[:, :rows],
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    return_dict=True,
                )
                _wait(device)
                seconds = perf_counter() - began
                cache.commit(None, None, context)
                best[rows], spent = min(best[rows], seconds), spent + seconds
            runs += 1
    # A tiny model: rows that its context has no room for are as dear as the most that fit.
    times = [best[rows if rows in best else sizes[-1]] for rows in ROWS]
    return np.maximum.accumulate(np.array(times))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
