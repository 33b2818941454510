"""What `kernels.bench` measures: rows, contenders and the way they are timed."""
