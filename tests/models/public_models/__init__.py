"""The adapters on the public code itself, tiny and with random weights, where a checkout is given; see run.py."""
