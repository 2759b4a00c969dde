"""How far from the fp64 oracle a kernel may be, by dtype: relative L2 over the whole output, and why.

The oracle sees the same rounded inputs, so what is allowed is the kernel's own rounding.
"""

TOLERANCES = {
    "fp64": 1e-12,  # sums of up to 10**4 terms at 2**-53
    "fp32": 5e-6,  # sums of up to 10**4 terms at 2**-24, exp() good to 2 ulp, logits up to 20
    "fp16": 2e-3,  # output and (in Triton) probabilities rounded to 2**-11, the residual subtracts two such outputs
    "bf16": 1.2e-2,  # the same at 2**-8
}
# Column mass is summed in fp32 from fp32 scores whatever the input dtype.
MASS_TOLERANCE = 2e-5
