"""What a method is, and how a recipe of them is planned and run, block by block."""
