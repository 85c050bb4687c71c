"""Estimated speed of a network on a device that is not available, with the error of such estimates."""
