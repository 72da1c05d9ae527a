"""The machine: devices and their memory, the table of GPUs, XLA flags, kernels for CPU decoding."""
