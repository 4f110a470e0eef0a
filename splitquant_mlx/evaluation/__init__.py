"""Perplexity, KL divergence, ARC and other tasks."""
