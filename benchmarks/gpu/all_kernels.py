"""All kernels on small steps, once each: ``python -m benchmarks.gpu.all_kernels``, for compute-sanitizer."""

import torch

from benchmarks.gpu.cases import TINY_KINDS, cases
from benchmarks.gpu.kernels import compare_writes, run_kernels


def main() -> None:
    """Run them; whether they are right is compared elsewhere."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in cases(TINY_KINDS, is_tiny=True):
        run_kernels(case, torch.float32, device)
    print("writes:", compare_writes(device))


if __name__ == "__main__":
    main()
