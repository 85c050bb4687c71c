"""Estimated speed of a network on a device that is not here, with the error of such estimates."""
