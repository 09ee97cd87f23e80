"""Token data for calibration and evaluation, from text, datasets, tensors, or the model's own writing."""

from __future__ import annotations

from qcompile.data.batches import Batches, Passages
from qcompile.data.load import Source, load_batches, load_passages
from qcompile.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batches", "Passages", "Source", "Tokenizer", "load_batches", "load_passages", "load_tokenizer"]
