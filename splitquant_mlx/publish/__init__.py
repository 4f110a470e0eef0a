"""Publish a converted checkpoint: its files, its figures, its card, and the hub."""
