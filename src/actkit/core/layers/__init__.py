"""The layers that methods make, and what is known of the layers of others."""
