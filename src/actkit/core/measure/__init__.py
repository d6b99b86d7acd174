"""What is measured of a model: quality, cost, speed, memory, text, and the proof of a saved folder."""
