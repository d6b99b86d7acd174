"""OFQ: training a vision transformer in few bits without weights that flip back and forth."""
