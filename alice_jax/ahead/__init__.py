"""The train step compiled for accelerators that are not there, and what its program says of memory and traffic."""
