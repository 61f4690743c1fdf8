"""Put faults into a copy of the package, one at a time, and see that the tests notice each of them.

    areas.py       which files get faults, and which tests should notice
    operators.py   every small change that can be made to a file, found in its syntax tree
    by_hand.py     faults of meaning that such changes do not reach
    reasons.py     why a fault that no test notices is none

mutmut and cosmic-ray run the tests of a whole project for every change, choose no sample by a seed, and take no faults
by hand; cosmic-ray also edits the working tree.
"""
