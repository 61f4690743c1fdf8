"""Side-by-side speed of this program and of what people use instead: `python -m infra.bench`, or `make bench`."""
