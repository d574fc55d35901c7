"""What a compiled step is and what it took: programs, traces, tables, pictures."""
