"""The methods: one small class each, a registry that says how each runs, the sweeps that take them through a run."""
