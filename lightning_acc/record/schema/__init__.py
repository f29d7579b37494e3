"""What a record is: the keys of the manifest, the tensors of each kind of file, and how they fit together.

A hash says that a file is what was written, not that it makes sense: it may come from another program, or from someone with
ill will. So all that is read later on is looked at here first, once, and nothing is allocated by a number that the sizes of
the files do not bear out. The manifest is checked when a run is opened, a file when it is loaded.
"""
