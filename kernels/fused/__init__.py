"""The Triton kernels of the pack; imported only after the probe in `backend` said yes."""
