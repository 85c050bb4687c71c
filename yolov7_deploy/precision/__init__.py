"""Conversion of ONNX models to FP16 and INT8."""
