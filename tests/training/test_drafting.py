"""The loop that trains drafters: data, equal losses on one and two processes, going on after a kill, folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build

import heedful
from heedful.decoding import HiddenTransfer, LongSpec, Medusa
from heedful.training import train_drafter, train_hidden_transfer, train_longspec, train_medusa
from heedful.training.drafting import PackedRows, read_documents

SMALL = {"steps": 4, "batch_size": 4, "length": 24, "progress": False}


class Letters:
    """A tokenizer of 90 symbols."""

    eos_token_id, bos_token_id, pad_token_id = 1, 0, 2

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(c) % 80 for c in text]}

    def save_pretrained(self, folder):
        pass


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
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert [d.strip() for d in read_documents(file)] == ["one", "Question: two\nAnswer: 2", "three\n3", "four", "five"]
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
    assert curve[-1] == resumed_curve[-1]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    train_drafter(drafter, model, Letters(), text, out, stop_after=1, resume=False, **SMALL)
    with pytest.raises(ValueError, match="is of a run with"):
        train_drafter(drafter, model, Letters(), text, out, **SMALL | {"steps": 9})


def test_two_processes_have_the_losses_of_one(text, tmp_path):
    """Gloo on the CPU, through `accelerate launch`'s own environment variables."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]\n"
        "torch.set_num_threads(1)\n"
        "from tiny_models import build\nfrom test_drafting import Letters, SMALL\n"
        "from heedful.decoding import Medusa\nfrom heedful.training import train_drafter\n"
        "torch.manual_seed(0)\nmodel = build('llama')\n"
        "train_drafter(Medusa.for_model(model), model, Letters(), sys.argv[1], sys.argv[2], **SMALL)\n"
    )
    curves = []
    for number in (1, 2):
        out = tmp_path / f"of-{number}"
        processes = []
        for rank in range(number):
            env = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29611", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            if number == 1:
                env = {k: v for k, v in env.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
            processes.append(subprocess.Popen([sys.executable, str(script), str(text), str(out)], env=env))
        assert [process.wait(timeout=120) for process in processes] == [0] * number
        curves.append(losses(out))
        Medusa.from_pretrained(out)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_recipes_write_folders_that_draft(text, tmp_path):
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
        if kind is not LongSpec:
            assert len(drafter.tree.paths) == 6
        ids = torch.tensor([[5, 6, 7]])
        greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        assert torch.equal(heedful.generate(model, ids, drafter, **greedy).sequences, model.generate(ids, **greedy))


@pytest.mark.parametrize("distill", [False, True])
def test_medusa_2_tunes_model_and_heads(text, tmp_path, distill):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    out = train_medusa(
        model, Letters(), text, tmp_path, stage=2, num_heads=2, distill=distill, head_weight_schedule="sine",
        calibration_rows=0, lr=0.05, **SMALL,
    )  # fmt: skip
    tuned = AutoModelForCausalLM.from_pretrained(out / "model")
    changed = [name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])]
    assert any("q_proj" in name for name in changed)
    assert type(Medusa.from_pretrained(out)) is Medusa


def test_bad_recipes(text, tmp_path):
    model = build("llama")
    with pytest.raises(ValueError, match="stage must be 1"):
        train_medusa(model, Letters(), text, tmp_path, stage=3)
    with pytest.raises(ValueError, match="goes on from a block of stage 1"):
        train_longspec(model, Letters(), text, tmp_path, stage=2)
    with pytest.raises(ValueError, match="'decay' or 'equal'"):
        train_medusa(model, Letters(), text, tmp_path, weighting="none")
