"""The hardware that this process runs on: CPU, GPUs, Jetson boards, and their clocks, power and memory."""
