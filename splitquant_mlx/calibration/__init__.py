"""What a model tells about its own layers: sampled text, input statistics, sensitivities."""
