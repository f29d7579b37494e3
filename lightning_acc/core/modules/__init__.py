"""What users and libraries do to modules that a pure function of their parameters has to do without."""
