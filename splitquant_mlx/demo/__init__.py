"""A first conversion of a small real chat model."""
