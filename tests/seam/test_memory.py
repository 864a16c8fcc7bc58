"""Only what a part asks for is materialised: measured by torch's own allocator events."""

import gc

import family_checks
import pytest
import tiny_models
import torch
from torch.profiler import ProfilerActivity, profile

import heedful

MIB = 2**20


def peak(function):
    """Largest number of bytes alive at once that `function` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def forward(model, length):
    ids = torch.randint(5, 80, (1, length))

    def run():
        with torch.no_grad():
            model.model(ids, use_cache=False)

    return run


class Row(heedful.Probe):
    def probabilities(self, call, probabilities):
        self.shape = tuple(probabilities.shape)


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama", num_hidden_layers=1, max_position_embeddings=2**15)


def test_one_row_at_32k_keys_stays_under_64_mib(model):
    run = forward(model, 2**15)
    plain = peak(run)
    probe = Row(rows="last")
    with heedful.attach(model, probe):
        probed = peak(run)
    assert probe.shape == (1, 4, 1, 2**15)
    assert probed - plain < 64 * MIB
    assert probed - plain < 4 * MIB  # what it takes here: 4 heads x 32k keys x 4 bytes is half a MiB


LENGTH = 2048
MATRIX = 4 * LENGTH**2  # one head's logits: 16 MiB


@pytest.mark.parametrize(
    ("part", "least", "most"),
    [
        # The meter sees what is asked: a head's logits, probabilities and visibility.
        (Row(heads=[1]), MATRIX, 2.75 * MATRIX),
        (Row(), 4 * MATRIX, 10 * MATRIX),
        (Row(heads=[0, 2], rows="last"), 0, MIB),
        (family_checks.Identity("logits", rows="last"), 0, 2 * MIB),
        (family_checks.Identity("outputs"), 0, 4 * MIB),
        (family_checks.Identity("queries_keys"), 0, 4 * MIB),
    ],
)
def test_what_each_part_takes(model, part, least, most):
    run = forward(model, LENGTH)
    plain = peak(run)
    with heedful.attach(model, part):
        took = peak(run) - plain
    assert least <= took <= most


def test_a_row_beside_all_rows_of_one_head_stays_a_row(model):
    run = forward(model, LENGTH)
    with heedful.attach(model, Row(heads=[1])):
        one_head = peak(run)
    with heedful.attach(model, Row(heads=[1]), Row(rows="last")):
        both = peak(run)
    assert both - one_head < 2 * MIB


def test_the_last_row_under_padding_builds_no_matrix(model):
    """With padding the model's own mask is T x T; finding the last row and its visibility adds nothing of that size."""
    ids = torch.randint(5, 80, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    for attn in ("sdpa", "eager"):
        padded = tiny_models.build("llama", attn=attn, num_hidden_layers=1, max_position_embeddings=LENGTH)

        def run(padded=padded):
            with torch.no_grad():
                padded.model(ids, attention_mask=mask, use_cache=False)

        plain = peak(run)
        with heedful.attach(padded, Row(rows="last"), family_checks.Identity("outputs", rows="last")):
            assert peak(run) - plain < 2 * MIB


def test_nothing_stays(model):
    run = forward(model, 512)
    with heedful.attach(model, Row(), family_checks.Identity("probabilities")):
        run()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
            gc.collect()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(e.nbytes() for e in events) < 0.1 * MIB
