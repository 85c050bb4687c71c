"""Under the Detector: one file per runtime."""
