"""Reports of GPU benchmarks: figures, plots and the page."""
