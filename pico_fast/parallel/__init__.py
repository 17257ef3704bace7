"""Several processes: the mesh, tensor and sequence parallelism, data parallelism, and what the ranks agree on."""
