"""Implement SplitQuantV2 for MLX."""
