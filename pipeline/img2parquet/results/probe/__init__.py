"""Label every row of a model with a classifier, from its embeddings: one fitted to a few labels, or made of prompts.

| file | what it does |
|---|---|
| `linear_probe.py` | runs a probe: fits or resumes, labels, finalizes |
| `label_file.py` | reads a CSV of labels and looks up the vectors of its rows |
| `classifier.py` | fits, selects, evaluates and calibrates the classifier |
| `multi_label.py` | does the same for independent classes |
| `relabel.py` | makes the classifier from prompts instead, for CLIP and SigLIP |
| `classifier_partition.py` | stores a classifier once, and starts or resumes its partition |
| `label_partition.py` | writes the labels as a partition of the output |
"""
