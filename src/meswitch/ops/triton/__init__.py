"""The GPU kernels, each with its launcher. Nothing here is imported where no kernel runs: a CPU may have no Triton."""
