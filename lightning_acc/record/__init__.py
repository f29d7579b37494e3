"""The run directory as plain data: manifest, steps, parameters, samples; written whole or not at all, checked when read."""
