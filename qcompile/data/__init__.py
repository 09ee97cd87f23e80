"""Token data for calibration and evaluation, from text, datasets, tensors, or the model's own writing."""

from __future__ import annotations

from qcompile.data.batches import Batches, InputBatches, Passages
from qcompile.data.load import Source, load_batches, load_inputs, load_passages
from qcompile.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batches",
    "InputBatches",
    "Passages",
    "Source",
    "Tokenizer",
    "load_batches",
    "load_inputs",
    "load_passages",
    "load_tokenizer",
]
