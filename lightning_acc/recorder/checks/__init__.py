"""What the recorder does not believe: it refuses what cannot be described, and compares what can with the training itself."""
