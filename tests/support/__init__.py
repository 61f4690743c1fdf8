"""What several tests build on: small jobs, finished outputs, stand-ins."""
