"""`zotune train`: a run and its folder."""
