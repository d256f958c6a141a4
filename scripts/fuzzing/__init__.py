"""What is fuzzed: the parsers of bytes from outside, and sound inputs of each."""
