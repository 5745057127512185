"""Storage of a repository's files: `base` is the interface, `local` keeps them in a directory."""
