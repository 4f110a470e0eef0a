"""Conversion of a checkpoint to a quantized one."""
