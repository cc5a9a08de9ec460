"""Trade-offs: compress a checkpoint in many ways, measure each, and show what they cost and keep."""
