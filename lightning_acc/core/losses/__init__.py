"""How a training loss is made of the losses of single samples.

``per_sample`` has the three ways to take them, ``reductions`` and ``reduced`` what is observed of a ``training_step``.
"""
