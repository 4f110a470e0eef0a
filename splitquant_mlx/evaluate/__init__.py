"""Measure what a conversion cost."""
