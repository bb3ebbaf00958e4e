"""What stands before a command: recipes that are looked through, faults told in a line."""
