"""Look into a model and check the machine."""
