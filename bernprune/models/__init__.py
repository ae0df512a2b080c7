"""The only room that knows transformers: what a model consists of, masking it live, slicing it, saving it."""
