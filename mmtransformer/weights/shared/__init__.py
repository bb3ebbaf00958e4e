"""What every family shares: key tables, folders as hubs have them, the dtype of frozen weights."""
