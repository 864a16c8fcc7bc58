"""The benchmark: Spec-Bench's definitions on figures made up, and a run on a tiny model."""

import json

import pytest
import torch
from tiny_models import build
from torch.nn.attention import SDPBackend, sdpa_kernel

from heedful.decoding import DecodingStats, PromptLookup
from heedful.decoding.bench import (
    BASELINE,
    PLAIN,
    Answer,
    DecodeBenchmark,
    Question,
    bench_decode,
    fork_gap,
    interleaved,
    read_questions,
)
from heedful.decoding.support import without_cudnn_attention


def answer(category, tokens, seconds, gap=None, accepted=None):
    stats = None if accepted is None else DecodingStats(accepted=[accepted], steps=len(accepted))
    return Answer(category, tokens, seconds, gap is None, gap, stats)


@pytest.fixture
def benchmark():
    return DecodeBenchmark(
        {
            BASELINE: [answer("qa", 100, 10.0), answer("qa", 10, 2.0), answer("rag", 30, 1.0)],
            PLAIN: [answer("qa", 100, 5.0), answer("qa", 10, 1.0), answer("rag", 30, 1.0)],
            "heedful, x": [
                answer("qa", 100, 2.0, accepted=[3, 1]),
                answer("qa", 10, 1.0, gap=5e-4, accepted=[2]),
                answer("rag", 30, 2.0, gap=0.2, accepted=[4, 4, 4]),
            ],
        },
        {"dtype": "float32", "device": "a device", "baseline": "a baseline"},
    )


def test_speeds_are_means_over_questions_and_speed_ups_ratios_of_means(benchmark):
    # tokens/s: 10, 5, 30 of the baseline; 50, 10, 15 of x
    assert benchmark.speedup("heedful, x") == pytest.approx((75 / 3) / (45 / 3))
    assert benchmark.speedup("heedful, x", category="qa") == pytest.approx(60 / 15)
    assert benchmark.speedup("heedful, x", PLAIN, "rag") == pytest.approx(15 / 30)
    figures = benchmark.to_json()["contestants"]["heedful, x"]
    assert figures["tokens_per_second"] == pytest.approx(25.0)
    assert figures["tokens_per_step"] == pytest.approx(18 / 6)  # all rows' steps alike
    assert (figures["identical"], figures["forks"], figures["near_ties"]) == (1, 2, 1)
    assert figures["fork_rate_per_1000_tokens"] == pytest.approx(1000 * 2 / 140)
    assert figures["by_category"]["rag"]["largest_fork_gap"] == pytest.approx(0.2)
    low, high = figures["speedup_95"]
    assert low <= figures["speedup"] <= high
    json.dumps(benchmark.to_json())
    benchmark.answers["heedful, x"][1].fork_gap = float("inf")  # an output that is shorter, which no tie explains
    figures = json.loads(json.dumps(benchmark.to_json(), allow_nan=False))["contestants"]["heedful, x"]
    assert (figures["largest_fork_gap"], figures["forks"], figures["near_ties"]) == (None, 2, 0)


def test_the_table_says_what_the_baseline_is(benchmark):
    table = benchmark.table()
    assert "Baseline: a baseline." in table
    row = next(line for line in table.splitlines() if line.startswith("| heedful, x"))
    assert "| 25.0 | 1.67" in row
    assert "| 1.25 | 3.00 |" in row  # over the plain loop: (20 + 10 + 30) / 3 tokens/s; tokens a step
    assert row.endswith("| 1/3 | 14.29 | 1 |")


def test_the_plot_has_a_bar_for_every_contestant_and_category(benchmark):
    pytest.importorskip("matplotlib")
    axes = benchmark.plot().axes[0]
    assert len(axes.patches) == 2 * 3  # two contestants beside the baseline; qa, rag and all
    assert sorted(round(bar.get_height(), 2) for bar in axes.patches)[-1] == 4.0


def test_questions_come_in_turn_from_each_category(tmp_path):
    file = tmp_path / "question.jsonl"
    items = [("writing", "a"), ("coding", "b"), ("qa", "c"), ("qa", "d"), ("qa", "e")]
    lines = [json.dumps({"question_id": i, "category": c, "turns": [t, "more"]}) for i, (c, t) in enumerate(items)]
    file.write_text("\n".join(lines))
    asked = read_questions(file, per_category=2)
    assert [(q.category, q.prompt) for q in asked] == [("mt_bench", "a"), ("qa", "c"), ("mt_bench", "b"), ("qa", "d")]
    assert [q.prompt for q in interleaved([asked[:1], asked[1:]])] == ["a", "c", "b", "d"]
    for wrong, message in (('{"turns": []}', "line 1"), ('{"turns": [3]}', "no text"), ("", "no questions")):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            read_questions(file)


class Letters:
    """A tokenizer of 90 symbols."""

    def __call__(self, text, return_tensors):
        return type("Encoding", (), {"input_ids": torch.tensor([[3 + ord(c) % 80 for c in text]])})


class Watch(PromptLookup):
    def __init__(self):
        super().__init__()
        self.events = []

    def begin(self, model, batch_size):
        self.events.append("begin")

    def clear(self):
        self.events.append("clear")


def test_a_run_warms_up_clears_and_compares():
    model = build("llama", dtype=torch.float64)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    asked = [Question("qa", "Who was it, who was it?"), Question("rag", "a" * 200), Question("qa", "And then?")]
    warm, cold = Watch(), Watch()
    result = bench_decode(model, Letters(), asked, {"warm": warm, "cold": cold}, max_new_tokens=8, cold=["cold"])
    assert warm.events == ["begin"] * 3 + ["clear"] + ["begin"] * 3
    assert cold.events == ["begin"] * 3 + ["clear"] + ["clear", "begin"] * 3
    figures = result.to_json()
    assert figures["setting"]["questions"] == 3
    assert {"protocol", "baseline", "device", "dtype"} <= set(figures["setting"])
    for name in (BASELINE, PLAIN, "transformers prompt lookup", "heedful, warm", "heedful, cold"):
        assert figures["contestants"][name]["identical"] == 3
        assert figures["contestants"][name]["tokens"] == 24
    assert figures["setting"]["complete"]
    seen = []
    stopped = bench_decode(
        model, Letters(), asked, {}, max_new_tokens=4, time_limit=0.0, partial_result=lambda r: seen.append(r.to_json())
    )
    assert len(stopped.answers[BASELINE]) == 1
    assert [(s["setting"]["questions"], s["setting"]["complete"]) for s in seen] == [(1, False)]
    assert seen[0]["contestants"][PLAIN]["tokens"] == 4
    with pytest.raises(ValueError, match="no questions"):
        bench_decode(model, Letters(), [], {})


def test_a_wrong_output_is_counted_with_its_gap():
    model = build("llama", dtype=torch.float64).requires_grad_(False)
    reference = model.generate(
        torch.tensor([[5, 6]]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    other = reference.clone()
    logits = model(reference[:, :4]).logits[0, -1]
    other[0, 4] = worst = int(logits.argmin())
    assert fork_gap(model, other, reference) == pytest.approx(float(logits.max() - logits[worst]), rel=1e-5)
    assert fork_gap(model, reference[:, :4], reference) == float("inf")  # no tie explains an early end


def test_stats_of_a_batch_count_its_rows():
    assert DecodingStats(accepted=[[1, 2], [3]], steps=2).tokens_per_step == pytest.approx(2.0)


def test_kernels_without_plans_are_a_users_choice_less_cudnn():
    flags = torch.backends.cuda
    with without_cudnn_attention(torch.device("cuda")):
        assert not flags.cudnn_sdp_enabled()
        assert flags.flash_sdp_enabled()
    assert flags.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.MATH), without_cudnn_attention(torch.device("cuda")):
        assert flags.math_sdp_enabled()
        assert not flags.flash_sdp_enabled()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), without_cudnn_attention(torch.device("cuda")):
        assert flags.cudnn_sdp_enabled()  # nothing else is allowed
