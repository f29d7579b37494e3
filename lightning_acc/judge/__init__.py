"""What the scores are worth: agreement with the truth, cleaning and its controls, what leaves the package."""
