"""Questions measured on a CPU, side by side with diffusers; `python -m benchmarks NAME` answers one."""
