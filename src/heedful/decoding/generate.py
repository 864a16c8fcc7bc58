"""`heedful.generate`, and the same engine as a callable for transformers' own `generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import LongTensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput

from heedful.decoding.drafter import Drafter
from heedful.decoding.engine import Engine
from heedful.decoding.selection import StopChecker
from heedful.decoding.stats import DecodingStats
from heedful.decoding.support import (
    check_arguments,
    check_batch,
    check_call,
    check_model,
    check_prompt,
    check_rope,
    model_device,
)


@dataclass(slots=True)
class Generation:
    """What `heedful.generate` returns.

    Attributes:
        sequences: LongTensor ``(B, length)``, the tensor that ``model.generate`` returns: prompt, new tokens, padding.
        stats: how it went (`DecodingStats`).
    """

    sequences: LongTensor
    stats: DecodingStats


def generate(
    model: PreTrainedModel,
    input_ids: LongTensor,
    drafter: Drafter | None = None,
    streamer: Any = None,
    acceptance: str = "exact",
    engine: str = "auto",
    compile: bool = False,
    posterior_threshold: float | None = None,
    posterior_alpha: float | None = None,
    **kwargs: Any,
) -> Generation:
    """Generates what ``model.generate`` generates, with several tokens per forward of the model.

    Greedy output is token for token that of ``model.generate(do_sample=False)`` (in float32 and lower precision up to near
    ties, since several rows round differently from one); sampled output has exactly the model's distribution, and at batch
    size 1 it is also the same tokens under the same ``torch.manual_seed``. All of generate's logits processors, stopping
    criteria and generation-config defaults apply, and parts attached with `heedful.attach` act on every token.

    Example:
        >>> import heedful
        >>> from heedful.decoding import TokenRecycling
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> ids = tokenizer("It was a dark and stormy night", return_tensors="pt").input_ids
        >>> result = heedful.generate(model, ids, TokenRecycling(), max_new_tokens=64, do_sample=False)
        >>> text, tokens_per_forward = tokenizer.decode(result.sequences[0]), result.stats.tokens_per_step

    Args:
        model: a causal language model of transformers whose attention goes through the attention interface.
        input_ids: LongTensor ``(B, T)``; rows of different lengths are padded on the left, with ``attention_mask=``.
        drafter: proposes tokens; it decides the speed, never the output. None: plain decoding, token by token.
        streamer: a `transformers` streamer, at batch size 1.
        acceptance: ``"exact"``; or ``"typical"``, Medusa's typical acceptance, which is LOSSY: a draft is kept where the model
            gives it more than ``min(posterior_threshold, posterior_alpha exp(-entropy))``, in the eager engine.
        posterior_threshold, posterior_alpha: of typical acceptance alone. Default None: 0.09 and 0.3.
        engine: ``"graph"``: a static cache and steps captured as CUDA graphs; ``"eager"``: a forward of the model called step
            by step; ``"auto"``: graphs on a CUDA device wherever they can be exact, else eager. In graphs sampling agrees with
            ``model.generate`` in distribution, not token for token under a seed. Graphs and their cache stay with the model for
            the next call of the same batch size and length (in steps of 1,024): `heedful.decoding.release_graphs` frees them.
        compile: with graphs: run the forward, with linear layers put together, and the draft through torch.compile as well. It
            takes a minute once for a model of 8 B parameters and pays from some thousand tokens on.
        **kwargs: what ``model.generate`` takes: ``attention_mask``, ``max_new_tokens``, ``do_sample``, ``generation_config``,
            ``logits_processor``, ``stopping_criteria``, ``stop_strings`` with ``tokenizer``, ``cache_implementation="static"``...

    Raises:
        ValueError: before the first forward, for a model or an argument that could not be exact: recurrent, hybrid, ALiBi and
            encoder-decoder models, dynamic or longrope beyond the original length, ``num_beams > 1``, ``assistant_model``,
            ``prompt_lookup_num_tokens``, ``use_cache=False``, ``past_key_values``, per-token outputs, right padding, no prompt, and a
            streamer or a processor with state at batch size > 1. The message names the remedy.
    """
    run = _Run(drafter, streamer, acceptance, engine, compile, posterior_threshold, posterior_alpha)
    if not isinstance(_unwrapped(model), PreTrainedModel):
        raise TypeError(
            f"model must be a model of transformers (heedful.zoo.load gives one), got {type(model).__name__}"
        )
    check_prompt(input_ids)
    check_call(kwargs)
    check_model(_unwrapped(model))
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values: the engine keeps its own full-length cache; pass the whole prompt as input_ids"
        )
    _stop_strings_to_criterion(model, kwargs)
    output = cast(Any, model).generate(input_ids, custom_generate=run, **kwargs)
    assert run.stats is not None
    return Generation(output if not isinstance(output, GenerateDecoderOnlyOutput) else output.sequences, run.stats)  # type: ignore[arg-type]


def custom_generate(
    drafter: Drafter | None,
    streamer: Any = None,
    acceptance: str = "exact",
    engine: str = "auto",
    compile: bool = False,
    posterior_threshold: float | None = None,
    posterior_alpha: float | None = None,
) -> _Run:
    """The engine as a callable for transformers: ``model.generate(..., custom_generate=custom_generate(drafter))``.

    transformers hands neither its ``streamer`` nor its ``tokenizer`` to such a callable: give the streamer here, and for
    ``stop_strings`` pass a ``StopStringCriteria`` as ``stopping_criteria`` (`heedful.generate` does it by itself). It hands
    over no ``assistant_model`` either, so that one is ignored here.

    Args:
        drafter: proposes tokens; None decodes token by token.
        streamer: gets the prompt and every token, at batch size 1.
        acceptance, engine, compile, posterior_threshold, posterior_alpha: as for `generate`.

    Returns:
        The callable; after each run its ``stats`` are the `DecodingStats` of that run.
    """
    return _Run(drafter, streamer, acceptance, engine, compile, posterior_threshold, posterior_alpha)


class _Run:
    """What generate calls once it has prepared everything."""

    def __init__(
        self,
        drafter: Drafter | None,
        streamer: Any,
        acceptance: str,
        engine: str,
        compile: bool,
        threshold: float | None,
        alpha: float | None,
    ) -> None:
        if drafter is not None and not isinstance(drafter, Drafter):
            raise TypeError(f"drafter must be a heedful.decoding.Drafter or None, got {type(drafter).__name__}")
        if acceptance not in ("exact", "typical"):
            raise ValueError(f"acceptance must be 'exact' or 'typical' (lossy), got {acceptance!r}")
        if acceptance == "typical" and (engine == "graph" or compile):
            raise ValueError("acceptance='typical' runs in the eager engine; leave engine and compile out")
        given = {"posterior_threshold": threshold, "posterior_alpha": alpha}
        for name, value in given.items():
            if value is not None and acceptance == "exact":
                raise ValueError(f"{name} belongs to acceptance='typical', which is lossy; exact acceptance has none")
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if engine not in ("auto", "graph", "eager"):
            raise ValueError(f"engine must be 'auto', 'graph' or 'eager', got {engine!r}")
        if compile and engine == "eager":
            raise ValueError("compile=True compiles the steps of engine='graph'; leave engine out or leave compile out")
        self.drafter, self.streamer = drafter, streamer
        self.engine, self.compile = engine, compile
        self.typical = None
        if acceptance == "typical":
            self.typical = {name: value for name, value in given.items() if value is not None}
        self.stats: DecodingStats | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> LongTensor | GenerateDecoderOnlyOutput:
        check_model(model)
        cache = model_kwargs.get("past_key_values")
        fresh = cache is None or not (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0)
        check_arguments(generation_config, model_kwargs, fresh)
        check_batch(logits_processor, self.streamer, model_kwargs.get("attention_mask"), input_ids.shape[0])
        check_rope(model, stopping_criteria.max_length)
        engine = self._engine_class(model, logits_processor, stopping_criteria, model_kwargs)(
            model,
            input_ids,
            drafter=self.drafter,
            processors=logits_processor,
            criteria=stopping_criteria,
            config=generation_config,
            model_kwargs=model_kwargs,
            streamer=self.streamer,
        )
        sequences, self.stats = engine.run()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    def _engine_class(
        self,
        model: PreTrainedModel,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        model_kwargs: dict[str, Any],
    ) -> Callable[..., Engine]:
        if self.typical is not None:
            from heedful.decoding.typical import TypicalEngine

            return partial(TypicalEngine, **self.typical)
        if self.engine == "eager" or (self.engine == "auto" and model_device(model).type != "cuda"):
            if self.compile:
                raise ValueError(
                    "compile=True compiles steps of the graph engine, which needs the model on a CUDA device"
                )
            return Engine
        from heedful.decoding.graph import GraphEngine, unsupported

        if self.compile and self.drafter is not None and self.drafter.rows_per_node > 1:
            raise ValueError(
                f"{type(self.drafter).__name__} appends rows to the model's forward, which is not compiled then: leave compile out"
            )
        reason = unsupported(model, self.drafter, processors, StopChecker(criteria, 1), model_kwargs)
        if reason is None:
            return partial(GraphEngine, compile=self.compile)
        if self.engine == "graph" or self.compile:
            raise ValueError(f"engine='graph' cannot decode this: {reason}; use engine='eager'")
        return Engine


def _unwrapped(model: Any) -> Any:
    """The model inside torch.compile and PEFT wrappers: the one whose generate runs."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _stop_strings_to_criterion(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Replaces ``stop_strings``, wherever they are set, by a criterion: generate would not pass the tokenizer on."""
    config: GenerationConfig | None = kwargs.get("generation_config")
    default = model.generation_config.stop_strings if model.generation_config is not None else None
    strings = kwargs.pop("stop_strings", None) or (config.stop_strings if config is not None else None) or default
    tokenizer = kwargs.pop("tokenizer", None)
    if not strings:
        return
    if tokenizer is None:
        raise ValueError("stop_strings are matched against text: pass tokenizer=, the model's tokenizer, as well")
    if config is not None and config.stop_strings is not None:
        kwargs["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if default is not None:
        kwargs["stop_strings"] = None
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
