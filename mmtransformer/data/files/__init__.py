"""Reading users' files: archives, tables, manifests, shards."""
