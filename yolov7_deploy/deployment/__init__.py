"""Files with which other servers run a model: a Triton model repository, and a DeepStream application."""
