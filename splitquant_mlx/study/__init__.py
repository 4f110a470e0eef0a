"""Studies: several conversions of one model with the same measurements."""
