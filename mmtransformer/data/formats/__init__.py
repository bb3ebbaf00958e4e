"""The formats that pairs come in: tables, JSON, Parquet, Excel, and which of them a folder holds."""
