"""The runtimes that execute a model for the Detector (PyTorch, ONNX Runtime, TensorRT), and their CUDA bindings."""
