"""`qcompile run`: continue a text with an artifact, in its own runtime, or with a model."""

from __future__ import annotations

import time

import torch

from qcompile.artifact import Artifact
from qcompile.cli.show import print_json, status
from qcompile.cli.subject import open_subject
from qcompile.compiled import CompiledModel
from qcompile.data import load_tokenizer
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.recipe import Recipe
from qcompile.report import CompileReport


def run(name: str, prompt: str, max_new_tokens: int, temperature: float, seed: int, as_json: bool) -> None:
    subject = open_subject(name)
    if isinstance(subject, Program):
        subject = CompiledModel(subject, Recipe(), CompileReport())
    info = subject.info if isinstance(subject, Artifact) else subject.program.info
    if not info.get("tokenizer"):
        raise QCompileError(f"{name} has no tokenizer.json; call generate() from Python with token ids")
    tokenizer = load_tokenizer(info["tokenizer"])
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise QCompileError("the prompt is empty; give at least one character")
    if info.get("bos_token_id") is not None and ids[0] != info["bos_token_id"]:
        ids = [info["bos_token_id"], *ids]
    start = time.perf_counter()
    tokens = subject.generate(torch.tensor([ids]), max_new_tokens, temperature=temperature, seed=seed)
    seconds = time.perf_counter() - start
    count = tokens.shape[1] - len(ids)
    text = tokenizer.decode(tokens[0].tolist())
    if as_json:
        print_json({"text": text, "tokens": count, "seconds": seconds, "tokens_per_second": count / seconds})
        return
    print(text)
    status(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} a second")
