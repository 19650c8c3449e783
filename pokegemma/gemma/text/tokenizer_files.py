"""Write the files of a Gemma tokenizer from its tokenizer.model, and that from a vocabulary."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from transformers import GemmaTokenizer

USER_DEFINED, CONTROL = 4, 3
"""Types of SentencePiece's entries: found in any text, and never found in text. GGUF files have the same numbers."""

_BPE = 2


def write_tokenizer_files(
    folder: Path, *, is_text: Callable[[str], bool], tokens: Mapping[str, str] | None = None
) -> GemmaTokenizer:
    """Write tokenizer.json and tokenizer_config.json next to a folder's tokenizer.model, and return the tokenizer.

    As the published ones, it adds a BOS to every text: text of a chat template, which begins with one, has to be
    tokenized with `add_special_tokens=False`.

    Args:
        is_text: whether an entry that is found in any text, such as several newlines, is text and no control token.
        tokens: special tokens by transformers' names; those that are not in tokenizer.model get the ids that follow.
    """
    # The published tokenizers add a BOS to every text, also to one that begins with it; transformers' default does not.
    tokenizer = GemmaTokenizer.from_pretrained(folder, extra_special_tokens=dict(tokens or {}), add_bos_token=True)
    tokenizer.save_pretrained(folder)
    # transformers takes every user-defined symbol of tokenizer.model for a special token, and notes the path it
    # read. Newlines are ordinary text in the published checkpoints: decoding must keep them.
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["extra_special_tokens"] = [token for token in config["extra_special_tokens"] if not is_text(token)]
    for name in ("vocab_file", "is_local", "local_files_only"):
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in backend["added_tokens"]:
        token["special"] = not is_text(token["content"])
    (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    return GemmaTokenizer.from_pretrained(folder)


def write_tokenizer_model(path: Path, vocabulary: Iterable[tuple[str, float, int]]) -> None:
    """Write a tokenizer.model as Gemma has it: BPE with byte fallback, text is not changed, spaces are "▁".

    Args:
        vocabulary: piece, score and SentencePiece's type of each entry; the first four are pad, EOS, BOS and unknown.
    """
    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in vocabulary:
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = _BPE, len(model.pieces), True
    for number, name in enumerate(("pad", "eos", "bos", "unk")):
        setattr(trainer, f"{name}_id", number)
        setattr(trainer, f"{name}_piece", model.pieces[number].piece)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString(deterministic=True))
