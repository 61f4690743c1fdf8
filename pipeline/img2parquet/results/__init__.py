"""Use an output: read, verify, search, evaluate, label, report on and export it.

reader.py         open committed rows, read rejects, report a run's progress
verify.py         check every byte of an output against its plan
embeddings.py     read committed embeddings as unit vectors, and rows by their place
label_scores.py   read labels and logits as the model means them
source_images.py  fetch the images of rows from the source shards
search/           find rows by image or key, build an index, find duplicates
probe/            label all rows with a classifier: fitted to a few labels, or made of prompts
evaluation/       score predictions against a ground-truth column
report/           write one HTML page about an output
exports/          write rows in the formats of other tools
"""
