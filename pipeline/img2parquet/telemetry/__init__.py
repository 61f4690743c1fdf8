"""Observe a run: logs, stage timings, metrics, crash records and stack dumps.

logs.py             write log lines to stderr, as text or JSON
stage_timing.py     measure the stages of a job and name its bottleneck
prometheus.py       publish metrics to Prometheus
flight_recorder.py  record what each thread is working on, for the process that outlives a crash
stack_dumps.py      dump the stacks of other processes on this machine
"""
