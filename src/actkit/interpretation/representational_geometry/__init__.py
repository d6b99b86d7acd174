"""The shape of representations: what they keep of inputs and of targets, and how abstract they are."""
