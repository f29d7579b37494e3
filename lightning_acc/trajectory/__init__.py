"""The run directory: manifest, steps, parameters, samples. Knows no Lightning and no method."""
