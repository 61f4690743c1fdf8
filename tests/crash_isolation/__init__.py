"""Images and shards that kill or hang the process that touches them; their neighbours are compared byte for byte.

`hook/sitecustomize.py` is on the path of every process of such a job, and acts on keys: `decode-abort` in a key makes
its decoding call `abort`, `embed-...` does so to its batch, `read-...` to its shard. With POISON=rejects these rows are
rejected instead, with the messages that the product should give, so both jobs have to write the same files.
"""
