"""What knows nothing of models' structure: errors, files, memory, processes, progress, the registry."""
