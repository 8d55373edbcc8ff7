"""Reports of what was measured on GPUs: figures, plots and the page."""
