"""How long and how many bytes: compute, communication, memory, reallocation; hardware profiles."""
