"""What every whole-model GPTQ run shares: reading the model and the tokens, timing one call, writing what came out.

`python run NAME_gptq.py MODEL TOKENS OUT [--act-order static|none] …` reads a float32 Llama folder and `tokens`
[samples, length] of a safetensors file; it writes OUT.safetensors, the values of every rounded weight in float32 by
their name in the checkpoint, and OUT.json, the seconds and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP, DAMPING, BLOCK = 128, 0.01, 128


@dataclass
class Job:
    """One run: what to read, where to write, and the options that peers have in common."""

    model: Path
    tokens: Path
    out: Path
    act_order: bool
    true_sequential: bool
    propagate: Literal["quantized", "float"]
    compute: Literal["float32", "bfloat16"]
    sums: Literal["float32", "int8"]
    facts: dict[str, Any] = field(default_factory=dict)

    def read_tokens(self) -> list[Tensor]:
        """One batch a sample: int64 [1, length]."""
        return list(load_file(self.tokens)["tokens"].split(1))

    def load(self) -> Any:
        """The transformers model in the dtype to compute in, on the CPU."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, torch_dtype=getattr(torch, self.compute)).eval()

    def tokenizer(self) -> Any:
        """A tokenizer that nothing asks anything of, for peers that insist on one."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        return PreTrainedTokenizerFast(tokenizer_object=words, **names)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """CPU and wall seconds of the call inside, and the process's peak memory when it is over."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.facts |= {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        self.facts["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def write(self, weights: dict[str, Tensor], packages: list[str], convention: str) -> None:
        """Write both files; `convention`: how the peer chooses scales, in words."""
        save_file({name: t.detach().float().contiguous() for name, t in weights.items()}, f"{self.out}.safetensors")
        self.facts["versions"] = {name: version(name) for name in packages}
        self.facts["convention"] = convention
        self.facts["threads"] = torch.get_num_threads()
        Path(f"{self.out}.json").write_text(json.dumps(self.facts, indent=1) + "\n")
        print(json.dumps(self.facts), file=sys.stderr)


def job(description: str | None) -> Job:
    """The run that the command line asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--act-order", action="store_true", help="columns by falling diagonal of H, static groups")
    parser.add_argument("--true-sequential", action="store_true", help="one product after the other inside a layer")
    parser.add_argument(
        "--propagate", choices=["quantized", "float"], default="quantized", help="what layers are shown"
    )
    parser.add_argument(
        "--compute",
        choices=["float32", "bfloat16"],
        default="float32",
        help="ours: linear layers while data is run; peers': the dtype of the model",
    )
    parser.add_argument("--sums", choices=["float32", "int8"], default="float32", help="of H; ours alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    return Job(
        options.model,
        options.tokens,
        options.out,
        options.act_order,
        options.true_sequential,
        options.propagate,
        options.compute,
        options.sums,
    )


def linears(model: Any) -> dict[str, Tensor]:
    """Weights of every linear layer but the head, by their name in the checkpoint."""
    return {
        f"{name}.weight": module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
