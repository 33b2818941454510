"""The Triton kernels; imported only where `backend` found that Triton can run."""
