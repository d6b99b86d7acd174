"""Tasks: what is measured of a model on a batch, and which number a limit on the loss is compared with."""
