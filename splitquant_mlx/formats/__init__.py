"""Bytes to arrays and records: safetensors, GGUF, the manifest."""
