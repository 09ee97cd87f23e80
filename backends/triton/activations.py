"""Which kernel multiplies a quantized activation: those of 8-bit integers, fp8 or microscaling formats, or none, and
then the activation stays simulated in torch and the weight is multiplied as it is."""

from __future__ import annotations

from qcompile.backends.triton.matching import Site
from qcompile.ir.program import Program


def kernel_for(program: Program, site: Site) -> Site:
    """The site with the kernel that takes its activation."""
    return site
