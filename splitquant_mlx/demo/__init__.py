"""Demo: download a small chat model, convert it with three methods and compare the results."""
