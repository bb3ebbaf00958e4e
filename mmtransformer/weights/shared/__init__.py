"""What every family shares: key tables, towers' too, folders as hubs have them, the dtype of frozen weights."""
