"""Speed of a machine that is not here: estimated, with the error of the estimate."""
