"""Layers that run a split model."""
