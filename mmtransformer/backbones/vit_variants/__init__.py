"""ViTs in other ways than one at a time: packed rows of pictures, two towers as one."""
