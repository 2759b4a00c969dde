"""Whether code or a profile became worse, on a machine that is busy: facts against a baseline file.

counts      what a call does: launches, tensors made, keys visited, multiplications; the same every time
binaries    what compiled kernels take: registers, shared memory, spills; compiled for a GPU that is elsewhere
ratios      ours over dense, timed in turn inside one process
baseline    facts in a file, and what of them became worse
"""
