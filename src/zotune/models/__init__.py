"""Models: loading them, and which of their parameters a scheme trains."""
