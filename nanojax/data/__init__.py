"""Where text comes from, how it becomes tokens, and the order in which training sees them."""
