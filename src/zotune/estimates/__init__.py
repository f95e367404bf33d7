"""What a step costs in memory and time, before it is taken."""
