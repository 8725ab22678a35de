"""Studies: trials in a file or a database, and the workers on them."""
