"""Images and shards that kill or stop the process that touches them; their neighbours are compared byte for byte.

`hook/sitecustomize.py` is on the path of every process of such a job. It looks at keys: `decode-abort` in one makes its
decoding call `abort`, `embed-...` its batch, `read-...` its shard; with POISON=rejects they are rejected instead, with
the words that the product should find, so that a job under poison and one without have to write the same files.
"""
