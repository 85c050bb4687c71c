"""Speed of a detector: measurement, report, chart, and comparison of two runs."""
