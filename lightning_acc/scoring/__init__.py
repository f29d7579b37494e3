"""From a question to a table of scores: pieces of work, Ray, shards, the stored tables."""
