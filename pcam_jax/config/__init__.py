"""What a run is: settings, what they may be, and their files."""
