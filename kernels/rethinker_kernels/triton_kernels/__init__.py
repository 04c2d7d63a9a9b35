"""The Triton kernels and their launchers. Imported only where Triton runs: on a GPU, or in its interpreter."""
