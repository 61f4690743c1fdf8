"""Compare the speed of this program with alternatives: `python -m infra.bench`, or `make bench`."""
