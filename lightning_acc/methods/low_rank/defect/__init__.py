"""The update's defect: acc-low-rank of optimizers whose update is no affine function."""
