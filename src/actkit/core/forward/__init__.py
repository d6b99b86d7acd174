"""How a model is called on a batch: one way for all, with the inputs and limits of each kind of model."""
