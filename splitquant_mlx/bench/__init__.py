"""Benchmarks of whole processes: time and memory of conversion and inference."""
