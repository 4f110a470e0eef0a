"""Several conversions of one model, measured alike."""
