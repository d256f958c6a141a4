"""The machine: errors, files, signals, accelerators, processes."""
