"""What is seen of activations: capture at sites, and the statistics that sum it up."""
