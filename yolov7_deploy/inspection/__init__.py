"""Contents and computational cost of model files, engines and variants."""
