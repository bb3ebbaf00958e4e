"""What `PairFiles` reads: rows out of manifests, and the index on disk that large data sets are opened by."""
