"""Reading users' files: archives, tables, splits and languages, shards."""
