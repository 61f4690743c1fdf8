"""A job file -> a job on somebody's Ray cluster, by the head's Jobs API.

parcel.py    a job -> the folder that is uploaded: the job, the package, nothing else
head.py      an address -> the cluster's versions and nodes; a parcel -> a job there; its log and its end
arrive.py    on the cluster: is what the package needs there? Then the command itself
command.py   `img2parquet submit`
"""
