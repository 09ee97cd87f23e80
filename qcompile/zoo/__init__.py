"""Small trained language models that ship with the package, so that every command can be tried offline.

Each is a directory in the Hugging Face layout (``config.json``, ``generation_config.json``, ``model.safetensors`` in
float16, ``tokenizer.json``, ``tokenizer_config.json``) of at most 3 MB, made by :mod:`qcompile.zoo.train`:

========  =======================  ==================================================================
name      class                    what it exercises
========  =======================  ==================================================================
llama     ``LlamaForCausalLM``     RMSNorm, grouped-query attention, RoPE, SwiGLU, separate head
opt       ``OPTForCausalLM``       LayerNorm with bias, ReLU, biases, learned positions, tied head
moe       ``MixtralForCausalLM``   4 experts of which each token uses 2, otherwise as llama
========  =======================  ==================================================================

This module imports nothing but the standard library: asking for a path must not cost an import of torch.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["NAMES", "path"]

NAMES: tuple[str, ...] = ("llama", "opt", "moe")
"""The embedded models, in the order in which they are worth trying."""

_MODELS = Path(__file__).resolve().parent / "models"


def path(name: str = "llama") -> Path:
    """Directory of the embedded model `name`, ready for ``from_pretrained``.

    >>> path("opt").name
    'opt'
    >>> (path() / "model.safetensors").is_file()
    True
    >>> path("gpt")
    Traceback (most recent call last):
        ...
    ValueError: no embedded model 'gpt'; there are: llama, opt, moe
    """
    if name not in NAMES:
        raise ValueError(f"no embedded model {name!r}; there are: {', '.join(NAMES)}")
    return _MODELS / name
