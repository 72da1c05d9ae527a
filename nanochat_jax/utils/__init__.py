"""What every folder may use: command-line flags, errors, paths and atomic writes, progress, provenance."""
