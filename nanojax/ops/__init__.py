"""Pure functions of arrays: no config, no flax, no files."""
