"""What a writer gathers before it writes: contents and their numbers, steps, parameters; and the thread it writes in."""
