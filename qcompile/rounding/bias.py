"""What rounding moved a layer's mean output by, for its bias to take back."""

from __future__ import annotations

from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.rounding.solve import Statistics


def bias_correction(weight: Tensor, values: Tensor, statistics: Statistics) -> Tensor:
    """Δb [out] = W E[x] - Ŵ E[x̂] for `weight` and its rounded `values` [out, in] (arXiv 1906.04721, section 4.2).

    Needs `statistics.mean`; where the float stream's is not known, the two are taken to be equal. In the dtype of
    `values`. QCompileError where there is no mean.
    """
    if statistics.mean is None:
        raise QCompileError(
            "bias correction needs the mean of the layer's inputs, and it was not collected; collect it"
        )
    mean = statistics.mean.to(values.dtype)
    float_mean = mean if statistics.mean_float is None else statistics.mean_float.to(values.dtype)
    return weight.to(values.dtype) @ float_mean - values @ mean
