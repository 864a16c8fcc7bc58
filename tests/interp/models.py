"""Tiny models and tokenizers of the interp tests."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from heedful.interp import Needle, NeedlePrompt


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word a token; "<bos>" first, ids in the order given after <bos> and <unk>."""
    vocabulary = {word: index for index, word in enumerate(["<bos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")


def random_model(config_class=LlamaConfig, model_class=LlamaForCausalLM, *, seed=0, attention="sdpa", **changes):
    """A tiny random model of 12 token ids with peaky attention, so that top-1 keys have no near ties."""
    arguments = {
        "vocab_size": 12, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.4,
        "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    return model_class._from_config(config_class(**arguments), attn_implementation=attention).eval()


WORDS = word_tokenizer([f"w{i}" for i in range(10)])


def self_answered_prompts(
    model, count=5, lengths=(20, 33, 27), answer=6, seed=0, columns=None, words=WORDS
) -> list[NeedlePrompt]:
    """Random prompts whose "right" answer is whatever the model says: a random model passes them all. The needle is
    ``columns`` (default: the whole prompt but BOS), of few different tokens, so that copies happen by chance."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for index in range(count):
        size = lengths[index % len(lengths)]
        ids = torch.cat([torch.tensor([0]), torch.randint(2, 12, (size - 1,), generator=generator)])
        mask = torch.ones(1, size)
        said = model.generate(ids[None], attention_mask=mask, max_new_tokens=answer, do_sample=False)[0, size:]
        text = words.decode(said.tolist())
        needle = columns if columns is not None else torch.arange(1, size)
        prompts.append(NeedlePrompt(Needle(text, "", text), ids, said, needle, size + answer, 0.5))
    return prompts


COPY, BOS_ONLY, SILENT = 0, 1, 2  # heads of the constructed model
