"""The local interaction basis: directions of each layer that matter to the next, and the few edges between them."""
