"""The image: its Dockerfile, what it installs, and how each instruction is tried without an engine."""
