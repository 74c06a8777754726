"""MLP Memory: a corpus distilled into a small network that replaces retrieval."""
