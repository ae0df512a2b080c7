"""The only package besides the command line that knows transformers: what a model consists of, masking it live,
slicing it, saving it."""
