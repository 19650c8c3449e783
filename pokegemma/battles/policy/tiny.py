"""A tiny Gemma 3 for text alone with random weights, whose tokenizer knows the words of some battles and no others."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast, set_seed

from pokegemma.battles.policy.prompts import ANSWERS, QUESTION

_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 1024,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


def make_tiny_policy(folder: Path, words: Iterable[str], *, seed: int = 0) -> Gemma3ForCausalLM:
    """Write a tiny random Gemma 3 and its tokenizer to an existing folder, and return it.

    Width 64 and three layers: 150,000 weights, and 64 more for each word. Each action is one token.

    Args:
        words: of the texts that it will read; any other word is unknown to it.
    """
    set_seed(seed)
    tokenizer = make_word_tokenizer(words)
    config = Gemma3TextConfig(
        **_SHAPE,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(_SPECIAL[name]) for name in _SPECIAL if name != "unk_token"},
    )
    model = Gemma3ForCausalLM(config)
    # transformers' own start of 0.02 is made for wider models: the embeddings are the LM head, too.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.hidden_size**-0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def make_word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are whole words: special ones, those of answers, and `words`, sorted."""
    fixed = [*_SPECIAL.values(), *(answer.strip() for answer in ANSWERS), QUESTION]
    vocabulary = {word: place for place, word in enumerate([*fixed, *sorted(set(words) - set(fixed))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"]))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **_SPECIAL, model_max_length=_SHAPE["max_position_embeddings"]
    )
