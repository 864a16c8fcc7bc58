"""train_landmark: learns, resumes to the same weights, weighs tokens, keeps documents apart; its command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_on_two
from safetensors.torch import load_file
from tiny_models import Letters, build
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import heedful
from heedful.layers import load_landmark
from heedful.training import train_landmark
from heedful.training.landmark import _Objective

OPTIONS = {
    "block_size": 3, "top_k": 2, "batch_size": 4, "length": 32, "lr": 3e-3, "progress": False, "checkpoint_every": 100,
}  # fmt: skip


class Copies:
    """Rows whose second half says the first again."""

    def __init__(self, weighted=False):
        self.weighted = weighted

    def batch(self, step, places):
        rows = [torch.randint(3, 80, (12,), generator=torch.Generator().manual_seed(7919 * step + p)) for p in places]
        ids = torch.stack([torch.cat([row, row]) for row in rows])
        return (ids, (torch.arange(24) >= 12).float().expand(len(rows), -1)) if self.weighted else ids


def test_loss_falls_and_the_folder_loads(tmp_path):
    torch.manual_seed(0)
    model = build("llama")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and " * 60)
    out = train_landmark(model, Letters(), text, tmp_path / "out", steps=30, **OPTIONS)
    losses = [json.loads(line)["loss"] for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    again = load_landmark(out)
    assert again.config.landmark == {
        "block_size": 3, "token_id": 96, "top_k": 2, "retrieval": "per_head", "train_length": 32,
    }  # fmt: skip
    ids = torch.randint(3, 70, (1, 40))
    assert again.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 44)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    for name, stops in (("whole", [None]), ("parts", [3, None])):
        for stop in stops:
            train_landmark(
                build("llama"), Letters(), Copies(True), tmp_path / name, steps=6, stop_after=stop, **OPTIONS
            )
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], atol=1e-6), name
    train_landmark(build("llama"), Letters(), Copies(True), tmp_path / "other", steps=6, stop_after=1, **OPTIONS)
    for model, options in ((build("llama"), {"lr": 1.0}), (build("llama", intermediate_size=24), {})):
        with pytest.raises(ValueError, match="resume=False"):
            train_landmark(model, Letters(), Copies(True), tmp_path / "other", steps=6, **(OPTIONS | options))
    with pytest.raises(ValueError, match=r"multiple|at least"):
        train_landmark(build("llama"), Letters(), Copies(), tmp_path / "x", steps=0, **OPTIONS)
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        train_landmark(build("llama").bfloat16(), Letters(), Copies(), tmp_path / "x", steps=1, **OPTIONS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")  # its landmarks are not at work
    with pytest.raises(ValueError, match="load_landmark"):
        train_landmark(plain, Letters(), Copies(), tmp_path / "x", steps=1, **OPTIONS)
    with pytest.raises(ValueError, match="no training text"):
        train_landmark(build("llama"), Letters(), tmp_path / "none.txt", tmp_path / "y", steps=2, **OPTIONS)


def test_weights_and_documents():
    model = build("llama")
    from heedful.layers import convert_to_landmark

    model = convert_to_landmark(model, 3, top_k=2, train_length=32)
    objective = _Objective(model, eos=2)
    ids, weights = Copies(True).batch(0, range(2))
    plain = torch.nn.functional.cross_entropy(model(ids).logits[:, 11:-1].flatten(0, 1), ids[:, 12:].flatten())
    assert torch.allclose(objective(ids, weights), plain, atol=1e-5)
    ids[:, 9] = 2  # a document ends
    assert objective.positions(ids)[0].tolist() == [*range(10), *range(14)]
    logits = model(ids, position_ids=objective.positions(ids)).logits
    assert torch.allclose(logits[:, 10:], model(ids[:, 10:]).logits, atol=1e-5)


def test_the_command(tmp_path):
    from heedful.cli import app

    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    arguments = [
        "train", "landmark", "--data", str(text), "--out", str(tmp_path / "out"), "--steps", "1", "--batch-size", "1", "--length", "64",
        "--block-size", "7", "--top-k", "2",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    model = load_landmark(tmp_path / "out")
    assert model.config.landmark["block_size"] == 7
    result = CliRunner().invoke(app, ["generate", "It was", "--model", str(tmp_path / "out"), "--drafter", "none"])
    assert "load_landmark" in str(result.exception)  # not the plain model, silently
    assert heedful.zoo.names()


def test_two_processes_train_as_one(tmp_path):
    train_landmark(build("llama"), Letters(), Copies(True), tmp_path / "one", steps=2, **OPTIONS)
    run_on_two(
        f"""
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_landmark import Copies, Letters, OPTIONS, build, train_landmark
        train_landmark(build("llama"), Letters(), Copies(True), {str(tmp_path / "two")!r}, steps=2, **OPTIONS)
        """,
        tmp_path,
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-4), name


def test_the_command_in_two_processes(tmp_path):
    """A real launcher: both processes end well, one of them speaks."""
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "heedful.cli", "train", "landmark",
        "--data", str(text), "--out", str(tmp_path / "out"), "--steps", "1", "--batch-size", "2", "--length", "64", "--block-size", "7",
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["written", "to", str(tmp_path / "out")]
    assert load_landmark(tmp_path / "out").config.landmark["block_size"] == 7
