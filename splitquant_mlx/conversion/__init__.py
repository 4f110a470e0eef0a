"""The main road: from a checkpoint to a quantized one."""
