"""The tokenizer of the embedded models: byte-level BPE of 512 tokens.

All 256 bytes are in the vocabulary, so any text has an encoding and ``<unk>`` never occurs.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 512
"""Tokens: 3 special ones, 256 bytes, 253 merges."""

SPECIAL = ("<unk>", "<s>", "</s>")
UNK, BOS, EOS = range(3)


def train_tokenizer(text: str, max_length: int) -> PreTrainedTokenizerFast:
    """Learn the merges from `text`; every encoding starts with ``<s>`` unless special tokens are turned off.

    ``split_special_tokens`` makes the characters ``<s>`` inside a text ordinary characters: without it, a text that
    contains them would lose them on the way back.
    """
    bpe = Tokenizer(models.BPE(unk_token=SPECIAL[UNK]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[(SPECIAL[BOS], BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=SPECIAL[UNK],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=max_length,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, under the class name that all versions know."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
