"""Export of PyTorch models to ONNX, with decoding and NMS in the graph."""
