"""Throughput of one net in several frameworks, each in a process of its own, taking turns."""
