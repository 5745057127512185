"""What a person or a script reads: text for people, one JSON object per line for scripts, progress for a terminal."""
