"""The samples of a record: what they are made of, and what the batches call them."""
