"""What each method will cost on a run, before it runs."""
