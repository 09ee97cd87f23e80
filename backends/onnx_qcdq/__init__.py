"""onnx_qcdq: ONNX with QuantizeLinear, Clip and DequantizeLinear, run by onnxruntime (see README.md)."""

from qcompile.backends.onnx_qcdq.backend import OnnxQcdqBackend

__all__ = ["OnnxQcdqBackend"]
