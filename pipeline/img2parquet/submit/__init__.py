"""Submit a job to a remote Ray cluster through the Jobs API of its head.

    bundle.py       pack the job and this package, and nothing else, into the folder that is uploaded
    jobs_client.py  ask the head for versions and nodes, submit a bundle, follow the job's log to its end
    bootstrap.py    on the cluster, check that all requirements are installed, then run the command

The command `img2parquet submit` is in `cli/submit.py`.
"""
