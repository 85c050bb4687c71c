"""From ONNX to a TensorRT engine file, and the plugin that such an engine may hold."""
