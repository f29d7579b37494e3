"""acc-low-rank: ACC-SGD-IE for every sample at the price of a few trainings."""
