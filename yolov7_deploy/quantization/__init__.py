"""From a float32 graph and sample pictures to an INT8 graph whose accuracy is known."""
