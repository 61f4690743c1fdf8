"""Train a classifier on a few labelled rows and label every row of a model with it.

| file | what it does |
|---|---|
| `linear_probe.py` | runs a probe: fits or resumes, labels, finalizes |
| `label_file.py` | reads a CSV of labels and looks up the vectors of its rows |
| `classifier.py` | fits, selects, evaluates and calibrates the classifier |
| `multi_label.py` | does the same for independent classes |
| `label_partition.py` | writes the labels as a partition of the output |
"""
