"""The loop that trains drafters: data, equal losses on one and two processes, going on after a kill, folders."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_on_two
from tiny_models import Letters, build

import heedful
from heedful import cli
from heedful.decoding import HiddenTransfer, LongSpec, Medusa, longspec
from heedful.training import self_distill, train_drafter, train_hidden_transfer, train_longspec, train_medusa
from heedful.training.rows import PackedRows, read_documents, read_pieces

SMALL = {"steps": 4, "batch_size": 4, "length": 24, "progress": False}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It was the best of times, it was the worst of times. " * 60)
    return file


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "training" / "log.jsonl").read_text().splitlines()]


def test_documents(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [
        {"text": "one"},
        {"question": "two", "answer": "2"},
        {"turns": ["three", "3"]},
        {"messages": [{"role": "user", "content": "four"}]},
        {"conversations": [{"from": "human", "value": "five"}]},
        {"prompt": "s", "answer": "ix"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    documents = [document.strip() for document in read_documents(file)]
    assert documents == ["one", "Question: two\nAnswer: 2", "three\n3", "four", "five", "six"]
    assert read_pieces(file)[-1] == [("s", False), ("ix", True)]
    for bad, message in (('{"x": 1}', "line 1: no 'text'"), ("{", "line 1: not JSON"), ("", "holds no text")):
        file.write_text(bad)
        with pytest.raises(ValueError, match=message):
            read_documents(file)
    with pytest.raises(ValueError, match="no training text"):
        read_documents(tmp_path / "none.txt")


def test_rows_are_the_same_whoever_reads_them(text):
    rows = PackedRows(read_documents(text), Letters(), 16, seed=3)
    whole = rows.batch(5, range(4))
    assert whole.shape == (4, 16)
    assert (whole[:, 0] == 0).all()
    assert torch.equal(torch.stack([rows.batch(5, [place])[0] for place in range(4)]), whole)
    assert not torch.equal(rows.batch(6, range(4)), whole)
    with pytest.raises(ValueError, match="too few for rows of 9999"):
        PackedRows(["short"], Letters(), 9999, seed=0)


def test_a_text_is_encoded_once_and_as_by_itself(tmp_path):
    """Many documents at once, on all cores; then rows of any length without encoding again."""
    tokenizer = heedful.zoo.load("classics-20m")[1]
    pieces = [[(f"Question {i}: ", False), ("why? " * i, True)] for i in range(70)]
    rows = PackedRows(pieces, tokenizer, 16, seed=3)
    stream, learnt = [], []
    for document in pieces:
        for said, counts in document:
            ids = tokenizer(said, add_special_tokens=False).input_ids
            stream += ids
            learnt += [counts] * len(ids)
        stream.append(tokenizer.eos_token_id)
        learnt.append(True)
    assert rows.stream.tolist() == stream
    assert rows.learnt.tolist() == learnt
    others = rows.of(24, seed=4)
    assert torch.equal(others.batch(0, [0, 1]), PackedRows(pieces, tokenizer, 24, seed=4).batch(0, [0, 1]))
    assert rows.batch(0, [0]).shape == (1, 16)
    drafter = Medusa.for_model(model := build("llama", vocab_size=8192), num_heads=1)
    out = train_drafter(drafter, model, tokenizer, rows, tmp_path, **SMALL)
    assert len(losses(out)) == 2  # of the first step and the last


def test_prompts_are_read_and_not_learnt():
    rows = PackedRows([[("aaaa", False), ("bb", True)]] * 9, Letters(), 8, seed=0)
    ids, labels = rows.with_labels(0, range(3))
    prompt = ids == Letters()("a")["input_ids"][0]
    assert prompt.any()
    assert torch.equal(labels == -100, prompt)
    assert torch.equal(labels[~prompt], ids[~prompt])
    model = build("llama").requires_grad_(False)
    for kind in (Medusa, HiddenTransfer, LongSpec):
        drafter = kind.for_model(model)
        gradients = []
        for changed in (False, True):  # what is not learnt may be anything, as a target
            torch.manual_seed(0)
            drafter.zero_grad()
            nothing = torch.full_like(labels, -100)
            nothing[0, -1] = labels[0, -1]
            loss, figures = drafter.loss(model, ids, nothing if changed else torch.full_like(labels, -100))
            loss.backward()
            gradients.append(sum(float(p.grad.abs().sum()) for p in drafter.parameters() if p.grad is not None))
        assert gradients[0] == 0.0 < gradients[1]
        assert all(torch.isfinite(value) for value in figures.values())


def test_a_killed_run_goes_on_as_if_nothing_had_happened(text, tmp_path):
    results = []
    for stop in (None, 2):
        torch.manual_seed(0)
        model = build("llama")
        torch.manual_seed(1)
        drafter = LongSpec.for_model(model, tree_shape=(2, 2))
        out = tmp_path / f"out-{stop}"
        if stop:
            train_drafter(drafter, model, Letters(), text, out, stop_after=stop, **SMALL)
            assert (out / "training" / "checkpoint.pt").exists()
            torch.manual_seed(9)
            drafter = LongSpec.for_model(model, tree_shape=(2, 2))  # other weights, as in a new process
        train_drafter(drafter, model, Letters(), text, out, **SMALL)
        results.append((LongSpec.from_pretrained(out), losses(out)))
    (whole, curve), (resumed, resumed_curve) = results
    assert curve == resumed_curve  # each step once
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    train_drafter(drafter, model, Letters(), text, out, stop_after=1, resume=False, **SMALL)
    with pytest.raises(ValueError, match="is of a run with"):
        train_drafter(drafter, model, Letters(), text, out, **SMALL | {"steps": 9})
    for _ in range(2):  # the second time it is where it should stop
        train_drafter(Medusa.for_model(model), model, Letters(), text, tmp_path / "heads", stop_after=1, **SMALL)
        assert not (tmp_path / "heads" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="is of parameters of other sizes"):
        train_drafter(Medusa.for_model(model, num_heads=2), model, Letters(), text, tmp_path / "heads", **SMALL)


PROGRAM = """
import os, signal, sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from tiny_models import Letters, build
from test_drafting import SMALL
from heedful.decoding import Medusa
from heedful.training import train_drafter, train_medusa
torch.manual_seed(0)
model = build('llama')
drafter = Medusa.for_model(model)
"""


def program(folder, *lines):
    script = folder / "run.py"
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    script.write_text("\n".join([PROGRAM.format(paths=paths), *lines]) + "\n")
    return script


def test_a_run_that_the_system_kills_leaves_a_checkpoint_to_go_on_from(text, tmp_path):
    """SIGKILL in the middle of step 3 of 4, with a checkpoint after each second step."""
    script = program(
        tmp_path,
        "loss = Medusa.loss",
        "def fatal(self, *given):",
        "    if self.trained_share >= 0.75: os.kill(os.getpid(), signal.SIGKILL)",
        "    return loss(self, *given)",
        "Medusa.loss = fatal",
        "train_drafter(drafter, model, Letters(), sys.argv[1], sys.argv[2], checkpoint_every=2, **SMALL)",
    )
    killed = subprocess.run([sys.executable, str(script), str(text), str(tmp_path / "killed")], timeout=120)
    assert killed.returncode == -9
    assert (tmp_path / "killed" / "training" / "checkpoint.pt").exists()
    found = []
    for name in ("killed", "whole"):
        torch.manual_seed(0)
        model = build("llama")
        train_drafter(Medusa.for_model(model), model, Letters(), text, tmp_path / name, **SMALL)
        found.append(Medusa.from_pretrained(tmp_path / name))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(d.parameters() for d in found), strict=True))
    assert not (tmp_path / "killed" / "training" / "checkpoint.pt").exists()


def test_two_processes_have_the_losses_of_one(text, tmp_path):
    """Gloo on the CPU, through `accelerate launch`'s own environment variables."""
    torch.manual_seed(0)
    model = build("llama")
    train_drafter(Medusa.for_model(model), model, Letters(), text, tmp_path / "one", **SMALL)
    run_on_two(
        f"""
        from tiny_models import Letters, build
        from heedful.decoding import Medusa
        from heedful.training import train_drafter
        torch.manual_seed(0)
        model = build("llama")
        train_drafter(Medusa.for_model(model), model, Letters(), {str(text)!r}, {str(tmp_path / "two")!r}, **{SMALL!r})
        """,
        tmp_path,
    )
    Medusa.from_pretrained(tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_recipes_write_folders_that_draft(text, tmp_path, monkeypatch):
    monkeypatch.setattr(longspec, "SHAPES", ((1,), (2, 2)))
    model = build("llama")
    model.config.pad_token_id = 2
    options = SMALL | {"calibration_rows": 2}
    recipes = {
        Medusa: lambda out: train_medusa(model, Letters(), text, out, num_heads=2, max_nodes=6, **options),
        HiddenTransfer: lambda out: train_hidden_transfer(model, Letters(), text, out, max_nodes=6, **options),
        LongSpec: lambda out: train_longspec(model, Letters(), text, out, tree_shape=(2, 2), **SMALL),
    }
    for kind, train in recipes.items():
        drafter = kind.from_pretrained(train(tmp_path / kind.__name__))
        if kind is LongSpec:
            assert [shape for shape, _ in drafter.measured] == [[1], [2, 2]]
        else:
            assert len(drafter.tree.paths) == 6
            assert len(drafter.accuracies) == drafter.steps
        ids = torch.tensor([[5, 6, 7]])
        greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        assert torch.equal(heedful.generate(model, ids, drafter, **greedy).sequences, model.generate(ids, **greedy))


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_medusa_2_tunes_model_and_heads(text, tmp_path, distill, tied):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = build("llama", tie_word_embeddings=tied)
    before = {name: p.clone() for name, p in model.named_parameters()}
    out = train_medusa(
        model, Letters(), text, tmp_path, stage=2, num_heads=2, distill=distill, head_weight_schedule="sine",
        calibration_rows=0, lr=0.05, **SMALL,
    )  # fmt: skip
    tuned = AutoModelForCausalLM.from_pretrained(out / "model")
    changed = [name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])]
    assert any("q_proj" in name for name in changed)
    assert ("lm_head.weight" in changed) == (not tied)  # a head that is the embedding stays
    assert not any("embed" in name or "norm" in name for name in changed)
    assert type(Medusa.from_pretrained(out)) is Medusa


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_killed_while_it_calibrates_has_lost_nothing(text, tmp_path, monkeypatch, stage):
    """All steps are done: called again, it takes none and calibrates."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    found = []
    for name in ("killed", "whole"):
        torch.manual_seed(0)
        model = build("llama")
        drafter = Medusa.for_model(model, num_heads=2)
        options = SMALL | {"stage": stage, "drafter": drafter, "max_nodes": 3, "calibration_rows": 2}
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(Medusa, "calibrate", killed)
                with pytest.raises(KeyboardInterrupt):
                    train_medusa(model, Letters(), text, tmp_path / name, **options)
            assert not (tmp_path / name / "model.safetensors").exists()
            torch.manual_seed(0)
            model = build("llama")
            options["drafter"] = drafter = Medusa.for_model(model, num_heads=2)
            monkeypatch.setattr(drafter, "loss", killed)
        train_medusa(model, Letters(), text, tmp_path / name, **options)
        found.append(Medusa.from_pretrained(tmp_path / name))
        assert not (tmp_path / name / "training" / "checkpoint.pt").exists()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(d.parameters() for d in found), strict=True))
    assert found[0].tree.paths == found[1].tree.paths
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_schedule_goes_on_where_it_was_killed(text, tmp_path):
    weights = []
    for stop in (None, 2):
        torch.manual_seed(0)
        for after in (stop, None) if stop else (None,):
            model = build("llama")
            names = list(model.state_dict())
            before = {name: value.clone() for name, value in model.state_dict().items()}
            drafter = Medusa.for_model(model, num_heads=2)
            options = SMALL | ({"stop_after": after} if after else {})
            train_medusa(
                model, Letters(), text, tmp_path / str(stop), stage=2, drafter=drafter, head_weight=0.01,
                head_weight_schedule="sine", calibration_rows=0, **options,
            )  # fmt: skip
            assert list(model.state_dict()) == names  # no adapter is left in it, and a run that stopped changed nothing
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) == (
                after is not None
            )
        weights.append(drafter.scale)
    assert weights[0] == weights[1] == pytest.approx(0.01 * math.sin(math.pi / 2 * 3 / 4))


def test_self_distillation_writes_the_models_answers(tmp_path):
    model, tokenizer = heedful.zoo.load("classics-20m")
    prompts = ["It was the best of times,", "The key of the tower is"]
    lines = self_distill(model, tokenizer, prompts, tmp_path / "own.jsonl", max_new_tokens=12).read_text().splitlines()
    for prompt, line in zip(prompts, map(json.loads, lines), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert line == {"prompt": prompt, "answer": tokenizer.decode(answer, skip_special_tokens=True)}
    assert [pieces[0][1] for pieces in read_pieces(tmp_path / "own.jsonl")] == [False, False]
    with pytest.raises(ValueError, match="needs prompts"):
        self_distill(model, tokenizer, [], tmp_path / "none.jsonl")


def test_train_on_the_command_line(text, tmp_path, capsys, monkeypatch):
    def heedful_train(*arguments):
        monkeypatch.setattr("sys.argv", ["heedful", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, capsys.readouterr()

    monkeypatch.setattr(LongSpec, "calibrate", lambda *_: None)  # it takes a while on a CPU
    given = ("--data", text, "--steps", 1, "--batch-size", 1, "--length", 16)
    code, said = heedful_train("longspec", "--out", tmp_path / "one", *given)
    assert code == 0, said.err
    code, said = heedful_train(
        "longspec", "--out", tmp_path / "two", "--stage", 2, "--drafter", tmp_path / "one", *given
    )
    assert code == 0, said.err
    log = json.loads((tmp_path / "two" / "training" / "log.jsonl").read_text().splitlines()[0])
    assert log["lr"] == pytest.approx(5e-6)  # the stage's own
    assert LongSpec.from_pretrained(tmp_path / "two").hidden_size == 384
    for arguments, message in {
        ("medusa", "--stage", 2): "give its folder as --drafter",
        ("medusa", "--stage", 2, "--drafter", tmp_path / "one"): "holds a longspec drafter",
        ("medusa", "--drafter", tmp_path / "none"): "no drafter",
    }.items():
        code, said = heedful_train(*arguments, "--out", tmp_path / "three", *given)
        assert code != 0
        assert message in said.err.replace("\n", " ")


def test_bad_recipes(text, tmp_path):
    model = build("llama")
    with pytest.raises(ValueError, match="stage must be 1"):
        train_medusa(model, Letters(), text, tmp_path, stage=3)
    with pytest.raises(ValueError, match="goes on from a block of stage 1"):
        train_longspec(model, Letters(), text, tmp_path, stage=2)
    with pytest.raises(ValueError, match="'decay' or 'equal'"):
        train_medusa(model, Letters(), text, tmp_path, weighting="none")
