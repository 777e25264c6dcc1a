"""From a `Problem` to a call of a CPU kernel: one module for each pass, and record.py with what they share."""
