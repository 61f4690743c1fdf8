"""Survive images and shards that crash or hang the process that works on them.

supervisor        restarts a local driver that died, and tells it what to isolate
sudden_end        prints an error when the driver of a Ray run ends without one
isolated_steps    prepares, embeds and reads in a child process, and rejects the rows that kill it
child_process     starts that process, sends it work, and reports its death
"""
