"""Score predictions against a ground-truth column.

evaluate.py   read the committed rows, score them, and turn counts into metrics
mistakes.py   rank the rows whose ground truth is probably wrong
scorers.py    count how labels, masks and masked patches compare with the ground truth
mean_loss.py  average the loss columns of a finished job
"""
