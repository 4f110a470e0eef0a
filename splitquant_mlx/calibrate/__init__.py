"""What a model's own text says of it: sampled tokens, inputs of layers, sensitivities."""
