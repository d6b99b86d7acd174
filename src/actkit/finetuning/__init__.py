"""Fine-tuning: training less of a model, or with less memory."""
