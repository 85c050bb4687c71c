"""The runtimes of the Detector (PyTorch, ONNX Runtime, OpenVINO, TensorRT), and their CUDA bindings."""
