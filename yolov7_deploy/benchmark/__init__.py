"""Speed of a Detector: measured, put into words and pictures, compared."""
