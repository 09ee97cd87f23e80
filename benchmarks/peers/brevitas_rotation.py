"""Fused rotation by Brevitas: time and drift on the tiny random models of tests/families.

Runs in an environment of its own (see ../README.md): `BREVITAS/bin/python brevitas_rotation.py FAMILY …` prints one
line of JSON a family, for ../brevitas.py. `--same-eps` gives all norms of a model the eps of its configuration. The
first family is done twice, so that what is loaded once counts for none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from families.build import build

OPTIONS = SimpleNamespace(  # what its entry point reads: one fused Hadamard rotation of each space, none online
    rotation="fused_no_fx",
    rotation_orphan_sink=False,
    rotation_mode="had",
    rotation_sdpa_regions=True,
    rotation_layers_to_expand=[],
    rotation_block_size=None,
    disable_block_rotation_for_fused=False,
    expansion_step=None,
    fine_tune=False,
    permute_fn=None,
)
EPS = ("eps", "variance_epsilon", "norm_eps", "layer_norm_epsilon", "epsilon", "rms_norm_eps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+")
    parser.add_argument("--same-eps", action="store_true")
    parser.add_argument("--no-heads", action="store_true", help="leave the values of attention as they are")
    options = parser.parse_args()
    OPTIONS.rotation_sdpa_regions = not options.no_heads
    warnings.filterwarnings("ignore")
    for number, name in enumerate([options.families[0], *options.families]):
        with contextlib.redirect_stdout(sys.stderr):
            result = one(name, options.same_eps)
        if number:
            print(json.dumps({"family": name, **result}), flush=True)


def one(name: str, same_eps: bool) -> dict[str, object]:
    """Seconds and max |Δlogit| / max |logit|, or why it could not be rotated."""
    from brevitas_examples.llm.main import fused_rotation_no_fx

    model: Any = build(name)
    if same_eps:
        equal_eps(model)
    tokens = torch.randint(3, model.config.vocab_size, (3, 8), generator=torch.Generator().manual_seed(1))
    example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    try:
        before, weights = logits(model, tokens), [p.detach().clone() for p in model.parameters()]
        start = time.perf_counter()
        fused_rotation_no_fx(model, [example], OPTIONS)
        seconds = time.perf_counter() - start
        after = logits(model, tokens)
    except Exception as error:  # another's program: whatever it raises is the finding
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"}
    now = list(model.parameters())
    changed = sum(1 for a, b in zip(weights, now, strict=False) if a.shape != b.shape or not torch.equal(a, b))
    drift = float((after - before).abs().max() / before.abs().max())
    return {"seconds": seconds, "drift": drift, "changed": changed, "parameters": len(now)}


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """float64 logits without a cache."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found.clone()


def equal_eps(model: Any) -> None:
    """Give every norm the eps that the configuration states."""
    stated = next((float(getattr(model.config, k)) for k in EPS if hasattr(model.config, k)), 1e-5)
    for module in model.modules():
        for attribute in EPS:
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, stated)


if __name__ == "__main__":
    main()
