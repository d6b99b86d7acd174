"""How a model is read: its blocks, parts, sites, experts, and the rows of known families."""
