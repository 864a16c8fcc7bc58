"""The bundled model: what `from_pretrained` makes of its folder, and the behaviours the library needs it for."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import heedful

LIMIT = 40_000_000


@pytest.fixture(scope="module")
def loaded():
    return heedful.zoo.load("classics-20m")


def test_folder_loads_with_transformers_alone():
    folder = heedful.zoo.path("classics-20m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Marley was dead").input_ids[0] == tokenizer.bos_token_id


def test_folder_is_small_and_in_shards():
    files = list(heedful.zoo.path("classics-20m").iterdir())
    assert sum(path.stat().st_size for path in files) < LIMIT
    assert len([path for path in files if path.suffix == ".safetensors"]) > 1
    assert max(path.stat().st_size for path in files) < 16 << 20


def test_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match="classics-20m"):
        heedful.zoo.load("nosuch")


def test_tokenizer_round_trip_and_single_digits(loaded):
    tokenizer = loaded[1]
    text = 'He said: "1843 was a cold year."\n\nNaïve, isn\'t it?  Yes.'
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer("48213", add_special_tokens=False).input_ids) == 5


def test_model_knows_english(loaded):
    model, tokenizer = loaded
    ids = tokenizer(heedful.zoo.excerpt()[5000:9000], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 3.9  # uniform guessing: 9.0


def test_first_token_is_a_sink(loaded):
    model, tokenizer = loaded
    sinks = heedful.steering.sink_map(model, tokenizer(heedful.zoo.excerpt()[:1200], return_tensors="pt"))
    assert int((sinks.first_token > 0.2).sum()) >= 3


def test_card_states_measured_results():
    folder = heedful.zoo.path("classics-20m")
    results = json.loads((folder / "results.json").read_text())
    card = (folder / "README.md").read_text()
    assert f"{results['bits_per_byte']:.3f}" in card
    for length in (512, 2048, 4096):
        assert f"recall_{length}" in results


def test_excerpt_is_not_tiny():
    assert len(heedful.zoo.excerpt()) > 100_000
