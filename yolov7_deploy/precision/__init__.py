"""⑤ ONNX in, ONNX of a lower precision out."""
