"""What users write in files: read with care (reading), checked against what is known (checked), every fault said in a line."""
