"""Calibration: text sampled from the model, statistics of layer inputs, sensitivities."""
