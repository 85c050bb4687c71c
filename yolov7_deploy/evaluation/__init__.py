"""The workshop: accuracy, parity, the paper's tables."""
