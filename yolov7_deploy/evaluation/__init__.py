"""Accuracy of detectors, comparison of artifacts stage by stage, and verification."""
