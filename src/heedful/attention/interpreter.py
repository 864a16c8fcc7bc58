"""Whether Triton's interpreter runs the kernels, on the CPU: TRITON_INTERPRET=1 was set before triton was imported."""

import triton


@triton.jit
def _kernel() -> None:
    pass


INTERPRETED = not isinstance(_kernel, triton.JITFunction)
