"""What the error of a sparse autoencoder is made of."""
