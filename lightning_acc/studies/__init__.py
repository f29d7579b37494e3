"""Our own experiments: data modules, models, grids of trainings, and the command that trains."""
