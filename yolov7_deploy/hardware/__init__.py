"""The machine under the feet: processor, GPUs, Jetson boards, their clocks and their power."""
