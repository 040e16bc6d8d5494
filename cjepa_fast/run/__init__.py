"""What a run writes and reads: records, metrics, checkpoints."""
