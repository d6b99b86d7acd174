"""actkit: profile, change and prove the activations of any PyTorch model."""
