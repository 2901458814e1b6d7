"""The engine's CUDA backend, which the package imatrix loads from the folder `lib` beside this
file. There is nothing to import."""
