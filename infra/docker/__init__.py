"""Build the container image, and try its Dockerfile without a container engine."""
