"""The command line: `heedful ...`. Thin: every command checks its input, calls one public function and prints the result.

Nothing heavy is imported before a command needs it, so that `heedful --help` is quick.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from heedful.decoding import Drafter

app = typer.Typer(
    help="Published attention methods as parts for the models you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(
    help="Measure against the peers a user would pick, in one run.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")
train_app = typer.Typer(
    help="Train a drafter, or tune a model; under `accelerate launch -m heedful.cli train ...` on several devices.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(train_app, name="train")

ModelOption = Annotated[str, typer.Option("--model", "-m", help="A model of the zoo, a folder, or a hub id.")]
UNTRAINED = ("none", "prompt-lookup", "token-recycling", "sequence")
TRAINED = {"medusa": "Medusa", "hidden-transfer": "HiddenTransfer", "longspec": "LongSpec"}
DRAFTERS = (*UNTRAINED, *TRAINED)
DEFAULT_MODEL = "classics-20m"


class BadInput(Exception):
    """Something the user can mend: one line, exit status 2."""


# --- checks, before any work -------------------------------------------------------------------------------------------------


def _model_folder(name: str) -> str:
    """A zoo name or folder as a checked path; anything else is a hub id and stays as it is."""
    from heedful import zoo

    if name in zoo.names():
        return str(zoo.path(name))
    folder = Path(name)
    if folder.exists():
        if not folder.is_dir():
            raise BadInput(f"{name} is a file: --model takes a folder with config.json and weights")
        if not (folder / "config.json").exists():
            raise BadInput(f"{name} has no config.json: --model takes a folder that save_pretrained wrote")
        weights = [path for pattern in ("*.safetensors", "*.safetensors.index.json") for path in folder.glob(pattern)]
        if not weights:
            raise BadInput(f"{name} has no weights (*.safetensors): save the model there with save_pretrained")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name:
        raise BadInput(f"no model {name}: there is no such folder; the zoo has {', '.join(zoo.names())}")
    if "/" not in name:
        raise BadInput(
            f"no model {name!r}: the zoo has {', '.join(zoo.names())}; give a folder or a hub id (owner/name) for another"
        )
    return name


def _load(name: str, landmarks: bool = False) -> tuple[Any, Any]:
    """Model (eval mode, float32 on the CPU, bfloat16 on a GPU) and tokenizer; `landmarks`: whether it may be a landmark model."""
    folder = _model_folder(name)
    import torch
    import transformers

    import heedful.layers.moh  # converted models name its attention

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        if getattr(transformers.AutoConfig.from_pretrained(folder), "landmark", None) is not None:
            if not landmarks:  # AutoModelForCausalLM would leave them out, silently
                raise BadInput(
                    f"{name} is a landmark model, which only `heedful train landmark` takes: in Python, "
                    f"heedful.layers.load_landmark({name!r}).generate(...)"
                )
            load = heedful.layers.load_landmark
        model = load(folder, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"cannot load the model {name}: {_first_line(error)}") from error
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _drafter(name: str, model: str) -> Drafter | None:
    """A drafter by name (those with weights: the zoo's, for the zoo's model), or the folder of a trained one."""
    from heedful import decoding

    _check_drafter(name, model)
    if name == "none":
        return None
    if name == "prompt-lookup":
        return decoding.PromptLookup()
    if name == "token-recycling":
        return decoding.TokenRecycling()
    if name == "sequence":
        return decoding.Sequence(decoding.PromptLookup(), decoding.TokenRecycling())
    folder, kind = _trained(name, model)
    try:
        return getattr(decoding, TRAINED[kind]).from_pretrained(folder)
    except ValueError as error:
        raise BadInput(_first_line(error)) from error


def _trained(name: str, model: str) -> tuple[Path, str]:
    """Folder and kind of a drafter with weights. The arguments in its config tell the kind."""
    from heedful import zoo

    if name in TRAINED:
        folder = f"{model}-{name}"
        if folder not in zoo.drafters():
            raise BadInput(
                f"no {name} drafter for {model}: the zoo has {', '.join(zoo.drafters())}; train one with `heedful train {name}` "
                f"and give its folder"
            )
        return zoo.path(folder), name
    config = Path(name) / "config.json"
    if not config.is_file():
        raise BadInput(f"no drafter {name!r}: there are {', '.join(DRAFTERS)}, or the folder of a trained one")
    try:
        arguments = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{config} is no JSON: {_first_line(error)}") from error
    for key, kind in {"num_heads": "medusa", "transfer_layers": "hidden-transfer", "tree_shape": "longspec"}.items():
        if key in arguments:
            return Path(name), kind
    raise BadInput(f"{name} is no folder of a drafter: its config.json has none of their arguments")


def _check_drafter(name: str, model: str) -> None:
    if name not in UNTRAINED:
        _trained(name, model)


def _check_drafter_names(names: str, model: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise BadInput(f"no drafter given: there are {', '.join(DRAFTERS)}")
    for name in chosen:
        _check_drafter(name, model)
    return chosen


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        raise BadInput(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise BadInput(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise BadInput(f"cannot write {path}: no permission")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _write_json(path: Path, value: Any) -> None:
    from heedful.report import write_atomically

    write_atomically(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def _progress(stages: tuple[str, ...] | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A progress display on stderr, so that stdout stays clean."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {stage: bar.add_task(stage, total=1, start=False) for stage in stages or ()}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=max(1, total))
            bar.start_task(tasks[stage])
            bar.update(tasks[stage], completed=done, total=max(1, total))

        yield update


# --- commands ------------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_methods(as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False) -> None:
    """The methods in this library."""
    from heedful import catalog

    if as_json:
        typer.echo(json.dumps([method.to_dict() for method in catalog.methods()], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "kind", "entry point", "what it does", "arXiv"):
        table.add_column(column, overflow="fold")
    for method in catalog.methods():
        table.add_row(method.slug, method.kind, method.entry_point.replace(":", "."), method.does, method.arxiv)
    Console().print(table)


@app.command()
def demo(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    report: Annotated[Path, typer.Option(help="Where the page with the pictures goes.")] = Path("heedful-report.html"),
) -> None:
    """One method of each kind on the bundled model: lossless decoding, retrieval heads, sparse attention, sinks."""
    _check_writable(json_path)
    _check_writable(report)
    from heedful.demo import STAGES, run_demo
    from heedful.report import render, write_atomically

    with _progress(STAGES) as progress:
        result = run_demo(progress=progress)
    figures = result.to_json()
    write_atomically(report, render(result))
    if json_path is not None:
        _write_json(json_path, figures)
    typer.echo(_demo_summary(figures, str(report)))


def _demo_summary(figures: dict[str, Any], report: str) -> str:
    heads = (
        ", ".join(f"{layer}.{head} ({score:.2f})" for layer, head, score in figures["retrieval_heads"][:5]) or "none"
    )
    moved = (
        ", ".join(f"{layer}.{head} {mass:.1%}" for layer, head, mass in figures["calibration"]["mass_moved"][:4])
        or "no late sinks"
    )
    return "\n".join(
        [
            f"Token Recycling   {'identical to plain decoding' if figures['lossless'] else 'DIFFERS from plain decoding (near tie)'}, "
            f"{figures['tokens_per_second']:.0f} against {figures['plain_tokens_per_second']:.0f} tokens/s: {figures['speedup']:.2f}x "
            f"with {figures['tokens_per_forward']:.2f} tokens per forward",
            f"Retrieval heads   {heads}",
            f"                  recall {figures['recall']:.0%}, without them {figures['recall_without_retrieval_heads']:.0%}, "
            f"without as many random others {figures['recall_without_random_heads']:.0%}",
            f"HiP attention     reads {figures['hip']['keys_read']:.0%} of the keys, logits within {figures['hip']['relative_error']:.1%} of dense attention",
            f"Attention sinks   calibrated; attention moved by head: {moved}",
            f"Report            {report} ({figures['seconds']:.0f} s)",
        ]
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: ModelOption = DEFAULT_MODEL,
    drafter: Annotated[str, typer.Option(help=f"One of {', '.join(DRAFTERS)}, or a folder.")] = "token-recycling",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus, when sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Decode plainly too, and compare text and speed.")] = False,
) -> None:
    """Continue PROMPT, losslessly drafted."""
    import heedful

    _model_folder(model)
    chosen = _drafter(drafter, model)
    if not prompt.strip():
        raise BadInput("the prompt is empty")
    loaded, tokenizer = _load(model)
    import torch

    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(loaded.device)
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and ids.shape[1] + max_new_tokens > context:
        raise BadInput(
            f"the prompt has {ids.shape[1]} tokens and {max_new_tokens} more were asked for, but the context of {model} is {context}: "
            "shorten the prompt or lower --max-new-tokens"
        )
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}

    def run(with_drafter: Any) -> Any:
        torch.manual_seed(seed)
        try:
            return heedful.generate(loaded, ids, with_drafter, max_new_tokens=max_new_tokens, **sampling)
        except ValueError as error:
            raise BadInput(_first_line(error)) from error

    result = run(chosen)
    typer.echo(tokenizer.decode(result.sequences[0, ids.shape[1] :], skip_special_tokens=True))
    stats = result.stats
    line = f"{stats.new_tokens[0]} tokens, {stats.tokens_per_second:.0f} tokens/s, {stats.tokens_per_step:.2f} tokens per forward ({drafter})"
    if compare:
        plain = run(None)
        same = plain.sequences.shape == result.sequences.shape and bool((plain.sequences == result.sequences).all())
        speed = plain.stats.tokens_per_second
        ratio = f"{stats.tokens_per_second / speed:.2f}x" if speed else "-"
        line += (
            f"\nplain: {speed:.0f} tokens/s; {ratio}; the tokens are {'identical' if same else 'different (near tie)'}"
        )
    typer.echo(line, err=True)


@app.command()
def heads(
    model: ModelOption = DEFAULT_MODEL,
    plot: Annotated[Path | None, typer.Option(help="Write the layer x head map as a picture (png, svg, pdf).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help='Write the scores as {"layer-head": [...]}.')] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt; may be given several times. Default: 512.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Prompts for each length and depth.")] = 2,
    haystack: Annotated[
        Path | None, typer.Option(help="Text file to hide needles in; default: the bundled prose.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of needles and places.")] = 0,
) -> None:
    """Find the retrieval heads of a model."""
    _check_writable(json_path)
    if haystack is not None and not haystack.is_file():
        raise BadInput(f"no haystack {haystack}: there is no such file")
    _check_picture(plot)
    loaded, tokenizer = _load(model)
    from heedful.interp import retrieval_scores

    with _progress() as progress:
        try:
            scores = retrieval_scores(
                loaded, tokenizer, haystack.read_text(encoding="utf-8") if haystack else None, lengths=tuple(length or (512,)),
                instances=instances, seed=seed, progress=lambda done, total: progress("retrieval heads", done, total),
            )  # fmt: skip
        except ValueError as error:
            raise BadInput(_first_line(error)) from error
    if json_path is not None:
        _write_json(json_path, json.loads(scores.to_json()))
    if plot is not None:
        _save_picture(plot, scores.plot())
    typer.echo(str(scores))


def _check_picture(path: Path | None) -> None:
    from importlib.util import find_spec

    _check_writable(path)
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"cannot write {path}: the picture's name must end in .png, .svg or .pdf")
    if path is not None and find_spec("matplotlib") is None:
        raise BadInput("pictures need matplotlib: pip install 'heedful[plot]'")


def _save_picture(path: Path, figure: Any) -> None:
    partial = path.with_name(f".partial-{path.name}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@bench_app.command("decode")
def bench_decode(
    questions: Annotated[
        Path, typer.Option(help="Spec-Bench's question.jsonl, or JSON lines with 'turns' and 'category'.")
    ],
    drafters: Annotated[str, typer.Option(help="Comma-separated.")] = "prompt-lookup,token-recycling",
    model: ModelOption = DEFAULT_MODEL,
    per_category: Annotated[int, typer.Option(min=1, help="Questions of each category.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens for each question.")] = 128,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write speed-ups by category as a picture (png, svg, pdf).")] = None,
) -> None:
    """Decoding speed of drafters against the plain loop and transformers, on Spec-Bench questions."""
    _check_writable(json_path)
    _check_picture(plot)
    names = _check_drafter_names(drafters, model)
    from heedful.decoding import bench

    try:
        asked = bench.read_questions(questions, per_category=per_category)
    except (OSError, ValueError) as error:
        raise BadInput(_first_line(error)) from error
    contestants = {name: drafter for name in names if (drafter := _drafter(name, model)) is not None}
    loaded, tokenizer = _load(model)
    try:
        with _progress() as progress:
            result = bench.bench_decode(
                loaded, tokenizer, asked, contestants, max_new_tokens=max_new_tokens,
                progress=lambda done, total: progress("questions", done, total),
            )  # fmt: skip
    except ValueError as error:
        raise BadInput(_first_line(error)) from error
    if json_path is not None:
        _write_json(json_path, result.to_json())
    if plot is not None:
        _save_picture(plot, result.plot())
    typer.echo(result.table())


DataOption = Annotated[
    Path, typer.Option(help="Text: a .txt file, or JSON lines with text, question/answer, turns or messages.")
]
OutOption = Annotated[Path, typer.Option(help="Folder for the drafter.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows of a step, over all processes.")]
LengthOption = Annotated[int, typer.Option(min=8, help="Tokens of a row.")]
RateOption = Annotated[float, typer.Option(help="Highest learning rate.")]
SeedOption = Annotated[int, typer.Option(help="Of rows and weights.")]
StageLengthOption = Annotated[int | None, typer.Option(min=8, help="Tokens of a row. Default: the stage's.")]
StageRateOption = Annotated[float | None, typer.Option(help="Highest learning rate. Default: the stage's.")]
BeginOption = Annotated[
    Path | None, typer.Option("--drafter", help="Folder of a drafter to go on from: stage 2 needs stage 1's.")
]
ResumeOption = Annotated[bool, typer.Option(help="Go on from the folder's checkpoint.")]


def _train(name: str, model: str, data: Path, out: Path, begin: Path | None = None, **options: Any) -> None:
    if not data.is_file():
        raise BadInput(f"no training text {data}: give a .txt or .jsonl file")
    if out.exists() and not out.is_dir():
        raise BadInput(f"cannot write {out}: it is a file")
    if options.get("stage") == 2 and begin is None:
        raise BadInput("--stage 2 goes on from the drafter of stage 1: give its folder as --drafter")
    if begin is not None:
        _, kind = _trained(str(begin), model)
        if kind != name:
            raise BadInput(f"{begin} holds a {kind} drafter, not a {name} one")
    from heedful import decoding, training

    loaded, tokenizer = _load(model, landmarks=name == "landmark")
    loaded.float()
    try:
        if begin is not None:
            options["drafter"] = getattr(decoding, TRAINED[name]).from_pretrained(begin)
        getattr(training, f"train_{name.replace('-', '_')}")(loaded, tokenizer, data, out, **options)
    except ValueError as error:
        raise BadInput(_first_line(error)) from error
    if _leave_the_others() == 0:
        typer.echo(f"written to {out}")


def _leave_the_others() -> int:
    """End the process group of `accelerate launch`, in which this process had the rank returned.

    Gloo aborts a process that finalizes its interpreter within a group.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0
    rank = dist.get_rank()
    dist.barrier()
    gc.collect()  # a model wrapped for the group would keep it alive
    dist.destroy_process_group()
    return rank


@train_app.command("medusa")
def train_medusa(
    data: DataOption, out: OutOption, model: ModelOption = DEFAULT_MODEL, steps: StepsOption = 1000, batch_size: BatchOption = 16,
    length: LengthOption = 512, lr: StageRateOption = None, seed: SeedOption = 0, resume: ResumeOption = True,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads, each a token further ahead.")] = 4,
    stage: Annotated[int, typer.Option(min=1, max=2, help="1: heads alone; 2: with the model (its output changes).")] = 1,
    begin: BeginOption = None,
) -> None:  # fmt: skip
    """Train Medusa heads on a frozen model (stage 1) or together with it (stage 2), and calibrate their tree."""
    _train("medusa", model, data, out, begin, steps=steps, batch_size=batch_size, length=length, lr=lr, seed=seed, resume=resume,
           num_heads=num_heads, stage=stage)  # fmt: skip


@train_app.command("hidden-transfer")
def train_hidden_transfer(
    data: DataOption, out: OutOption, model: ModelOption = DEFAULT_MODEL, steps: StepsOption = 1000, batch_size: BatchOption = 16,
    length: LengthOption = 512, lr: RateOption = 2e-3, seed: SeedOption = 0, resume: ResumeOption = True,
    num_transfer_steps: Annotated[int, typer.Option(min=1, help="Tokens ahead.")] = 3,
) -> None:  # fmt: skip
    """Train Hidden Transfer's maps on a frozen model, and calibrate their tree."""
    _train("hidden-transfer", model, data, out, steps=steps, batch_size=batch_size, length=length, lr=lr, seed=seed, resume=resume,
           num_transfer_steps=num_transfer_steps)  # fmt: skip


@train_app.command("longspec")
def train_longspec(
    data: DataOption, out: OutOption, model: ModelOption = DEFAULT_MODEL, steps: StepsOption = 1000, batch_size: BatchOption = 16,
    length: StageLengthOption = None, lr: StageRateOption = None, seed: SeedOption = 0, resume: ResumeOption = True,
    stage: Annotated[int, typer.Option(min=1, max=2, help="1: short texts, positions moved; 2: long ones.")] = 1,
    begin: BeginOption = None,
) -> None:  # fmt: skip
    """Train LongSpec's draft block on a frozen model: on short texts (stage 1), then on long ones (stage 2)."""
    _train("longspec", model, data, out, begin, steps=steps, batch_size=batch_size, length=length, lr=lr, seed=seed, resume=resume,
           stage=stage)  # fmt: skip


@train_app.command("landmark")
def train_landmark(
    data: DataOption, out: Annotated[Path, typer.Option(help="Folder for the tuned model.")], model: ModelOption = DEFAULT_MODEL,
    steps: StepsOption = 1000, batch_size: BatchOption = 16,
    length: Annotated[int, typer.Option(min=8, help="Positions of a row, landmarks counted.")] = 512,
    lr: RateOption = 2e-4, seed: SeedOption = 0, resume: ResumeOption = True,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block, its landmark not counted.")] = 63,
    top_k: Annotated[int, typer.Option(min=1, help="Blocks that a query reads at inference.")] = 4,
) -> None:  # fmt: skip
    """Turn a model into a landmark model: trained on short rows, it retrieves from contexts of any length."""
    _train("landmark", model, data, out, steps=steps, batch_size=batch_size, length=length, lr=lr, seed=seed, resume=resume,
           block_size=block_size, top_k=top_k)  # fmt: skip


@train_app.command("moh")
def train_moh(
    data: DataOption, out: Annotated[Path, typer.Option(help="Folder for the converted model.")], model: ModelOption = DEFAULT_MODEL,
    steps: StepsOption = 1000, batch_size: BatchOption = 16, length: LengthOption = 1024, lr: RateOption = 3e-4,
    seed: SeedOption = 0, resume: ResumeOption = True,
    active_ratio: Annotated[float, typer.Option(help="Share of the query heads that each token has.")] = 0.75,
    shared_ratio: Annotated[float, typer.Option(help="Share of the query heads that all tokens have.")] = 0.5,
    distillation: Annotated[float, typer.Option(min=0, help="Weight of the divergence from the model as it was.")] = 0.0,
) -> None:  # fmt: skip
    """Convert a model to Mixture-of-Head attention and train it to do with fewer heads a token."""
    _train("moh", model, data, out, steps=steps, batch_size=batch_size, length=length, lr=lr, seed=seed, resume=resume,
           active_ratio=active_ratio, shared_ratio=shared_ratio, distillation=distillation)  # fmt: skip


@train_app.command("sinklora")
def train_sinklora(
    data: DataOption, out: Annotated[Path, typer.Option(help="Folder for the tuned model.")], model: ModelOption = DEFAULT_MODEL, steps: StepsOption = 1000, batch_size: BatchOption = 64,
    length: LengthOption = 16384, lr: RateOption = 2e-5, seed: SeedOption = 0, resume: ResumeOption = True,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward.")] = 1,
    group_size_ratio: Annotated[float, typer.Option(help="Share of a row that is a group; 1 for full attention.")] = 0.25,
    shift_ratio: Annotated[float, typer.Option(help="Share of the heads that are shifted by half a group.")] = 0.25,
    num_sink_tokens: Annotated[int, typer.Option(min=0, help="First tokens that all later ones see.")] = 4,
) -> None:  # fmt: skip
    """Extend a model's context: interpolated positions, LoRA with norms and embeddings, attention in groups."""
    _train("sinklora", model, data, out, steps=steps, batch_size=batch_size, length=length, lr=lr, seed=seed, resume=resume,
           micro_batch_size=micro_batch_size, group_size_ratio=group_size_ratio, shift_ratio=shift_ratio,
           num_sink_tokens=num_sink_tokens)  # fmt: skip


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="A method: see `heedful list`.")],
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run.")] = False,
) -> None:
    """Run the reproduction of a method's claim and record its figures (needs the repository)."""
    import subprocess

    from heedful import catalog

    try:
        method = catalog.get(slug)
    except ValueError as error:
        raise BadInput(_first_line(error)) from error
    script = Path(__file__).parents[2] / "reproductions" / f"{method.slug.replace('-', '_')}.py"
    if not script.exists():
        raise BadInput(
            f"no script {script}: reproductions are in the repository, not in the installed package; install it with pip install -e ."
        )
    raise typer.Exit(subprocess.run([sys.executable, str(script), *(["--quick"] if quick else [])]).returncode)


def main() -> None:
    """Runs the command line; bad input ends with one line on stderr and status 2."""
    try:
        app()
    except BadInput as error:
        typer.echo(f"heedful: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
