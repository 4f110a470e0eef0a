"""Find, check, load and divide models."""
