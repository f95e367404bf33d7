"""A step: from options and losses to moved weights."""
