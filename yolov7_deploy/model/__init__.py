"""② The reference network, readable beside the paper."""
