"""What was measured of an engine: the time of steps, the memory of pictures."""
