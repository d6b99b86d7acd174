"""What may be changed in a model, and the record of it that stays on the model."""
