"""Evaluation text and questions."""
