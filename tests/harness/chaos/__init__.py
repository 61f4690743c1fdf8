"""Jobs under fire: writers killed, stopped, starved and lied to at every step; then every row is counted.

    python -m tests.harness.chaos --runs 1000     seeded runs of the small job (`make chaos`)
    python -m tests.harness.chaos --seed 1234     one of them again, its folder kept
    python -m tests.harness.chaos.on_retry        a retry killed at every step, and two at once
    python -m tests.harness.chaos.on_extend       an extension, the same
    python -m tests.harness.chaos.on_ray          workers, actors and drivers of Ray killed; nodes lost and added
    python -m tests.harness.chaos.safeguards      each safeguard turned off in turn, and which tests see it

| file | does |
|---|---|
| `warm.py`, `environment.py` | what is imported and set before anything else |
| `bed.py` | the small job, its input on a disk and in a store, and what an undisturbed run of it wrote |
| `plans.py` | a seed -> what will happen to which driver |
| `drivers.py` | a job in a forked process, with what happens to it |
| `reader.py` | a process that polls the output all the while |
| `stores.py` | an S3 server, and a faulty proxy before it, each in a process of its own |
| `runs.py` | a plan carried out, and what came of it: problems and counts |
| `results/` | what the last long runs counted |

* Start-up of Python and torch would be most of the time: a parent imports everything, stays single-threaded, and forks.
* A blow comes when a step of storage (`img2parquet.storage.write_hooks`) has been reached n times, so a seed meets the
  same one again; what the other threads did by then may differ.
"""
