"""What the machine has for this process: memory, cores, limits of control groups."""
