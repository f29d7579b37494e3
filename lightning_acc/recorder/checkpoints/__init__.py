"""Lightning's checkpoints: where in a record each was written, and how a training goes on from one; averages of parameters."""
