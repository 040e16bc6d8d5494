"""The training step around a method: building, optimizer, schedules, CUDA graphs, cost."""
