"""Layers of split and quantized models, and the model files of checkpoints."""
