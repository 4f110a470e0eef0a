"""Measure what a user meets: the time and memory of whole processes, and what they are made of."""
