"""Lanes and whole pictures in device memory."""
