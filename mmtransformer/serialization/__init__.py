"""Models in folders, and files from outside that are not trusted."""
