"""What every method stands on: anatomy, capture, edits, transforms, checkpoints, evaluation."""
