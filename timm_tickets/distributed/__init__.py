"""Several processes: who they are, what they give one another, FSDP2's split tensors, SIGTERM."""
