"""What a run leaves: its trajectory, and the weights again from it."""
