"""Training: the network that provides the weights."""
