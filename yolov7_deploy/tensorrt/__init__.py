"""TensorRT engines: building them from ONNX files, their build records, and the NMS plugin."""
