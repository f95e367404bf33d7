"""A model with its scheme on and rows as token ids: what training, evaluation, prediction and previews begin with."""
