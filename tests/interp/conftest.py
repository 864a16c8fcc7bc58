"""A tokenizer, some prose, and a one-layer model that retrieves by construction."""

from __future__ import annotations

import pytest
import torch
from interp.models import BOS_ONLY, COPY, word_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from heedful.interp import Needle

SUBJECTS = [
    "the miller",
    "an old sailor",
    "my aunt",
    "the curate",
    "a travelling player",
    "the youngest sister",
    "our neighbour",
    "the clerk",
]
VERBS = [
    "walked towards",
    "could not forget",
    "spoke at length of",
    "wrote a letter about",
    "laughed at",
    "quietly praised",
]
OBJECTS = [
    "the harbour",
    "a broken clock",
    "the autumn fair",
    "his garden",
    "the long winter",
    "an empty house",
    "the green coat",
]


def make_prose(sentences: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)

    def pick(options: list[str]) -> str:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    text = ""
    for index in range(sentences):
        line = f"{pick(SUBJECTS)} {pick(VERBS)} {pick(OBJECTS)}{pick(['.', '.', '!', '?'])}"
        text += line[0].upper() + line[1:] + ("\n\n" if index % 9 == 8 else " ")
    return text


@pytest.fixture(scope="session")
def prose() -> str:
    return make_prose(400)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with digits one by one and BOS first, like the zoo's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        [make_prose(200, seed=1), "What is the secret number of The secret number of is" * 9],
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=["<bos>", "<eos>", "<pad>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def retriever():
    """``(model, tokenizer, haystack, needles)``. One layer, three heads. Head COPY attends from token v to token v + 1,
    whatever its place, and copies it; BOS_ONLY attends to the first token; SILENT to all alike; both write nothing."""
    hay = [f"hay{i}" for i in range(30)]
    chains = [[f"n{row}x{i}" for i in range(6)] for row in range(4)]
    names = [*hay, ".", *(word for chain in chains for word in [*chain, f"gap{chain[0]}"])]
    tokenizer = word_tokenizer(names)
    size = len(tokenizer)
    width = size + -size % 3  # the hidden state: one dimension a token
    dim = size + 2 + size % 2
    model = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=size, hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=3,
            num_key_value_heads=3, head_dim=dim, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=0,
            eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 1e300},
        )
    ).eval()  # fmt: skip
    attention, eye = model.model.layers[0].self_attn, torch.eye(size, width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (
            model.model.norm,
            model.model.layers[0].input_layernorm,
            model.model.layers[0].post_attention_layernorm,
        ):
            norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(eye)
        model.lm_head.weight.copy_(eye)
        query, key, value = (torch.zeros(3, dim, width) for _ in range(3))
        # RoPE with this base turns the first pair of dimensions and (almost) nothing else; that pair is left out.
        room = [d for d in range(dim) if d not in (0, dim // 2)][:size]
        query[COPY, room] = 2 * eye
        key[COPY, room] = 2 * eye.roll(1, 1)  # key of token u looks like the query of token u - 1
        query[BOS_ONLY, room[0]] = 4.0
        key[BOS_ONLY, room[0], 0] = 4.0
        value[COPY, room] = eye
        output = torch.zeros(width, 3, dim)
        output[:, COPY, room] = 3 * eye.T
        for projection, weight in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value)):
            projection.weight.copy_(weight.flatten(0, 1))
        attention.o_proj.weight.copy_(output.flatten(1))
    generator = torch.Generator().manual_seed(0)
    text = " ".join(
        hay[int(torch.randint(30, (1,), generator=generator))] + (" ." if index % 7 == 6 else "")
        for index in range(300)
    )
    needles = [Needle(" ".join([*c[1:], "."]), c[0], " " + " ".join(c[1:])) for c in chains]
    return model, tokenizer, text, needles
