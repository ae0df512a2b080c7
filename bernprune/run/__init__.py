"""One run, from its folder to its report; the only package that reads a whole config."""
