"""Documents of text and pictures, and their packing into rows."""
