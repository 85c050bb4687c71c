"""④ From torch to ONNX."""
