"""One file an op family; each defines `family`."""
