"""What a person sees: the page and W&B."""
