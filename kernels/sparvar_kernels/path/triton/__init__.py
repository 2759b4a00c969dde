"""The kernels of the passes around attention; imported on first use, as Triton is optional on a CPU."""
