"""What surrounds the program: demo, benchmarks, a development S3 server, deployment."""
