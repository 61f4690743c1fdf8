"""Mutated images, shards and texts through the real code, at length: `make fuzz`; a short version is in the tests.

mutate.py     bytes -> broken bytes: blind (bits, runs, cuts, splices, extremes) and by a format's own pieces
corpus.py     what is mutated: images of every format
images.py     one seed: a mutated image through decode and preprocess, exact and fast
shards.py     one seed: mutated shards through a reader, or a whole small job with verify
parsers.py    our own parsers, each with what must hold for any bytes
guided.py     the same parsers under a coverage-guided fuzzer (atheris)
children.py   seeds in forked children: a native crash, a hang or a stray exception costs one seed, by name
"""
