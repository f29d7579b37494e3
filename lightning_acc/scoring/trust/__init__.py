"""How far a table of estimates can be trusted: the check by retraining, the verdict, the figures of agreement."""
