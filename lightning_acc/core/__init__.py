"""F once: objective, optimizers, step, replay, audit, queries, removals. Knows no file layout, no Ray, no method."""
