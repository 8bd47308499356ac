"""What the process has of its machine: variables, files, output, limits, tasks."""
