"""What a whole job may hold in memory, and that it does: `make bounds`; a short version is in the tests.

inputs.py     shards that are large in one way: many images, many bytes, many pixels
memory.py     a command's peak memory, of its driver and of its workers
__main__.py   each job, its bound and what it took
"""
