"""Speed of a Detector: measured, put into words and images, compared."""
